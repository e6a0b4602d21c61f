"""Runs rewritten plans of one capture without tracing the model again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from architectures import ARCHITECTURES, eager_of, token_batch
from oracle import gradients
from torch import nn

import cggr_compile as cggr
from cggr_compile.ir.program import Input, Program
from cggr_compile.run.metrics import metrics_of, selected
from cggr_compile.run.plan import Plan
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.step import Step


def captured(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Program:
    """The captured training step."""
    return cggr.explain(model, batch, ratio=1.0, selection="random").captured


def llama() -> tuple[nn.Module, Program]:
    """A Llama, attention written out in torch, and its captured step."""
    model = eager_of(ARCHITECTURES["llama"])
    return model, captured(model, token_batch())


class Routed:
    """One configuration of a captured step, on the model's own parameters."""

    def __init__(self, model: nn.Module, program: Program, **options: Any) -> None:
        self.model = model
        usual = {"ratio": 0.5, "inner": "eager", "router_layers": 2, "selection": "topk"}
        self.runtime = Runtime(cggr.RoutingConfig(**{**usual, **options}))
        self.runtime.belongs_to(model)
        self.plan = Plan(program, self.runtime)
        self.runtime.plans.append(self.plan)
        self.call = Step(self.plan, self.runtime)

    def step(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Loss and gradients of one step."""
        self.model.zero_grad(set_to_none=True)
        loss = self.forward(batch)[self.plan.program.loss_output]
        loss.backward()
        return loss.detach(), gradients(self.model)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the captured graph puts out in one step."""
        batch_size, length = batch["input_ids"].shape
        named = {"batch": batch_size, "sequence": length}
        state = {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}
        values = {"size": named, "state": state, "batch": batch}
        inputs = [self._input(entry, values.get(entry.kind, {})) for entry in self.plan.captured.inputs]
        return self.call(*inputs)

    def _input(self, entry: Input, values: Mapping[str, Any]) -> Any:
        if entry.path in values:
            return values[entry.path]
        # Where models differ in a number that their code reads (an epsilon), Dynamo makes an input of it.
        return torch.tensor(attrgetter(entry.path)(self.model), dtype=torch.float64)

    def at(self, ratio: float) -> Routed:
        """The same plan at another ratio, which is an input of the graph."""
        self.runtime.config = dataclasses.replace(self.runtime.config, ratio=ratio)
        return self

    @property
    def selected(self) -> Any:
        """As `model.cggr.selected`."""
        return selected(self.runtime.config.routes, self.runtime.last)


def metrics(routed: Routed) -> dict[str, torch.Tensor]:
    """As `model.cggr.metrics()`, without what follows the loop."""
    return metrics_of(routed.runtime.last, None)
