"""The eager oracle of the token route: no graph, no operator and no helper of the compiler is used here.

The middle layers of a copy of the model are wrapped: each takes the hidden states and everything else that it is given
per token at chosen positions, runs as it is, and puts the result back. What is per token is known by the argument's
name.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import oracle
import torch
from architectures import Architecture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def take(x: torch.Tensor, positions: torch.Tensor, *dims: int) -> torch.Tensor:
    """`x` [B or 1, ...] at each sequence's positions [B, k] along `dims`."""
    batch, kept = positions.shape
    x = x.expand(batch, *x.shape[1:])
    for dim in dims:
        shape = [1] * x.dim()
        shape[0], shape[dim] = batch, kept
        x = torch.take_along_dim(x, positions.view(shape), dim)
    return x


def put(x: torch.Tensor, part: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`x` [B, S, ...] with the tokens at `positions` [B, k] replaced by `part` [B, k, ...]."""
    rows = torch.arange(len(x)).unsqueeze(1)
    return x.index_put((rows, positions), part)


def _of_tokens(name: str, argument: Any, positions: torch.Tensor) -> Any:
    """One argument of a layer, at the positions."""
    if isinstance(argument, (tuple, list)):
        return type(argument)(_of_tokens(name, item, positions) for item in argument)
    if not isinstance(argument, torch.Tensor):
        return argument
    if name in ("attention_mask", "causal_mask"):
        return take(argument, positions, 1) if argument.dim() == 2 else take(argument, positions, 2, 3)
    if name == "alibi":  # [B · heads, 1, S], the batch outermost
        folded = argument.view(len(positions), -1, *argument.shape[1:])
        return take(folded, positions, 3).flatten(0, 1)
    if name in ("position_embeddings", "position_ids"):
        return take(argument, positions, 1)
    raise AssertionError(f"the oracle does not know how the argument {name!r} holds tokens")


class Shortened(nn.Module):
    """A layer that runs on some positions only."""

    def __init__(self, layer: nn.Module, positions: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.positions = positions

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(self.layer.forward).parameters)[1:]
        positional = [_of_tokens(name, argument, self.positions) for name, argument in zip(names, args, strict=False)]
        named = {name: _of_tokens(name, argument, self.positions) for name, argument in kwargs.items()}
        output = self.layer(take(hidden_states, self.positions, 1), *positional, **named)
        if isinstance(output, tuple):
            return (put(hidden_states, output[0], self.positions), *output[1:])
        return put(hidden_states, output, self.positions)


def shortened(model: nn.Module, architecture: Architecture, middle: range, positions: torch.Tensor) -> nn.Module:
    """A copy whose `middle` layers run at `positions` ([B, k], or [layers, B, k], one for each)."""
    model = copy.deepcopy(model)
    layers = model.get_submodule(architecture.layers)
    for place, index in enumerate(middle):
        layers[index] = Shortened(layers[index], positions[place] if positions.dim() == 3 else positions)
    return model


def renamed(gradients: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Gradients of a shortened copy under the names of the original's parameters."""
    return {re.sub(r"(\.\d+)\.layer\.", r"\1.", name): gradient for name, gradient in gradients.items()}


def step(
    model: nn.Module,
    architecture: Architecture,
    batch: Mapping[str, torch.Tensor],
    middle: range,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of the eager model whose middle layers run at the positions.

    Router statistics of a mixture of experts are those of the kept tokens, in every layer.
    """
    short = shortened(model, architecture, middle, positions)
    namespace = vars(sys.modules[type(model).__module__])
    original: Callable | None = namespace.get("load_balancing_loss_func")
    if original is None:
        loss, gradients = oracle.step(short, batch)
        return loss, renamed(gradients)
    tokens = batch["input_ids"].shape

    def of_kept(gate_logits: tuple, num_experts: int, top_k: int, attention_mask: torch.Tensor | None = None) -> Any:
        whole = tokens.numel()
        kept = tuple(
            take(logits.view(*tokens, -1), positions, 1).flatten(0, 1) if len(logits) == whole else logits
            for logits in gate_logits
        )
        mask = None if attention_mask is None else take(attention_mask, positions, 1)
        return original(kept, num_experts, top_k, mask)

    namespace["load_balancing_loss_func"] = of_kept
    try:
        loss, gradients = oracle.step(short, batch)
    finally:
        namespace["load_balancing_loss_func"] = original
    return loss, renamed(gradients)


def skipping(model: nn.Module, architecture: Architecture, middle: range, positions: torch.Tensor) -> nn.Module:
    """A copy whose `middle` layers call their experts with the tokens at `positions` alone ([B, k], or [layers, B, k],
    one for each layer); for the others these give 0."""
    model = copy.deepcopy(model)
    layers = model.get_submodule(architecture.layers)
    for place, index in enumerate(middle):
        own = positions[place] if positions.dim() == 3 else positions
        for name, experts in layers[index].named_modules():
            if name.endswith(".experts"):
                experts.forward = partial(_of_some, experts.forward, own)
    return model


def _of_some(
    experts: Callable[..., torch.Tensor], positions: torch.Tensor, hidden: torch.Tensor, *choices: torch.Tensor
) -> torch.Tensor:
    length = len(hidden) // len(positions)
    some = (positions + length * torch.arange(len(positions)).unsqueeze(1)).flatten()
    return torch.zeros_like(hidden).index_put((some,), experts(hidden[some], *(choice[some] for choice in choices)))


class StableSorts(TorchDispatchMode):
    """While it holds, sorts keep equal entries in order: an expert's tokens, over which the gradients of its tables add
    up, are then in one order whether other tokens are sorted along or not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sort.default:
            named = dict(zip(("dim", "descending"), args[1:], strict=False))
            return torch.ops.aten.sort.stable(args[0], stable=True, **named, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def expected_positions(
    model: nn.Module,
    architecture: Architecture,
    batch: Mapping[str, torch.Tensor],
    ratio: float,
    layers: int,
    scoring: str = "loss",
) -> torch.Tensor:
    """The positions [B, k] that an eager router selects: real tokens by score, then padding, all by index on ties."""
    with torch.no_grad():
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        logits = oracle.truncated(model, architecture, layers)(**inputs).logits
    scores = oracle.token_scores(logits, batch["labels"], scoring, architecture.causal)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    kept = max(1, math.ceil(ratio * scores.shape[1] - 1e-9))
    rows = []
    for of_row, mask in zip(scores.tolist(), real.tolist(), strict=True):
        order = sorted(range(len(of_row)), key=lambda place: (-mask[place], -of_row[place] * mask[place], place))
        rows.append(sorted(order[:kept]))
    return torch.tensor(rows)
