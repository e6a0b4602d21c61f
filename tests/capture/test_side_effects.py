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


class Counting(Toy):
    """Returns and stores numbers that it makes of sizes, and counts with them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.shape, self.lengths = 0, (), [0.0]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        loss, logits = super().forward(input_ids, labels)
        self.seen += input_ids.numel()
        self.shape = tuple(input_ids.shape)
        self.lengths.append(input_ids.shape[1] / 2)
        return {"loss": loss, "logits": logits, "tokens": input_ids.numel(), "rows": len(input_ids), "known": 3}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"ratio": 0.5, "selection": "topk"},
        {"ratio": 0.5, "selection": "random", "outline_layers": True},
        {"route": "loss", "ratio": 0.5},
        {"route": "depth", "depth_layers": 1},
        {"selection": "auto"},
    ],
    ids=str,
)
def test_numbers_made_of_sizes_are_those_of_the_rows_that_train(options: dict[str, Any], inner: str) -> None:
    eager = Counting().train()
    model = cggr.optimize(copy.deepcopy(eager), inner=inner, **options)
    for rows in (8, 8, 6, 6):
        batch = toy_batch(rows)
        found = model(**batch)
        trained = len(model.cggr.selected) if "sequence" in model.cggr.config.routes else rows
        wanted = eager(**{name: x[:trained] for name, x in batch.items()})
        for name in ("tokens", "rows", "known"):
            assert found[name] == wanted[name]
        assert (model.seen, model.shape, model.lengths) == (eager.seen, eager.shape, eager.lengths)


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
