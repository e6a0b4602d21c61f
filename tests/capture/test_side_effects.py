"""What a forward leaves behind besides its outputs: stored values are those of the selected rows; assertions hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build, token_batch
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.run.not_computed import NOT_COMPUTED


class Kept:
    def __init__(self, deviation: torch.Tensor, mean: torch.Tensor) -> None:
        self.deviation, self.mean = deviation, mean


class Remembering(Toy):
    """Stores what it computes: in an attribute, a list, a dict, and an object in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[torch.Tensor] = []
        self.stages: dict[str, torch.Tensor] = {}
        self.last: torch.Tensor | None = None
        self.kept: Any = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        self.last = hidden
        self.history.append(hidden.sum(1))
        self.stages["norm"] = logits.norm(dim=-1)
        self.kept = Kept(hidden.std(-1), hidden.mean())
        return logits

    def remembered(self) -> dict[str, torch.Tensor]:
        assert self.last is not None
        return {"last": self.last, "history": self.history[-1], **self.stages, **vars(self.kept)}


@pytest.mark.parametrize("front_end", ["optimize", "torch.compile"])
def test_stored_values_are_those_of_the_selected_rows(front_end: str) -> None:
    torch.manual_seed(0)
    eager = Remembering().train()
    model = copy.deepcopy(eager)
    if front_end == "optimize":
        routed = cggr.optimize(model, ratio=0.5, inner="eager")
    else:
        routed = torch.compile(model, backend="cggr", options={"ratio": 0.5, "inner": "eager"})
    batch = toy_batch()
    output = routed(**batch)
    rows = cggr.handle(routed).selected
    assert output[1] is NOT_COMPUTED
    eager(batch["input_ids"][rows], batch["labels"][rows])
    for name, wanted in eager.remembered().items():
        assert torch.equal(model.remembered()[name], wanted), name


def test_what_is_only_returned_is_not_kept() -> None:
    """Logits of every row would not fit into memory; transformers returns them in an object."""
    model = cggr.optimize(build("llama"), ratio=0.5, inner="eager")
    assert model(**token_batch()).logits is NOT_COMPUTED


class Checking(Toy):
    """Asserts something of the numbers in its batch."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        torch._check(hidden.abs().sum().item() < 1e6, lambda: "too large")
        return super().middle(hidden)


def test_assertions_about_data_hold_in_a_routed_step() -> None:
    model = cggr.optimize(Checking().train(), ratio=0.5, inner="eager")
    model(**toy_batch())
    with torch.no_grad():
        model.embed.weight.fill_(1e6)
    with pytest.raises(RuntimeError, match=r"too large|Runtime assertion failed"):  # the latter is torch 2.11's
        model(**toy_batch())
