"""A routed step on the GPU against the same step by the CPU's reference: equal weights, batches and noise.

The generators of two devices differ, so both draw the noise of a step from here. The CPU runs the graph as it is with
the reference operators; the GPU by every provider, inner backend and replay. What was selected is compared first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import plans
import pytest
import torch
import transformers as T
from architectures import GROUPED, Architecture, eager_of, token_batch
from cggr_compile.kernels.reference import selection
from torch import Tensor, nn

import cggr_compile as cggr
from cggr_compile.ir.program import Program
from cggr_compile.run import plan

LLAMA = Architecture("llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), "model.layers")
ROWS, STEPS = 12, 4
"""Steps: one that compiles, one that records, and two that are replayed; each has a batch and noise of its own."""

COMMON = {"ratio": 0.5, "router_layers": 2, "seed": 0}

# Sums of at most a few thousand fp32 terms in another order: their number times the rounding of one.
EXACT = 2000 * torch.finfo(torch.float32).eps
SAMPLED = {"router_head": "sampled", "router_head_frequent": 8, "router_head_sampled": 16}
FP8 = {"router_head": "fp8"}
BOTH, TOKENS = ("sequence", "loss"), ("token", "loss")

FP32: list[dict[str, Any]] = [
    {"selection": "importance", **SAMPLED, "cuda_graphs": True, "inner": "inductor"},
    {"selection": "stratified", "route": "loss", **SAMPLED, "inner": "inductor"},
    {"selection": "trimmed", "route": BOTH, "cuda_graphs": True},
    {"selection": "topk", "route": "token", "inner": "inductor", "cuda_graphs": True},
    {"selection": "topk"},
    {"selection": "topk", "route": "loss", "cuda_graphs": True, **SAMPLED},
    {"selection": "topk", "route": BOTH, "kernels": "reference"},
    {"selection": "topk", "route": TOKENS, "cuda_graphs": True, "kernels": "reference"},
    {"selection": "random", "cuda_graphs": True},
    {"selection": "random", "route": "loss"},
    {"selection": "random", "route": BOTH, "cuda_graphs": True},
    {"selection": "random", "route": "token", "kernels": "reference"},
    {"selection": "trimmed", "cuda_graphs": True},
    {"selection": "trimmed", "route": "loss", "kernels": "reference"},
    {"selection": "trimmed", "route": "token", **SAMPLED},
    {"selection": "trimmed", "route": TOKENS, "cuda_graphs": True},
    {"selection": "stratified", "kernels": {"masked_loss": "triton_recompute"}},
    {"selection": "stratified", "route": BOTH, "cuda_graphs": True},
    {"selection": "importance", "kernels": "reference", "cuda_graphs": True},
    {"selection": "importance", "route": "loss", "cuda_graphs": True},
    {"selection": "importance", "route": BOTH, **SAMPLED},
    {"selection": "importance", "scoring": "combined", "kernels": {"masked_loss": "triton_one_pass_small"}},
]
# Rounding decides between rows of nearly equal scores, so scores are given here, or there are none.
BF16: list[dict[str, Any]] = [
    {"selection": "importance", "cuda_graphs": True, "inner": "inductor"},
    {"selection": "importance", "kernels": "reference"},
    {"selection": "topk", "cuda_graphs": True},
    {"selection": "trimmed"},
    {"selection": "stratified", "cuda_graphs": True, "kernels": {"masked_loss": "triton_recompute"}},
    {"selection": "random", "route": "loss", "cuda_graphs": True},
    {"selection": "random", "route": BOTH},
    {"selection": "random", "route": TOKENS, "cuda_graphs": True},
    {"selection": "random", "route": "token"},
]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, with the long profile, tests the comparison itself."""
    return request.param


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The number of the step, on which all noise depends."""
    now = {"number": 0}

    def noise(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor:
        seed = 1000 * now["number"] + 10 * len(shape) + sum(shape)
        return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device)

    monkeypatch.setattr(plan, "uniform_noise", noise)
    return now


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, Program]:
    """One capture for every reference on the CPU that runs without autocast."""
    model = eager_of(LLAMA)
    return model, plans.captured(model, token_batch())


def of_reference(options: dict[str, Any]) -> dict[str, Any]:
    """Without what says how a step is run."""
    how = ("kernels", "inner", "cuda_graphs")
    return {**COMMON, **{name: value for name, value in options.items() if name not in how}, "inner": "eager"}


def optimized(device: str, options: dict[str, Any]) -> nn.Module:
    """The model on the device by the options; on the CPU without what needs a GPU."""
    options = {"inner": "aot_eager", **COMMON, **options}
    if device == "cpu":
        options |= {"kernels": "auto", "cuda_graphs": False}
    return cggr.optimize(eager_of(LLAMA).to(device), **options)


def batch_of(number: int) -> dict[str, Tensor]:
    return token_batch(ROWS, 12, seed=number + 1)


def on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


def parts_of(selected: Any) -> tuple[Tensor, ...]:
    return tuple(part.cpu() for part in (selected if isinstance(selected, tuple) else (selected,)))


def copied(step: tuple[Tensor, dict[str, Tensor | None]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients on the CPU: a gradient that is held over the next step would keep that from being replayed."""
    return step[0].cpu(), {name: gradient.cpu() for name, gradient in step[1].items() if gradient is not None}


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.sample(8)
@pytest.mark.parametrize("options", FP32, ids=str)
def test_fp32_selects_loses_and_learns_the_same(
    device: str, step: dict[str, int], captured: tuple[nn.Module, Program], options: dict[str, Any]
) -> None:
    tested, reference = optimized(device, options), plans.Routed(*captured, **of_reference(options))
    for number in range(STEPS):
        step["number"] = number
        batch = batch_of(number)
        loss, gradients = copied(oracle.step(tested, on(device, batch)))
        expected_loss, expected = reference.step(batch)
        last, expected_last = tested.cggr.runtime.last.found, reference.runtime.last.found
        for part in ("scores", "weights"):
            if getattr(expected_last, part) is not None:
                torch.testing.assert_close(
                    getattr(last, part).cpu(), getattr(expected_last, part), rtol=EXACT, atol=EXACT
                )
        for part, wanted in zip(parts_of(tested.cggr.selected), parts_of(reference.selected), strict=True):
            assert torch.equal(part, wanted)
        assert difference(loss, expected_loss) < EXACT
        for name, gradient in expected.items():
            assert difference(gradients[name], gradient) < EXACT, name
    if device == "cuda" and options.get("cuda_graphs"):
        assert not tested.cggr.report().cuda_graphs.startswith("0 recorded")


