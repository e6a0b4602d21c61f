"""`kernels=` end to end: the Triton kernels inside a routed step, the choice in the report, what cannot run refused."""

from __future__ import annotations

import copy
from typing import Any

import head_oracle
import oracle
import plans
import pytest
import torch
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build, token_batch
from cggr_compile.kernels.triton import tiles
from cggr_compile.kernels.triton.tiles import Tile
from torch import nn
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Report
from cggr_compile.ir.program import Program

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = build("llama").to(DEVICE)
    return model, plans.captured(model, on_device(token_batch(6, 16)))


def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(DEVICE) for key, tensor in batch.items()}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time is the number of tiles it walks; the padding of full-size ones would dominate."""
    if DEVICE == "cpu":
        head_oracle.shrink_tiles(monkeypatch)  # and bfloat16 as GPUs have it
        for name in ("HALF", "FULL", "QUARTER"):
            monkeypatch.setattr(tiles, name, (Tile(32, 64, 32, 4, 2),))


def optimized(eager: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return cggr.optimize(copy.deepcopy(eager), **{"ratio": 0.4, "router_layers": 2, "inner": "eager", **options})


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("llama", "triton_one_pass"),
        pytest.param("gemma2", "triton_recompute", marks=pytest.mark.long),
        pytest.param("bert", "triton_one_pass", marks=pytest.mark.long),
    ],
)
def test_a_routed_step_on_triton_is_eagers_on_the_same_rows(name: str, loss: str) -> None:
    """Tied and untied heads, a soft-cap, a bias; ignored labels and padding in the batch."""
    eager = build(name).to(DEVICE)
    batch = {key: tensor.to(DEVICE) for key, tensor in token_batch(6, 16).items()}
    kernels = {"score": "triton", "select": "triton", "gather": "triton", "masked_loss": loss}
    model = optimized(eager, kernels=kernels, scoring="combined", selection="topk")
    got, gradients = oracle.step(model, batch)
    rows = model.cggr.selected
    assert torch.equal(rows, optimized_rows(eager, batch, name))
    wanted, expected = oracle.step(eager, oracle.rows_of(batch, rows))
    # The sums whose order the kernels change: over the width, over the words, and over the kept tokens.
    share = oracle.rounding(COMMON["hidden_size"], VOCABULARY, batch["labels"][rows].numel())
    oracle.assert_step_within(share, got, gradients, wanted, expected)
    chosen = dict(model.cggr.report().providers)
    assert chosen == kernels


def optimized_rows(eager: torch.nn.Module, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    on_cpu = {key: tensor.cpu() for key, tensor in batch.items()}
    rows = oracle.expected_rows(copy.deepcopy(eager).cpu(), ARCHITECTURES[name], on_cpu, 0.4, 2, "combined")
    return rows.to(DEVICE)


def test_a_router_head_on_triton_selects_the_references_rows(llama: tuple[nn.Module, Program]) -> None:
    options = {"router_head": "sampled", "router_head_frequent": 5, "router_head_sampled": 12}
    chosen = []
    for kernels in ("triton", "reference"):
        routed = plans.Routed(*llama, ratio=0.4, kernels=kernels, seed=3, **options)
        routed.step(on_device(token_batch(6, 16)))
        chosen.append(routed.selected)
        assert Report.of(routed.runtime).providers["sampled_score"] == kernels
    assert torch.equal(*chosen)


def test_autocast_runs_the_kernels_in_its_dtype_and_loses_no_gradient() -> None:
    """No further from fp32 than eager under the same autocast, but for one rounding to bfloat16: of the exponentials,
    which eager keeps in fp32 until they are a gradient."""
    eager = build("llama").to(DEVICE)
    batch = {key: tensor.to(DEVICE) for key, tensor in token_batch(6, 16).items()}
    model = optimized(eager, kernels="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        got, gradients = oracle.step(model, batch)
        rows = oracle.rows_of(batch, model.cggr.selected)
        wanted, expected = oracle.step(eager, rows)
    expected = {name: None if g is None else g.clone() for name, g in expected.items()}
    oracle.assert_no_further((got, gradients), (wanted, expected), oracle.step(eager, rows))


def test_the_report_says_what_was_passed_over_and_why(llama: tuple[nn.Module, Program]) -> None:
    report = Report.of(plans.Routed(*llama, ratio=0.4).runtime)
    if DEVICE == "cuda":
        assert report.providers["masked_loss"] == "triton (one_pass)"
        assert report.providers["gather"] == "reference"
        assert "fuses with its neighbours" in report.passed_over["gather"]
    else:
        assert set(report.providers.values()) == {"reference"}
        assert "the interpreter is for tests" in report.passed_over["score"]
        assert "passed over" in str(report)


def test_without_the_interpreter_the_cpu_refuses_triton_and_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    eager = Toy().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.4, kernels={"score": "triton"})
    with pytest.raises(
        cggr.CannotOptimize, match=r"score: provider 'triton' is unavailable on cpu .*interpreter"
    ) as why:
        model(**toy_batch(6))
    assert "name another provider" in str(why.value)
    cggr.restore(model)
    assert torch.equal(model(**toy_batch(6))[0], eager(**toy_batch(6))[0])


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("tritan", "kernels='tritan', did you mean 'triton'"),
        ({"scores": "triton"}, "did you mean 'score'"),
        ({"select": "triton_recompute"}, r"kernels\['select'\]='triton_recompute'.*valid values: triton, reference"),
        (3, "neither a string nor a mapping"),
    ],
)
def test_bad_options_name_the_valid_ones(kernels: object, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(kernels=kernels)


@pytest.mark.gpu
@pytest.mark.sample(4)
@pytest.mark.parametrize("router_head", ["exact", "sampled", "fp8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_takes_the_kernels_without_a_sync(router_head: str, autocast: bool) -> None:
    """Its loss is no further from fp32 than eager's: a mean over tokens, of a few times the logits' size, so that one
    rounding of it covers those of its logits."""
    eager = build("llama").cuda().to(torch.float32 if autocast else torch.bfloat16)
    batch = {key: tensor.cuda() for key, tensor in token_batch(8, 32).items()}
    model = optimized(eager, inner="inductor", router_head=router_head)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert model.cggr.report().providers["masked_loss"] == "triton (one_pass)"
    rows = oracle.rows_of(batch, model.cggr.selected)
    with torch.no_grad():
        truth = copy.deepcopy(eager).float()(**rows).loss
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            wanted = eager(**rows).loss
    oracle.assert_no_further((loss.detach(), {}), (wanted, {}), (truth, {}), times=2)
