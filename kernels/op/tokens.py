"""The operators `cggr::gather_tokens` and `cggr::scatter_tokens`: each sequence's own tokens out of a tensor, and back.

Registered as the others are (`ops`); the reference is plain torch. Positions of one sequence are distinct, so every
element of a scatter, and of the gradient of a gather, has one source: both are deterministic and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape
from cggr_compile.kernels.op.define import operator
from torch import Tensor


def gather_tokens(x: Tensor, positions: Tensor, dims: Sequence[int], lead: int = 0) -> Tensor:
    """The tokens `positions` [B, k] of `x` along each of `dims`, every sequence its own.

    `x`, of any dtype, counts as having `lead` dimensions of size 1 in front, as broadcasting would add them. The first
    dimension is then the batch, of size B or 1; the result's has size B. `dims` count in `x` and are of the
    sequence's size S; they become k. Positions (int64) of one sequence are distinct and in [0, S); the gradient of
    one that is repeated would be that of one repetition only.
    """
    x = x.reshape((1,) * lead + tuple(x.shape)) if lead else x
    x = x.expand(positions.shape[0], *x.shape[1:])
    for dim in dims:
        x = x.gather(dim + lead, _places(positions, dim + lead, x.shape))
    return x


def _places(positions: Tensor, dim: int, like: Sequence[int]) -> Tensor:
    """Positions [B, k] along dimension `dim`, the same at every place of the other dimensions: of the sizes `like`, but
    k along `dim`."""
    batch, kept = positions.shape
    shape, sizes = [1] * len(like), list(like)
    shape[0], shape[dim], sizes[dim] = batch, kept, kept
    return positions.reshape(shape).expand(sizes)


def scatter_tokens(full: Tensor, part: Tensor, positions: Tensor) -> Tensor:
    """`full` [B, S, ...] with its tokens `positions` [B, k] (int64, distinct, in [0, S)) replaced by `part` [B, k,
    ...].

    The result has the dtype of `part`.
    """
    return full.to(part.dtype).scatter(1, _places(positions, 1, part.shape), part)


def _check_positions(op: str, positions: Tensor) -> None:
    torch._check_value(
        positions.dim() == 2,
        lambda: f"cggr::{op}: positions has shape {tuple(positions.shape)}, expected [B, k]",
    )
    check_dtype(op, "positions", positions, (torch.int64,))


def _check_gather(x: Tensor, positions: Tensor, dims: Sequence[int], lead: int) -> None:
    _check_positions("gather_tokens", positions)
    torch._check_value(lead >= 0, lambda: f"cggr::gather_tokens: lead is {lead}, expected at least 0")
    torch._check_value(
        bool(dims) and all((0 if lead else 1) <= dim < x.dim() for dim in dims) and len(set(dims)) == len(dims),
        lambda: (
            f"cggr::gather_tokens: dims is {list(dims)} for x of shape {tuple(x.shape)} with lead {lead}, "
            "expected distinct dimensions behind the batch"
        ),
    )
    torch._check_value(
        all(x.shape[dim] == x.shape[dims[0]] for dim in dims),
        lambda: f"cggr::gather_tokens: dims {list(dims)} of x {tuple(x.shape)} differ in size",
    )
    if not lead and x.shape[0] != 1:
        torch._check_value(
            x.shape[0] == positions.shape[0],
            lambda: (
                f"cggr::gather_tokens: x has shape {tuple(x.shape)}, expected a first dimension of 1 or of "
                f"{positions.shape[0]} as positions"
            ),
        )


def _check_scatter(full: Tensor, part: Tensor, positions: Tensor) -> None:
    _check_positions("scatter_tokens", positions)
    torch._check_value(
        full.dim() >= 2, lambda: f"cggr::scatter_tokens: full has shape {tuple(full.shape)}, expected [B, S, ...]"
    )
    check_shape("scatter_tokens", "part", part, (*positions.shape, *full.shape[2:]), "[B, k, ...]")
    check_shape("scatter_tokens", "full", full, (positions.shape[0], *full.shape[1:]), "[B, S, ...]")


@operator("cggr::gather_tokens")
def _gather_tokens(x: Tensor, positions: Tensor, dims: Sequence[int], lead: int = 0) -> Tensor:
    _check_gather(x, positions, dims, lead)
    return gather_tokens(x, positions, dims, lead)


@_gather_tokens.register_fake
def _gather_tokens_fake(x: Tensor, positions: Tensor, dims: Sequence[int], lead: int = 0) -> Tensor:
    _check_gather(x, positions, dims, lead)
    shape = [1] * lead + list(x.shape)
    shape[0] = positions.shape[0]
    for dim in dims:
        shape[dim + lead] = positions.shape[1]
    return x.new_empty(shape)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, positions, ctx.dims, ctx.lead = inputs if len(inputs) == 4 else (*inputs, 0)
    ctx.shape = x.shape
    ctx.save_for_backward(positions)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    full = [1] * ctx.lead + list(ctx.shape)
    for dim in reversed(ctx.dims):
        dim = dim + ctx.lead
        sizes = list(grad.shape)
        sizes[dim] = full[dim]
        grad = grad.new_zeros(sizes).scatter(dim, _places(positions, dim, grad.shape), grad)
    gradient = grad.sum_to_size(full).reshape(ctx.shape)
    return (gradient, None, None, None)[: len(ctx.needs_input_grad)]


@operator("cggr::scatter_tokens")
def _scatter_tokens(full: Tensor, part: Tensor, positions: Tensor) -> Tensor:
    _check_scatter(full, part, positions)
    return scatter_tokens(full, part, positions)


@_scatter_tokens.register_fake
def _scatter_tokens_fake(full: Tensor, part: Tensor, positions: Tensor) -> Tensor:
    _check_scatter(full, part, positions)
    return part.new_empty(full.shape)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    full, _, positions = inputs
    ctx.dtype = full.dtype
    ctx.save_for_backward(positions)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (positions,) = ctx.saved_tensors
    index = _places(positions, 1, grad.shape)
    of_full = grad.scatter(1, index, 0).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    of_part = grad.gather(1, index) if ctx.needs_input_grad[1] else None
    return of_full, of_part, None


_gather_tokens.register_autograd(_gather_backward, setup_context=_gather_context)
_scatter_tokens.register_autograd(_scatter_backward, setup_context=_scatter_context)
