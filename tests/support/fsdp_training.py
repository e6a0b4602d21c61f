"""Training by AdamW on ranks that shard a model by FSDP2, and its checkpoints on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_models import assert_step_on_rows, mean_over_ranks, routed, rows_for, shard, whole_parameters
from small import small
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import cggr_compile as cggr


class Run:
    """AdamW on a routed model, two micro-batches a step, clipped."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = adamw(model)
        self.rows: list[Tensor] = []
        cggr.attach(model, self.optimizer)

    def step(self, number: int) -> None:
        self.rows = []
        for micro in range(2):
            self.model.set_requires_gradient_sync(micro == 1)
            (self.model(**micro_batch(number, micro)).loss / 2).backward()
            self.rows.append(self.model.cggr.selected)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        assert all(isinstance(tensor, DTensor) for tensor in model.values())
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        return self.model.cggr.state_dict()

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.model.cggr.load_state_dict(state)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """With an epsilon far above rounding: the keys' bias has a gradient of nothing else, which AdamW would follow."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def micro_batch(number: int, micro: int) -> dict[str, Tensor]:
    return rows_for(100 * number + 10 * micro + dist.get_rank())


def training(folder: Path) -> None:
    """Five steps are those of an eager model that every rank has whole; a run resumed at the third is the same bit for
    bit."""
    eager = small()
    run = Run(routed(shard(small())))
    optimizer = adamw(eager)
    saved: dict[str, Any] = {}
    for number in range(5):
        if number == 3:
            saved = run.save(folder / "two")
            if dist.get_rank() == 0:
                torch.save(saved, folder / "handle.pt")
        run.step(number)
        eager.zero_grad()
        for micro, rows in enumerate(run.rows):
            (eager(**oracle.rows_of(micro_batch(number, micro), rows)).loss / 2).backward()
        mean_over_ranks(oracle.gradients(eager))
        nn.utils.clip_grad_norm_(eager.parameters(), 0.3)
        optimizer.step()
        for name, parameter in whole_parameters(run.model).items():
            torch.testing.assert_close(parameter, eager.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    again = Run(routed(shard(small())))
    again.load(folder / "two", saved)
    for number in range(3, 5):
        again.step(number)
    for (name, one), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local()), name


def on_one_rank(folder: Path) -> None:
    """What two ranks saved, one rank loads; its next step is eager's; it saves for two again."""
    run, eager = Run(routed(shard(small()))), small()
    run.load(folder / "two", torch.load(folder / "handle.pt"))
    eager.load_state_dict(whole_parameters(run.model))
    assert_step_on_rows(run.model, eager, micro_batch(3, 0))
    run.save(folder / "one")


def on_two_ranks_again(folder: Path) -> None:
    """What one rank saved is on two ranks what these had saved, parameters and the optimiser's state."""
    direct, by_way_of_one = (Run(routed(shard(small()))) for _ in range(2))
    for run, saved in ((direct, "two"), (by_way_of_one, "one")):
        run.load(folder / saved, torch.load(folder / "handle.pt"))
    for one, other in zip(direct.model.parameters(), by_way_of_one.model.parameters(), strict=True):
        states = (each.optimizer.state[parameter] for each, parameter in ((direct, one), (by_way_of_one, other)))
        assert torch.equal(one.to_local(), other.to_local())
        for left, right in zip(*(state.values() for state in states), strict=True):
            assert torch.equal(*(x.to_local() if isinstance(x, DTensor) else x for x in (left, right)))