@pytest.mark.sample(4)
@pytest.mark.parametrize("options", BF16, ids=str)
def test_under_autocast_it_errs_no_more_than_the_cpu(
    device: str, step: dict[str, int], captured: tuple[nn.Module, Program], options: dict[str, Any]
) -> None:
    """The error from fp32 is at most twice that of the same dtype on the CPU."""
    tested, rounded = optimized(device, options), optimized("cpu", of_reference(options))
    truth = plans.Routed(*captured, **of_reference(options))
    for number in range(STEPS):
        step["number"] = number
        batch, steps = batch_of(number), []
        scores = torch.rand(ROWS, generator=torch.Generator().manual_seed(number))
        given = (each.runtime.given for each in (tested.cggr, rounded.cggr, truth))
        if options["selection"] != "random":
            for each in given:
                each.give(scores)
        for model, where in ((tested, device), (rounded, "cpu")):
            with torch.autocast(where, torch.bfloat16):
                steps.append(copied(oracle.step(model, on(where, batch))))
        steps.append(truth.step(batch))
        for part, wanted in zip(parts_of(tested.cggr.selected), parts_of(truth.selected), strict=True):
            assert torch.equal(part, wanted)
        found, same_dtype, expected = steps
        assert difference(found[0], expected[0]) <= 2 * difference(same_dtype[0], expected[0]) + 2e-3
        for name, gradient in expected[1].items():
            allowed = 2 * difference(same_dtype[1][name], gradient) + 2e-3
            assert difference(found[1][name], gradient) <= allowed, name


@pytest.mark.parametrize("head", [{}, SAMPLED, FP8], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_of_every_head_and_what_rules_make_of_them(
    device: str, step: dict[str, int], head: dict[str, Any], autocast: bool
) -> None:
    """Scores are the CPU's up to the dtype's rounding; rows and weights are the rule's of the GPU's own scores."""
    options = {"selection": "importance", **head}
    tested, reference = optimized(device, options), optimized("cpu", of_reference(options))
    for model, where in ((tested, device), (reference, "cpu")):
        with torch.autocast(where, torch.bfloat16, enabled=autocast):
            model(**on(where, batch_of(0)))
    last, expected = tested.cggr.runtime.last.found, reference.cggr.runtime.last.found
    close = 2e-2 if autocast or head == FP8 else EXACT
    torch.testing.assert_close(last.scores.cpu(), expected.scores, rtol=close, atol=close)
    valid = last.counts.cpu() > 0
    noise = plan.uniform_noise([ROWS], torch.device("cpu"), torch.Generator())
    rows, weights = selection.importance(last.scores.cpu(), valid, len(last.rows), noise)
    assert torch.equal(last.rows.cpu(), rows)
    torch.testing.assert_close(last.weights.cpu(), weights * valid.sum(), rtol=1e-5, atol=0)
