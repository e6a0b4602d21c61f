"""A model that has diverged shows it: where every score is NaN so is the loss, whatever selects; one bad row is
counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import plans
import pytest
import torch
from architectures import token_batch
from cggr_compile.kernels.reference import selection
from torch import Tensor, nn

from cggr_compile.ir.program import Program

BATCH = token_batch(8, 10)
RULES = ("topk", "random", "trimmed", "stratified", "importance")


@pytest.fixture
def diverged(llama: tuple[nn.Module, Program]) -> Iterator[tuple[nn.Module, Program]]:
    """With a NaN in the final norm, through which every logit goes."""
    weight = llama[0].model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
    yield llama
    with torch.no_grad():
        weight.copy_(before)


def positive_only(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A user's rule that leaves everything out that has no positive score."""
    index, _ = selection.topk(scores, valid, k)
    return index, (scores[index] > 0).float()


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        *({"selection": rule} for rule in RULES),
        *({"selection": rule, "route": "loss"} for rule in RULES),
        *({"selection": rule, "route": ("sequence", "loss")} for rule in RULES),
        *({"selection": rule, "route": ("token", "loss")} for rule in RULES[:3]),
        {"selection": positive_only},
        {"selection": "topk", "route": "token"},
        {"selection": "topk", "kernels": {"select": "triton"}},
        {"selection": "trimmed", "kernels": {"select": "triton"}, "route": "loss"},
        {"selection": "topk", "router_head": "sampled", "router_head_frequent": 8, "router_head_sampled": 8},
    ],
)
def test_the_loss_and_the_gradients_are_nan_as_eagers(
    diverged: tuple[nn.Module, Program], options: dict[str, Any]
) -> None:
    expected = oracle.step(diverged[0], BATCH)
    routed = plans.Routed(*diverged, ratio=0.5, seed=0, **options)
    loss, gradients = routed.step(BATCH)
    assert loss.isnan()
    for name, gradient in expected[1].items():
        assert gradient is not None
        assert gradients[name].isnan().any() == gradient.isnan().any(), name


@pytest.mark.sample(1)
@pytest.mark.parametrize("selected_by", RULES[2:])
def test_rows_whose_score_is_nan_train_only_where_too_few_are_left(
    llama: tuple[nn.Module, Program], selected_by: str
) -> None:
    """One row reads a NaN, in the router and in the model."""
    model = llama[0]
    batch = {name: x.clone() for name, x in token_batch(8, 10, masked=False).items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["input_ids"][batch["input_ids"] == 7] = 8
    batch["labels"] = batch["input_ids"].clone()
    batch["input_ids"][3, 1] = 7
    routed = plans.Routed(*llama, ratio=0.875, selection=selected_by, seed=0)
    before = model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    try:
        seven = routed.step(batch)[0]
        metrics = plans.metrics(routed)
        all_rows = plans.Routed(*llama, ratio=0.95, selection=selected_by, seed=0).step(batch)[0]
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(before)
    assert routed.selected.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert seven.isfinite()
    assert metrics["rows_nan_score"] == 1
    assert metrics["score_mean"].isfinite()
    assert all_rows.isnan()
