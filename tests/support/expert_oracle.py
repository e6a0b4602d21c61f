"""What the experts of a mixture make of tokens, pair by pair in float64, and as models write them in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.triton import experts as expert_kernels
from cggr_compile.kernels.triton import tiles
from head_oracle import DEVICE, Truth, assert_no_worse, double, shrink_tiles
from torch import Tensor

SHAPE = (300, 200, 5, 160, 3) if DEVICE.type == "cuda" else (25, 20, 3, 18, 2)
"""Tokens, width, experts, features, choices: several tiles, the last ones ragged (see `small_tiles`)."""
ACTIVATIONS = [("silu", False), ("silu_gated", False), ("silu_gated", True), ("clamped_gated", False)]
ACTIVATIONS += [("clamped_gated", True)]
LIMIT = 1.5


class Case(NamedTuple):
    """The arguments of `cggr::grouped_mlp`."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    experts: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    keep: Tensor | None
    activation: str = "silu_gated"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = LIMIT

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Copies to differentiate by, with the layout of the originals."""
        names = ("hidden", "gate_up", "down", "weights", "gate_up_bias", "down_bias")
        return {n: x.detach().requires_grad_() for n in names if (x := getattr(self, n)) is not None}


def draw(
    tokens: int = SHAPE[0],
    width: int = SHAPE[1],
    count: int = SHAPE[2],
    features: int = SHAPE[3],
    choices: int = SHAPE[4],
    dtype: torch.dtype = torch.float32,
    *,
    activation: str = "silu_gated",
    interleaved: bool = False,
    bias: bool = False,
    keep: float | None = None,
    transposed: bool = False,
    weights: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Normal operands that keep the size of what they multiply, and distinct experts of each token but for about one
    pair in eight, which has none; `keep` is the share of kept tokens. `transposed` tables lie as [E, D, 2F]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / max(by, 1) ** 0.5).to(DEVICE, dtype)

    rows = features if activation == "silu" else 2 * features
    gate_up, down = normal(count, rows, width, by=width), normal(count, width, features, by=features)
    if transposed:
        gate_up, down = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (gate_up, down))
    order = torch.rand(tokens, max(count, choices), generator=generator).argsort(-1)[:, :choices]
    nobody = torch.rand(tokens, choices, generator=generator) < 1 / 8
    experts = torch.where(nobody, count + order % 2, order % count)
    kept = None if keep is None else (torch.rand(tokens, generator=generator) < keep).to(DEVICE)
    return Case(
        normal(tokens, width),
        gate_up,
        down,
        (torch.rand(tokens, choices, generator=generator) + 0.1).to(DEVICE, weights),
        experts.to(DEVICE),
        normal(count, rows) if bias else None,
        normal(count, width) if bias else None,
        kept,
        activation,
        interleaved,
    )


def _activated(x: Tensor, case: Case) -> Tensor:
    if case.activation == "silu":
        return F.silu(x)
    size = x.shape[-1] // 2
    gate, up = (x[..., 0::2], x[..., 1::2]) if case.interleaved else (x[..., :size], x[..., size:])
    if case.activation == "silu_gated":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=case.limit), up.clamp(-case.limit, case.limit)
    return gate * torch.sigmoid(case.alpha * gate) * (up + 1)


def by_pair(case: Case) -> Tensor:
    """The result as it is defined, one pair at a time."""
    rows = list((case.hidden * 0).unbind())
    for token, chosen in enumerate(case.experts.tolist()):
        for k, expert in enumerate(chosen):
            if (case.keep is not None and not case.keep[token]) or not 0 <= expert < len(case.down):
                continue
            x = case.gate_up[expert] @ case.hidden[token]
            x = x if case.gate_up_bias is None else x + case.gate_up_bias[expert]
            y = case.down[expert] @ _activated(x, case)
            y = y if case.down_bias is None else y + case.down_bias[expert]
            rows[token] = rows[token] + case.weights[token, k] * y
    return torch.stack(rows) if rows else case.hidden * 1


def as_models(case: Case) -> Tensor:
    """As Mixtral's module writes it: the tokens of one expert after the other, added to the result in its dtype."""
    out = torch.zeros_like(case.hidden)
    for expert in range(len(case.down)):
        chosen = case.experts == expert
        token, k = torch.where(chosen if case.keep is None else chosen & case.keep[:, None])
        x = F.linear(case.hidden[token], case.gate_up[expert])
        x = x if case.gate_up_bias is None else x + case.gate_up_bias[expert]
        y = F.linear(_activated(x, case), case.down[expert])
        y = y if case.down_bias is None else y + case.down_bias[expert]
        out = out.index_add(0, token, (y * case.weights[token, k, None]).to(out.dtype))
    return out


def step(function: Callable[[Case], Tensor], case: Case, grad: Tensor) -> dict[str, Tensor]:
    """The result and its gradients by every leaf, by name."""
    leaves = case.leaves
    out = function(case._replace(**leaves))
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def check(function: Callable[..., Tensor], case: Case, roundings: int = 0) -> dict[str, Tensor]:
    """`function`'s result and gradients are no worse than plain torch's in the same dtype; gives them."""
    grad = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(1)).to(case.hidden.dtype)
    found = step(lambda case: function(*case), case, grad.to(DEVICE))
    same_dtype = step(as_models, case, grad.to(DEVICE))
    tensors = {n: x for n, x in case._asdict().items() if isinstance(x, Tensor)}
    wide = {n: double(x) if x.is_floating_point() else x.cpu() for n, x in tensors.items()}
    values = step(by_pair, case._replace(**wide), grad)
    largest = {name: torch.full_like(x, x.abs().max().item() if x.numel() else 0.0) for name, x in values.items()}
    assert_no_worse(found, same_dtype, Truth(values, largest, largest), roundings)
    return found


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """`shrink_tiles` for every test of a module that imports it."""
    shrink_tiles(monkeypatch)
    if DEVICE.type != "cuda":
        monkeypatch.setattr(expert_kernels, "GROUP", 2)
        monkeypatch.setattr(tiles, "processors", lambda device: 2)  # what the interpreter takes time for is programs


def poisoned(case: Case, **changes: Any) -> Case:
    """The case with infinite numbers in the tokens that are not kept."""
    assert case.keep is not None
    return case._replace(hidden=case.hidden.masked_fill(~case.keep[:, None], float("inf")), **changes)
