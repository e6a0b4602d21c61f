"""The operator `cggr::fp8_linear`: products with weights in float8_e4m3fn, one scale a row of each operand.

Rows are quantised as for the fp8 head (`router_heads.quantize_rows`). With Q(A) the rows of A so rounded,

    Y = Q(X) Q(W)ᵀ + b,    dX = Q(dY) Q(Wᵀ)ᵀ,    dW = dYᵀ X,    db = Σ dY,

so the gradient of the input is a product of the same kind, whose rows are those of dY and the columns of W, and that of
the weight one of the unrounded operands in their own dtype: it is what the optimiser adds up. Gradients pass through
the rounding as they are. Only those that are wanted are computed, and they have no derivative of their own.

Semantics and providers are plain torch, which compilers see through, so that a row is quantised where it is computed;
the operator is registered as the others are (`ops`): schema, checks that name the argument, fake, autograd, and
autocast as part of the dispatch. The functions follow autocast too, for where they stand in the operator's place: they
cast the operands before these are quantised, by nodes that cast the gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cggr_compile.kernels.op.checks import check_dtype, check_shape, register_autocast
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import router_heads
from torch import Tensor
from torch.autograd.function import once_differentiable

MULTIPLE = 16
"""What D and O must be multiples of for `scaled_mm`: tensor cores take float8 by as many at a time. Each is the length
of the rows of one of the two products; how many rows the input has is free."""

_OPERANDS = 3  # input, weight, bias

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""Of rows [R, K], a table [N, K] and a bias [N] of one dtype: [R, N] in that dtype, operands in float8."""


def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(input, weight, bias)` of rows quantised by `quantize_rows`, differentiable once.

    `input` [..., D], `weight` [O, D] and `bias` [O] give [..., O] in the dtype that the linear has, the input's or
    autocast's; gradients have the dtypes of their operands. Products are summed in fp32, multiplied by both scales, and
    the bias is added in fp32; here by casting the float8 values back, so that it runs on every device. A NaN or an
    infinity makes its row NaN.
    """
    return _Linear.apply(*_as_autocast(input, weight, bias), _cast_back)


def scaled_mm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear` by `torch._scaled_mm`, on CUDA for operands in bfloat16 whose D and O are multiples of MULTIPLE.

    Scales and bias are applied to the sums before these are rounded to the result's dtype. The sums are the tensor
    cores' own (`use_fast_accum`), which keep fewer bits than fp32.
    """
    return _Linear.apply(*_as_autocast(input, weight, bias), _multiplied)


def _cast_back(rows: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    values, scale = router_heads.quantize_rows(rows)
    table_values, table_scale = router_heads.quantize_rows(table)
    result = F.linear(values.float(), table_values.float()) * scale.unsqueeze(1) * table_scale
    result = result if bias is None else result + bias.float()
    return result.to(rows.dtype)


def _multiplied(rows: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    values, scale = router_heads.quantize_rows(rows)
    table_values, table_scale = router_heads.quantize_rows(table)
    return torch._scaled_mm(
        values.contiguous(),
        table_values.contiguous().t(),
        scale_a=scale.unsqueeze(1),
        scale_b=table_scale.unsqueeze(0),
        bias=bias,
        out_dtype=rows.dtype,
        use_fast_accum=True,
    )


class _Linear(torch.autograd.Function):
    """The linear and its gradients by one `Product`, for operands that autocast has cast."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, product: Product = _cast_back) -> Tensor:
        with router_heads.without_autocast(input):
            result = product(input.reshape(-1, input.shape[-1]), weight, bias)
        return result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.product = inputs[3] if len(inputs) > _OPERANDS else _cast_back  # the operator's is the reference

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        # The dispatcher drops trailing arguments equal to their defaults: these have no place.
        wanted = (*ctx.needs_input_grad, False)
        rows = grad.reshape(-1, grad.shape[-1])
        with router_heads.without_autocast(grad):
            of_input = ctx.product(rows, weight.t(), None).view(input.shape) if wanted[0] else None
            of_weight = rows.t() @ input.reshape(-1, input.shape[-1]) if wanted[1] else None
            of_bias = rows.sum(0) if wanted[2] else None
        return (of_input, of_weight, of_bias, None)[: len(ctx.needs_input_grad)]


def _as_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast casts a linear's."""
    device_type = input.device.type
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

    def operand(x: Tensor) -> Tensor:
        cast = enabled and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device_type)) if cast else x

    return operand(input), operand(weight), None if bias is None else operand(bias)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    torch._check_value(
        weight.dim() == 2 and min(weight.shape) > 0,
        lambda: f"cggr::fp8_linear: weight has shape {tuple(weight.shape)}, expected [O, D] of at least 1 each",
    )
    torch._check_value(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        lambda: f"cggr::fp8_linear: input has shape {tuple(input.shape)}, expected [..., D] with D = {weight.shape[1]}",
    )
    torch._check_type(
        input.is_floating_point(), lambda: f"cggr::fp8_linear: input is {input.dtype}, expected a floating dtype"
    )
    check_dtype("fp8_linear", "weight", weight, (input.dtype,))
    if bias is not None:
        check_shape("fp8_linear", "bias", bias, (weight.shape[0],), "[O]")
        check_dtype("fp8_linear", "bias", bias, (input.dtype,))


@operator("cggr::fp8_linear")
def fp8_linear_op(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear`; ValueError or TypeError by argument."""
    _check(input, weight, bias)
    return _Linear.forward(input, weight, bias)


@fp8_linear_op.register_fake
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


fp8_linear_op.register_autograd(_Linear.backward, setup_context=_Linear.setup_context)
register_autocast(fp8_linear_op._opoverload, _OPERANDS)
