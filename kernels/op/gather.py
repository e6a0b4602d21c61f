"""`cggr::gather`: entries along a dimension, and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def _check_gather(x: Tensor, index: Tensor, dim: int) -> None:
    torch._check_value(
        -x.dim() <= dim < x.dim(),
        lambda: f"cggr::gather: dim is {dim}, out of range for x of shape {tuple(x.shape)}",
    )
    check_shape("gather", "index", index, (index.numel(),), "[k]")
    check_dtype("gather", "index", index, (torch.int64, torch.int32))


def define_gather(
    namespace: str,
    implementation: Callable[[Tensor, Tensor, int], Tensor],
    gradient: Callable[[Tensor, Tensor, int, int], Tensor],
) -> CustomOpDef:
    """The operator `gather` of a namespace: slices `index` [k] of `x` along `dim`; gradients of repeated slices add up.

    `gradient(grad, index, dim, size)` is that of x, whose dimension `dim` has `size` slices; it is an operator too.
    """

    @operator(f"{namespace}::gather")
    def op(x: Tensor, index: Tensor, dim: int) -> Tensor:
        _check_gather(x, index, dim)
        return implementation(x, index, dim)

    @op.register_fake
    def fake(x: Tensor, index: Tensor, dim: int) -> Tensor:
        _check_gather(x, index, dim)
        shape = list(x.shape)
        shape[dim] = index.shape[0]
        return x.new_empty(shape)

    @operator(f"{namespace}::gather_backward")
    def backward_op(grad: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
        return gradient(grad, index, dim, size)

    @backward_op.register_fake
    def backward_fake(grad: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
        shape = list(grad.shape)
        shape[dim] = size
        return grad.new_empty(shape)

    def context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, ctx.dim = inputs
        ctx.size = x.shape[ctx.dim]
        ctx.save_for_backward(index)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return backward_op(grad, *ctx.saved_tensors, ctx.dim, ctx.size), None, None

    def backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, ctx.dim, _ = inputs
        ctx.save_for_backward(index)

    def backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return op(grad, *ctx.saved_tensors, ctx.dim), None, None, None

    op.register_autograd(backward, setup_context=context)
    backward_op.register_autograd(backward_of_backward, setup_context=backward_context)
    return op


def _reference_gather_backward(grad: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    shape = list(grad.shape)
    shape[dim] = size
    return grad.new_zeros(shape).index_add(dim, index, grad)


gather = define_gather("cggr", reference.gather, _reference_gather_backward)
