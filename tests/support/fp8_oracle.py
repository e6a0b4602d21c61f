"""The eager oracle of `matmul="fp8"`: a model whose linear modules multiply rounded rows, by an autograd function of
its own. No graph, no operator and no helper of the compiler is used here.

Its arithmetic is what docs/kernels.md says, in fp32, so that in fp32 on the CPU a step equals it to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, K] as whole float8 numbers in fp32, and their scales [R, 1]."""
    scale = x.abs().amax(1, keepdim=True).float() / 448
    scale[scale == 0] = 1
    return (x.float() / scale).to(torch.float8_e4m3fn).float(), scale


def product(rows: Tensor, table: Tensor) -> Tensor:
    """Rows [R, K] by the rows of a table [N, K], in fp32."""
    (values, scale), (entries, scales) = rounded(rows), rounded(table)
    return values @ entries.T * scale * scales.T


class Rounding(torch.autograd.Function):
    """Y = Q(X) Q(W)ᵀ + b; dX = Q(dY) Q(Wᵀ)ᵀ, dW = dYᵀ X, db = Σ dY."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        result = product(rows, weight)
        return (result if bias is None else result + bias.float()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return product(grad, weight.T).to(rows.dtype), grad.T @ rows, of_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight, bias = (None if operand is None else operand.bfloat16() for operand in (x, weight, bias))
    with torch.autocast(device, enabled=False):
        rows = Rounding.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], -1)


class RoundedLinear(nn.Linear):
    """A linear in float8."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class RoundedConv1D(Conv1D):
    """GPT-2's linear, whose weight is transposed, in float8."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight.T, self.bias)


KINDS = {nn.Linear: RoundedLinear, Conv1D: RoundedConv1D}


def in_float8(model: nn.Module) -> nn.Module:
    """A copy whose linear modules of sizes that 16 divides are in float8, the head's not."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if type(module) in KINDS and module is not head and not any(size % 16 for size in module.weight.shape):
            module.__class__ = KINDS[type(module)]
    return model
