"""`padding="right"`: masks that hide nothing but padding behind the tokens are dropped, and the step is eager's."""

from __future__ import annotations

import copy
import os
from typing import Any

import oracle
import plans
import pytest
import torch
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build
from documents import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import padded
from torch import nn

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Report
from cggr_compile.ir.program import Program

EXAMPLES = 100 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "long" else 8
LLAMA = ARCHITECTURES["llama"]
# Of attention by another kernel: a product of the widths and of the longest sum over tokens.
ROUNDING = oracle.rounding(COMMON["hidden_size"], COMMON["intermediate_size"], VOCABULARY, 64)


def without_mask(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


@pytest.fixture(scope="module")
def step(padded_llama: tuple[nn.Module, Program]) -> plans.Routed:
    return plans.Routed(*padded_llama, ratio=1.0, selection="topk", padding="right")


@settings(max_examples=EXAMPLES)
@given(lengths=st.lists(st.integers(2, 12), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_every_row_trains_as_without_a_mask(step: plans.Routed, lengths: list[int], seed: int) -> None:
    """Bitwise the step that eager makes without a mask, and within rounding the one with it."""
    batch, eager = padded(lengths, seed), copy.deepcopy(step.model)
    actual = step.step(batch)
    assert Report.of(step.runtime).causal_attentions == 3
    oracle.assert_same_step(*actual, *oracle.step(eager, without_mask(batch)))
    oracle.assert_step_within(ROUNDING, *actual, *oracle.step(eager, batch))


@pytest.mark.parametrize("promised", [False, True])
def test_a_mask_of_ones_is_none_where_it_is_promised_and_else_within_rounding(
    padded_llama: tuple[nn.Module, Program], promised: bool
) -> None:
    """Eager's SDPA drops it, since it looks at the numbers."""
    step = plans.Routed(*padded_llama, ratio=1.0, selection="topk", padding="right" if promised else "any")
    batch, eager = padded([9, 9, 9]), copy.deepcopy(step.model)
    actual, expected = step.step(batch), oracle.step(eager, batch)
    oracle.assert_step_within(ROUNDING, *actual, *expected)
    if promised:
        oracle.assert_same_step(*actual, *expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"route": "token"}, {"route": "loss"}, {"selection": "random"}])
def test_routes_keep_what_they_keep_with_the_mask(
    padded_llama: tuple[nn.Module, Program], options: dict[str, Any]
) -> None:
    batch = padded([9, 5, 7, 3])
    promised, plain = (plans.Routed(*padded_llama, seed=0, **options, padding=side) for side in ("right", "any"))
    oracle.assert_step_within(ROUNDING, *promised.step(batch), *plain.step(batch))
    assert torch.equal(promised.selected, plain.selected)
    reports = [Report.of(step.runtime) for step in (promised, plain)]
    assert [report.causal_attentions for report in reports] == [3, 0]
    assert ["to hide padding on the right" in " ".join(str(report).split()) for report in reports] == [True, False]
    operators = [node.target for node in promised.plan.program.graph.nodes]
    assert torch.ops.cggr.checked_padding.default in operators


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "options", "dropped"),
    [
        ("gpt2", {}, 2),
        ("qwen3", {}, 2),
        ("mistral", {}, 0),  # windows
        ("bert", {}, 0),  # tokens see what is behind them
        ("mixtral", {}, 0),  # the balance of experts reads what padding becomes
        ("llama", {"keep_logits": True}, 0),
    ],
)
def test_other_models(name: str, options: dict[str, Any], dropped: int) -> None:
    """Whatever cannot be proved keeps its mask, and any step is eager's."""
    eager, batch = oracle.truncated(build(name), ARCHITECTURES[name], 2), padded([7, 4, 9])
    model = cggr.optimize(copy.deepcopy(eager), ratio=1.0, padding="right", inner="eager", **options)
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().causal_attentions == dropped


@pytest.mark.long
def test_a_balance_of_experts_that_is_off_reads_nothing() -> None:
    eager, batch = build("mixtral"), padded([7, 4, 9])
    eager.config.output_router_logits = False
    model = cggr.optimize(copy.deepcopy(eager), ratio=1.0, padding="right", inner="eager")
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().causal_attentions == 3


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 0.5}, {"ratio": 0.5, "route": "token"}])
def test_a_broken_promise_raises(padded_llama: tuple[nn.Module, Program], options: dict[str, Any]) -> None:
    """Padding in front, in the middle, or with a label that it predicts; the first label behind the tokens is predicted
    by the last token."""
    step = plans.Routed(*padded_llama, padding="right", **options)
    batch = padded([7, 4, 9, 6])
    batch["labels"][1, 4] = 5
    step.step(batch)
    for row, place, changed, message in (
        (
            1,
            0,
            {"attention_mask": 0},
            "padding at place 0 of row 1 is in front of tokens; not what padding='right'",
        ),
        (2, 4, {"attention_mask": 0}, "padding at place 4 of row 2 is in front of tokens"),
        (1, 6, {"labels": 5}, "padding at place 5 of row 1 predicts a label"),
    ):
        broken = {name: tensor.clone() for name, tensor in batch.items()}
        for name, value in changed.items():
            broken[name][row, place] = value
        with pytest.raises(ValueError, match=message):
            step.step(broken)


def test_the_example_of_the_documentation() -> None:
    model = examples("integrations.md", "padded_behind")["padded_behind"](build("llama"))
    model(**padded([7, 4, 9]))
    assert model.cggr.report().causal_attentions == 3


def test_padding_is_any_or_right() -> None:
    with pytest.raises(cggr.ConfigError, match="padding='left'"):
        cggr.RoutingConfig(padding="left")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 0.5}, {"ratio": 0.5, "route": "token", "seed": 0}])
def test_on_a_gpu_it_is_the_step_with_the_mask_and_never_synchronises(options: dict[str, Any]) -> None:
    eager = build("llama").cuda()
    promised, plain = (
        cggr.optimize(copy.deepcopy(eager), padding=side, cuda_graphs=True, **options) for side in ("right", "any")
    )
    batches = [{name: tensor.cuda() for name, tensor in padded([7, 4, 9, 6], seed).items()} for seed in range(4)]
    for batch in batches[:3]:
        for model in (promised, plain):  # which draw the same tokens, step by step
            oracle.step(model, batch)
    torch.cuda.synchronize()
    with oracle.without_sync():
        actual = oracle.step(promised, batches[3])
    oracle.assert_step_within(ROUNDING, *actual, *oracle.step(plain, batches[3]))
    assert promised.cggr.report().causal_attentions == 3
