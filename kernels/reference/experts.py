"""What `cggr::grouped_mlp` means, in plain torch: an MLP of each token's chosen experts, added up by their weights.

The arguments and their order are those of transformers' experts (`transformers/integrations/moe.py`); the clamped gate
is GPT-OSS's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DIFFERENTIABLE = ("hidden", "gate_up", "down", "weights", "gate_up_bias", "down_bias")
ACTIVATIONS = ("silu", "silu_gated", "clamped_gated")


class ExpertArguments(NamedTuple):
    """Arguments of `grouped_mlp`; E experts of width F, K of them for each of T tokens.

    Attributes:
        hidden: the tokens [T, D], floating.
        gate_up: the first products' tables [E, 2F, D], or [E, F, D] without a gate, of any strides, hidden's dtype.
        down: the second products' tables [E, D, F], likewise.
        weights: what each expert's result counts [T, K], floating.
        experts: the chosen experts [T, K], int64. A pair (t, k) whose expert is outside [0, E) is dropped.
        gate_up_bias: [E, 2F] or [E, F], added to the first products; None adds nothing.
        down_bias: [E, D], added to the second products before they are weighed.
        keep: bool [T]; a token without it has its pairs dropped: its result is 0. None keeps all.
        activation: of ACTIVATIONS: "silu" of the first products; "silu_gated": silu(gate) · up; "clamped_gated": with
            gate at most `limit` and up within ± `limit`, gate · sigmoid(alpha · gate) · (up + 1).
        interleaved: gates are the rows 0, 2, 4, ... of gate_up and ups the others, instead of the first and second F.
    """

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    experts: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    keep: Tensor | None = None
    activation: str = "silu_gated"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0


def dropped(arguments: ExpertArguments) -> Tensor:
    """Which pairs count nothing, bool [T, K]."""
    experts, keep = arguments.experts, arguments.keep
    outside = (experts < 0) | (experts >= arguments.gate_up.shape[0])
    return outside if keep is None else outside | ~keep.unsqueeze(-1)


def activated(products: Tensor, arguments: ExpertArguments) -> Tensor:
    """The activation of the first products [..., 2F] or [..., F]: [..., F]."""
    if arguments.activation == "silu":
        return F.silu(products)
    if arguments.interleaved:
        gate, up = products[..., ::2], products[..., 1::2]
    else:
        gate, up = products.chunk(2, dim=-1)
    if arguments.activation == "silu_gated":
        return F.silu(gate) * up
    limit = arguments.limit
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * arguments.alpha))


def grouped_mlp(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    keep: Tensor | None = None,
    activation: str = "silu_gated",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Σ_k weights[t, k] · (down[e] @ act(gate_up[e] @ hidden[t] + gate_up_bias[e]) + down_bias[e]), e = experts[t, k],
    over the pairs that are not dropped: [T, D] in hidden's dtype.

    Products are rounded to hidden's dtype; results are weighed and added up in fp32, in the order of the experts. Every
    expert runs on every token, so that no size depends on data.
    """
    arguments = ExpertArguments(
        hidden, gate_up, down, weights, experts, gate_up_bias, down_bias, keep, activation, interleaved, alpha, limit
    )
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weights.dtype), torch.float32)
    total = hidden.new_zeros(hidden.shape, dtype=wide)
    experts = experts.masked_fill(dropped(arguments), -1)
    for expert in range(gate_up.shape[0]):
        chosen = experts == expert
        own = chosen.any(-1, keepdim=True)
        # What an expert would make of the tokens of others may be infinite, and 0 times that no number.
        products = F.linear(torch.where(own, hidden, 0), gate_up[expert])
        products = products if gate_up_bias is None else products + gate_up_bias[expert]
        result = F.linear(activated(products, arguments), down[expert])
        result = result if down_bias is None else result + down_bias[expert]
        weight = torch.where(chosen, weights, 0).to(wide).sum(-1, keepdim=True)
        total = total + torch.where(own, result.to(wide) * weight, 0)
    return total.to(hidden.dtype)


def grouped_mlp_backward(grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments) -> list[Tensor]:
    """The gradients of the wanted of DIFFERENTIABLE, in order, for the result's gradient [T, D]."""
    leaves = {
        name: getattr(arguments, name).detach().requires_grad_()
        for name, want in zip(DIFFERENTIABLE, wanted, strict=True)
        if want and getattr(arguments, name) is not None
    }
    if not leaves:
        return []
    with torch.enable_grad():
        result = grouped_mlp(*arguments._replace(**leaves))
    found = torch.autograd.grad(result, list(leaves.values()), grad, allow_unused=True, materialize_grads=True)
    return [gradient.contiguous() for gradient in found]
