"""A routed toy, and one step of it against eager on the selected rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from toys import Toy

import cggr_compile as cggr

OPTIONS = {"ratio": 0.5, "router_layers": 2, "inner": "eager"}


def toy(**options: object) -> Toy:
    torch.manual_seed(0)
    return cggr.optimize(Toy().train(), **{**OPTIONS, **options})


def assert_routed(model: Toy, batch: dict[str, torch.Tensor], called: Callable | None = None) -> None:
    """One step: loss and gradients are those of eager on the selected rows, of which there are half."""
    eager = copy.deepcopy(model)
    if "cggr" in vars(eager):
        eager = cggr.restore(eager)
    called = model if called is None else called
    model.zero_grad()
    loss = called(**batch)[0]
    loss.backward()
    rows = cggr.handle(called).selected
    assert len(rows) == len(batch["input_ids"]) // 2
    expected = type(eager).forward(eager, **{name: x[rows] for name, x in batch.items()})[0]
    eager.zero_grad()
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
