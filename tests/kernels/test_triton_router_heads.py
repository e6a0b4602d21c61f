"""The Triton router heads against their float64 definitions."""

from __future__ import annotations

from collections.abc import Callable

import head_oracle
import pytest
import torch
from cggr_compile.kernels.providers import choose
from cggr_compile.kernels.triton import tiles
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from router_head_oracle import IGNORED, OPTIONS, fp8_truth, operands, sampled_truth
from torch import Tensor

DEVICE = head_oracle.DEVICE
QUANTITIES = ["nll", "entropy", "margin", "confidence"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    head_oracle.shrink_tiles(monkeypatch)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tiles, "QUARTER", tiles.HALF)


def on_triton(op: str) -> Callable[..., Tensor]:
    run = choose(op, DEVICE, torch.float32, "triton").implementation

    def called(*args: object) -> Tensor:
        return run(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args)).cpu().double()

    return called


@settings(max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    rows=st.integers(0, 37),
    width=st.integers(1, 35),
    classes=st.integers(1, 41),
    options=OPTIONS,
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_shape_and_option(
    rows: int, width: int, classes: int, options: tuple, with_bias: bool, seed: int, data: st.DataObject
) -> None:
    hidden, weight, bias, target = operands(rows, width, classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = hidden / width**0.5
    target[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    args = (hidden, weight, bias if with_bias else None, target)

    read = data.draw(st.integers(1, classes))
    columns, times = torch.randperm(classes, generator=generator)[:read], 3 * torch.rand(read, generator=generator)
    found = on_triton("sampled_score")(*args, columns, times, QUANTITIES[:2], *options)
    torch.testing.assert_close(found, sampled_truth(args, columns, times, options), **CLOSE)

    found = on_triton("fp8_score")(*args, QUANTITIES, *options)
    torch.testing.assert_close(found, fp8_truth(args, options), **CLOSE)


def test_an_ignored_rows_nan_stays_where_it_is() -> None:
    hidden, weight, bias, target = operands(37, 35, 41)
    expected = sampled_truth((hidden, weight, bias, target), torch.arange(41), torch.ones(41))
    hidden[5] = torch.nan
    target[5] = IGNORED
    found = on_triton("sampled_score")(hidden, weight, bias, target, torch.arange(41), torch.ones(41), QUANTITIES[:2])
    assert (found[:, 5] == 0).all()
    others = torch.arange(37) != 5
    torch.testing.assert_close(found[:, others], expected[:, others], **CLOSE)
