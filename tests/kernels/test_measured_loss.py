"""`cggr::measured_loss`: the loss is `masked_loss`'s to the bit, the figures are those of the logits in float64.

The reference, and the Triton algorithms: under Triton's interpreter on the CPU, compiled on CUDA.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cggr_compile.kernels.op.masked_loss import measured_loss
from cggr_compile.kernels.providers import choose
from cggr_compile.kernels.reference.rows import LossArguments
from head_oracle import (
    DEVICE,
    IGNORED,
    SHAPE,
    Case,
    double,
    draw,
    small_tiles,  # noqa: F401  a fixture
    step,
)
from torch import Tensor
from torch.library import opcheck

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

PROVIDERS = ["reference", "triton_one_pass", "triton_recompute"]
by_each = pytest.mark.parametrize("provider", PROVIDERS)


def measured(provider: str, case: Case, figures: bool = True, **options: Any) -> tuple[Tensor, ...]:
    found = choose("measured_loss", DEVICE, case.hidden.dtype, provider).implementation
    leaves = {**case._asdict(), **case.leaves}  # one pass is for training
    return found(*LossArguments(**leaves, **options), figures)


def figures(provider: str, case: Case, **options: Any) -> Tensor:
    return measured(provider, case, **options)[2]


def truth(case: Case, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    hidden, target = double(case.hidden), case.target.cpu()
    if case.rows is not None:
        hidden, target = hidden[case.rows.cpu()], target[case.rows.cpu()]
    hidden, target = hidden[target != IGNORED], target[target != IGNORED]
    x = hidden @ double(case.weight).T + (0 if case.bias is None else double(case.bias))
    x = x * scale if softcap == 0 else softcap * torch.tanh(x * scale / softcap)
    entropy = torch.distributions.Categorical(logits=x).entropy()
    hits = x.gather(1, target.unsqueeze(1)).squeeze(1) == x.amax(1)
    return torch.stack([torch.tensor(float(len(target))), entropy.sum(), hits.sum()])


def often_right(case: Case) -> Case:
    """The case with the likeliest class as every second counted label."""
    best = (double(case.hidden) @ double(case.weight).T + double(case.bias)).argmax(1).to(DEVICE)
    every_second = torch.arange(len(best), device=DEVICE) % 2 == 0
    return case._replace(target=torch.where(every_second & (case.target != IGNORED), best, case.target))


@by_each
def test_the_figures_are_those_of_the_logits(provider: str) -> None:
    """Of selected rows, some twice and some ignored; their weights do not matter."""
    case = often_right(draw(*SHAPE, weighted=True))
    rows = torch.arange(0, 2 * len(case.target), 3, device=DEVICE) % len(case.target)
    case = case._replace(rows=rows, row_weight=torch.rand(len(rows), device=DEVICE))
    for options in ({}, {"scale": 2.0, "softcap": 5.0}):
        expected = truth(case, **options)
        assert 0 < expected[2] < expected[0]
        found = figures(provider, case, **options).cpu().double()
        assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0.0)


@by_each
@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_rows_far_from_their_label_are_measured_as_well(provider: str, level: float) -> None:
    """The exponentials by the label's logit overflow, or all others vanish."""
    case = draw(*SHAPE, ignored=0.0)
    shifted = torch.zeros_like(case.bias)
    shifted[3] = level
    case = case._replace(bias=case.bias + shifted, target=torch.full_like(case.target, 3))
    expected = truth(case)
    found = figures(provider, case).cpu().double()
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert expected[2] == (len(case.target) if level > 0 else 0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-12)


@by_each
def test_classes_that_cannot_be_and_diverged_rows(provider: str) -> None:
    case = draw(5, 9, 19, ignored=0.0)
    bias = case.bias.clone()
    bias[::2] = -math.inf
    case = case._replace(bias=bias, target=torch.ones_like(case.target))
    torch.testing.assert_close(figures(provider, case).cpu().double(), truth(case), rtol=1e-5, atol=0.0)
    hidden = case.hidden.clone()
    hidden[2] = math.nan
    assert figures(provider, case._replace(hidden=hidden))[1].isnan()


@by_each
def test_nothing_counted_is_nothing_measured(provider: str) -> None:
    case = draw(6, 9, 19)
    ignored = case._replace(target=torch.full_like(case.target, IGNORED))
    none = case._replace(rows=case.target.new_empty(0))
    assert figures(provider, ignored).tolist() == figures(provider, none).tolist() == [0, 0, 0]


@by_each
def test_loss_and_gradients_are_those_of_masked_loss_to_the_bit(provider: str) -> None:
    case = draw(*SHAPE, weighted=True)
    alone = choose("masked_loss", DEVICE, torch.float32, provider).implementation
    both = choose("measured_loss", DEVICE, torch.float32, provider).implementation

    def loss(*args: Any, **options: Any) -> Tensor:
        return both(*LossArguments(*args, **options), False)[0]

    found, expected = (step(f, case, 0.3, reduction="sum") for f in (loss, alone))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@by_each
def test_what_each_row_adds(provider: str) -> None:
    """In the order of the rows that were selected, unweighted, 0 where the label is ignored; the same with figures."""
    case = draw(*SHAPE, weighted=True)
    rows = torch.arange(0, 2 * len(case.target), 3, device=DEVICE) % len(case.target)
    case = case._replace(rows=rows, row_weight=torch.rand(len(rows), device=DEVICE))
    loss, found, none = measured(provider, case, figures=False, reduction="sum")
    x = double(case.hidden)[rows.cpu()] @ double(case.weight).T + double(case.bias)
    target = case.target[rows].cpu()
    assert (target == IGNORED).any()
    expected = torch.nn.functional.cross_entropy(x, target, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.dot(found, case.row_weight), loss, rtol=1e-5, atol=0.0)
    assert none.shape == (0,)
    assert not found.requires_grad
    assert torch.equal(measured(provider, case)[1], found)


def test_the_operators_are_registered_right() -> None:
    case = draw(7, 5, 11, weighted=True)
    leaves = {**case._asdict(), **case.leaves}
    for wanted in (False, True):
        opcheck(measured_loss, (*LossArguments(**leaves), wanted))
    for algorithm in ("one_pass", "recompute"):
        loss = LossArguments(**leaves)
        opcheck(torch.ops.cggr_triton.masked_loss.default, (*loss, [True, True, True], algorithm, True, True))
