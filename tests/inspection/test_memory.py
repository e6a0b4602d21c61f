"""What explanations say of memory: parts that can be counted by hand, and the batch that fits."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.errors import CannotOptimize
from cggr_compile.inspection import memory
from cggr_compile.inspection.explanation import Explanation

GIB = 2**30


@cache
def explained(frozen: bool = False, cuda_graphs: bool = False, loss: str = "triton") -> Explanation:
    with torch.device("meta"):
        model = Toy().train()
        batch = {name: torch.zeros(4, 6, dtype=torch.long) for name in ("input_ids", "labels")}
    if frozen:
        model.embed.requires_grad_(False)
    options = {"cuda_graphs": cuda_graphs, "kernels": {"masked_loss": loss}}
    return cggr.explain(model, batch, ratio=0.5, selection="random", **options)


def size_of(explanation: Explanation, frozen: bool = False) -> int:
    model = explanation.model
    return sum(4 * x.numel() for x in model.parameters()) - (4 * model.embed.weight.numel() if frozen else 0)


@pytest.mark.parametrize("frozen", [False, True])
def test_parts(frozen: bool) -> None:
    explanation = explained(frozen=frozen)
    found = explanation.memory()
    assert found.parameters * GIB == size_of(explanation)
    assert found.optimizer * GIB == 2 * size_of(explanation, frozen)
    assert found.peak == found.parameters + found.gradients + found.optimizer + found.activations + found.transient
    assert (found.rows, found.length) == (4, 6)
    assert f"peak memory     {found}"[:40] in str(explanation.report())


def test_a_recording_keeps_gradients_and_workspaces() -> None:
    plain, recorded = explained(), explained(cuda_graphs=True)
    more = recorded.memory().gradients - plain.memory().gradients
    assert more * GIB == size_of(plain)
    assert recorded.memory().transient - plain.memory().transient == pytest.approx(4 * memory.WORKSPACE / GIB)


@pytest.mark.parametrize(
    ("options", "when"),
    [
        ({"route": "depth", "depth_layers": 1, "depth_until": 3}, "once all 3 layers train"),
        ({"ratio": 0.5, "warmup_steps": 4}, "while 100% is kept"),
        ({"ratio": 0.5, "route": "token", "dense_after_steps": 4}, "while 100% is kept"),
        (
            {"route": ("depth", "sequence"), "depth_layers": 1, "ratio": 0.5, "warmup_steps": 4},
            "while 100% is kept, once all 3 layers train",
        ),
    ],
)
def test_of_a_schedule_the_largest_step_counts(options: dict[str, Any], when: str) -> None:
    with torch.device("meta"):
        model = Toy().train()
        batch = {name: torch.zeros(4, 6, dtype=torch.long) for name in ("input_ids", "labels")}
    whole = cggr.explain(model, batch, ratio=1.0).memory(40)
    found = cggr.explain(model, batch, **options).memory(40)
    assert found == dataclasses.replace(whole, when=when)
    assert f"40 × 6 {when}: parameters" in str(found)


def test_the_largest_batch_that_fits() -> None:
    explanation = explained()
    limit = explanation.memory(61).peak
    found = explanation.batch_that_fits(limit)
    assert found.rows >= 61
    assert found.peak <= limit < explanation.memory(found.rows + 1).peak


@given(
    of_row=st.floats(1e-6, 10),
    kept=st.integers(1, 300),
    block=st.integers(1, 5000),
    blocks=st.floats(0, 5),
    limit=st.floats(11, 200),
    captured=st.integers(1, 64),
)
def test_few_batches_are_tried_and_none_far_from_what_fits(
    of_row: float, kept: int, block: int, blocks: float, limit: float, captured: int
) -> None:
    """Of memory that grows in stairs, one row of each `kept`, and more behind a number of rows."""
    tried = []

    def predicted(rows: int) -> memory.Memory:
        tried.append(rows)
        activations = of_row * max(1, rows // kept)
        return memory.Memory(rows, 6, 1.0, 0.0, 0.0, activations, blocks * (rows > block))

    found = memory.largest_that_fits(predicted, captured, limit)
    next_rows = found.rows + max(1, found.rows // memory.PRECISION)
    assert found.peak <= limit < predicted(next_rows).peak
    assert max(tried) <= max(2, captured, memory.FARTHEST * next_rows)
    assert len(tried) < 40


def test_more_rows_take_more() -> None:
    explanation = explained()
    peaks = [explanation.memory(rows).activations for rows in (8, 64, 512)]
    assert peaks == sorted(peaks)
    assert peaks[2] > 6 * peaks[1]


def test_nothing_fits() -> None:
    explanation = explained()
    one = explanation.memory(1)
    with pytest.raises(
        CannotOptimize, match=f"one row of 6 tokens takes {one.peak * GIB:,.0f} bytes, more than 0.01 GiB"
    ):
        explanation.batch_that_fits(0.01)


@pytest.mark.parametrize("rows", [0, -1, 2.5, math.nan])
def test_rows_are_positive(rows: float) -> None:
    with pytest.raises(ValueError, match=f"rows={rows} is no batch; pass a whole number"):
        explained().memory(rows)


@pytest.mark.parametrize("gibibytes", [0, -1, math.nan, math.inf])
def test_a_card_has_memory(gibibytes: float) -> None:
    with pytest.raises(ValueError, match=f"{gibibytes} GiB is no card's memory"):
        explained().batch_that_fits(gibibytes)


def test_a_batch_of_one_row_says_nothing_of_others() -> None:
    explanation = cggr.explain(Toy().train(), toy_batch(rows=1), ratio=1.0)
    assert explanation.memory().rows == 1
    with pytest.raises(CannotOptimize, match="the captured batch has one row"):
        explanation.memory(2)


def test_the_device_of_the_model_does_not_matter() -> None:
    """Providers are a CUDA device's, wherever the step was captured."""
    on_cpu = cggr.explain(Toy().train(), toy_batch(), ratio=0.5, selection="random")
    assert on_cpu.memory() == explained().memory()


def test_a_provider_of_cuda_alone_on_the_meta_device() -> None:
    """With it, the loss holds less than with the default."""
    forced = explained(loss="triton_recompute")
    assert dict(forced.program.routing.providers)["masked_loss"] == "triton_recompute"
    assert forced.memory() != explained().memory()
