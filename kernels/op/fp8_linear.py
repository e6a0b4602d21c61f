"""The operator `cggr::fp8_linear`: the products of the router's body in float8_e4m3fn, one scale a row of each operand.

Rows are quantised as for the fp8 head (`router_heads.quantize_rows`). Semantics and providers are plain torch, which
compilers see through, so that a row is quantised where it is computed; the operator is registered as the others are
(`ops`): schema, checks that name the argument, fake, no gradient, and autocast as part of the dispatch. The functions
follow autocast too, for where they stand in the operator's place: they cast the operands before these are quantised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cggr_compile.kernels.op.checks import (
    check_dtype,
    check_shape,
    no_gradient,
    no_gradient_backward,
    register_autocast,
)
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import router_heads
from torch import Tensor

MULTIPLE = 16
"""What the sizes of a product must be multiples of for `scaled_mm`: tensor cores take float8 by as many at a time."""

_OPERANDS = 3  # input, weight, bias


def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(input, weight, bias)` of rows quantised by `quantize_rows`, without a gradient.

    `input` [..., D], `weight` [O, D] and `bias` [O] give [..., O] in the dtype that the linear has, the input's or
    autocast's. Products are summed in fp32, multiplied by both scales, and the bias is added in fp32; here by casting
    the float8 values back, so that it runs on every device. A NaN or an infinity makes its row NaN.
    """
    input, weight, bias = _as_autocast(input, weight, bias)
    values, scale = router_heads.quantize_rows(input.reshape(-1, input.shape[-1]))
    weight_values, weight_scale = router_heads.quantize_rows(weight)
    with router_heads.without_autocast(input):
        result = F.linear(values.float(), weight_values.float()) * scale.unsqueeze(1) * weight_scale
    result = result if bias is None else result + bias.float()
    return result.to(input.dtype).view(*input.shape[:-1], weight.shape[0])


def scaled_mm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear` by `torch._scaled_mm`, on CUDA for operands in bfloat16 whose D and O are multiples of MULTIPLE.

    Scales and bias are applied to the sums before these are rounded to the result's dtype. The sums are the tensor
    cores' own (`use_fast_accum`), which keep fewer bits than fp32.
    """
    input, weight, bias = _as_autocast(input, weight, bias)
    values, scale = router_heads.quantize_rows(input.reshape(-1, input.shape[-1]))
    weight_values, weight_scale = router_heads.quantize_rows(weight)
    result = torch._scaled_mm(
        values.contiguous(),
        weight_values.contiguous().t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=input.dtype,
        use_fast_accum=True,
    )
    return result.view(*input.shape[:-1], weight.shape[0])


def _as_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast casts a linear's, without gradients."""
    device_type = input.device.type
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

    def operand(x: Tensor) -> Tensor:
        cast = enabled and x.is_floating_point() and x.dtype != torch.float64
        return (x.to(torch.get_autocast_dtype(device_type)) if cast else x).detach()

    return operand(input), operand(weight), None if bias is None else operand(bias)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    torch._check_value(
        weight.dim() == 2 and weight.shape[1] > 0,
        lambda: f"cggr::fp8_linear: weight has shape {tuple(weight.shape)}, expected [O, D] with D of at least 1",
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
    """`fp8_linear`, not differentiable; ValueError or TypeError by argument."""
    _check(input, weight, bias)
    return fp8_linear(input, weight, bias)


@fp8_linear_op.register_fake
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(input, weight, bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


fp8_linear_op.register_autograd(no_gradient_backward, setup_context=no_gradient)
register_autocast(fp8_linear_op._opoverload, _OPERANDS)
