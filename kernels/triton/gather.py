"""`gather` and its gradient: each output element is written once, by the program that owns it.

Every tensor is seen as [outer, rows, inner] around the gathered dimension. The gradient of a gather adds up where
rows repeat; instead of scattering into shared places, a stable sort of the k indices lists for each row the places
that took it, in order, and the program of that row adds those up. Nothing is added atomically, so results are the
same each time; rows that nobody took are written as zeros by the same programs, without a pass of their own.

The gather moves elements as integers of their size, so it needs no arithmetic of a dtype. Offsets are 64 bits wide.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from cggr_compile.kernels.triton.launch import launch
from torch import Tensor

TILE = 2048
"""Elements that a program writes: one long stretch of a row or several short rows."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ACCUMULATORS = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Slices `index` [k] of `x` along `dim`, repeats included, as a contiguous tensor of `x`'s dtype.

    `x` is of any strides and any dtype of at most 8 bytes, `index` int32 or int64. Raises TypeError for a wider
    dtype; an index outside [0, x.shape[dim]) fails an assertion on the device, as in torch.
    """
    if x.element_size() not in _BITS:
        raise TypeError(f"x is {x.dtype}, expected a dtype of at most {max(_BITS)} bytes")
    dim %= x.dim()
    out = x.new_empty((*x.shape[:dim], index.numel(), *x.shape[dim + 1 :]))
    if out.numel() == 0:
        return out
    source = _around(x, dim)
    inner = source.shape[2]
    block_rows, block_inner, programs = _tiles(out.numel() // inner, inner)
    launch(
        _gather_kernel,
        programs,
        source.view(_BITS[x.element_size()]),
        index.contiguous(),
        out.view(_BITS[x.element_size()]),
        out.numel() // inner,
        source.shape[1],
        index.numel(),
        inner,
        *source.stride(),
        BLOCK_ROWS=block_rows,
        BLOCK_INNER=block_inner,
        sanitize_overflow=False,
    )
    return out


def gather_backward(grad: Tensor, index: Tensor, dim: int, size: int) -> Tensor:
    """Gradient of `gather` with respect to its `x`, whose dimension `dim` has `size` rows: contiguous, of grad's dtype.

    Row i of the result is the sum of the slices of `grad` [..., k, ...] whose entry of `index` [k] is i, added in
    order of their place in float32 (float64 for float64) and rounded once; it is zero where there is none. `grad` is
    of any strides. Raises TypeError where `grad` is not of a floating dtype of 16 bits or more.
    """
    if grad.dtype not in _ACCUMULATORS:
        raise TypeError(f"grad is {grad.dtype}, expected one of {list(_ACCUMULATORS)}")
    dim %= grad.dim()
    out = grad.new_empty((*grad.shape[:dim], size, *grad.shape[dim + 1 :]))
    if out.numel() == 0:
        return out
    if index.numel() == 0:
        return out.zero_()
    source = _around(grad, dim)
    inner = source.shape[2]
    rows, place = index.sort(stable=True)
    # Row i was taken by the places place[bound[i]:bound[i + 1]].
    bound = torch.searchsorted(rows, torch.arange(size + 1, dtype=rows.dtype, device=rows.device))
    block_rows, block_inner, programs = _tiles(out.numel() // inner, inner)
    launch(
        _gather_backward_kernel,
        programs,
        source,
        place,
        bound,
        out,
        out.numel() // inner,
        size,
        inner,
        *source.stride(),
        ACCUMULATOR=_ACCUMULATORS[grad.dtype],
        BLOCK_ROWS=block_rows,
        BLOCK_INNER=block_inner,
    )
    return out


def _around(x: Tensor, dim: int) -> Tensor:
    # A view where the strides allow it, such as a transposition of two blocks of dimensions, else a copy.
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


def _tiles(rows: int, inner: int) -> tuple[int, int, int]:
    """Block sizes over rows and within one, and the number of programs that cover [rows, inner] elements."""
    block_inner = min(triton.next_power_of_2(inner), TILE)
    block_rows = min(triton.next_power_of_2(rows), TILE // block_inner)
    return block_rows, block_inner, triton.cdiv(rows, block_rows) * triton.cdiv(inner, block_inner)


# Scalars are tensors inside a kernel. Triton reads the annotation `int` as 32 bits; without it, a size that needs 64
# gets them.
@triton.jit
def _tile(rows: tl.tensor, inner: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr) -> tuple:
    """Row numbers [BLOCK_ROWS] and positions in a row [BLOCK_INNER] of this program's tile of [rows, inner]."""
    # One grid axis, since only the first may exceed 65535.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(inner, BLOCK_INNER)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = program % blocks * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    return row, position


# Debug mode keeps the assertion in the compiled kernel. Of the sizes only those of a slice decide how to load.
@triton.jit(debug=True, do_not_specialize=["rows", "size", "k"])
def _gather_kernel(
    x_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_row: tl.tensor,
    stride_inner: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    """out[o, j, i] = x[o, index[j], i] over x [outer, size, inner], where the `rows` of out are all (o, j)."""
    row, position = _tile(rows, inner, BLOCK_ROWS, BLOCK_INNER)
    outer, place = row // k, row % k
    taken = tl.load(index_ptr + place, row < rows, other=0).to(tl.int64)
    tl.device_assert((taken >= 0) & (taken < size), "cggr::gather: index out of range")
    inside = (row < rows)[:, None] & (position < inner)[None, :]
    source = x_ptr + (outer * stride_outer + taken * stride_row)[:, None] + (position * stride_inner)[None, :]
    values = tl.load(source, inside)
    tl.store(out_ptr + (row * inner)[:, None] + position[None, :], values, inside)


@triton.jit(do_not_specialize=["rows", "size"])
def _gather_backward_kernel(
    grad_ptr: tl.tensor,
    place_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_row: tl.tensor,
    stride_inner: tl.tensor,
    ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> None:
    """out[o, s, i] = Σ grad[o, place[t], i] over t in [bound[s], bound[s + 1]); the `rows` of out are all (o, s)."""
    row, position = _tile(rows, inner, BLOCK_ROWS, BLOCK_INNER)
    outer, slot = row // size, row % size
    start = tl.load(bound_ptr + slot, row < rows, other=0)
    count = tl.load(bound_ptr + slot + 1, row < rows, other=0) - start
    within = (position < inner)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_INNER], ACCUMULATOR)
    for turn in range(tl.max(count)):
        adding = turn < count
        place = tl.load(place_ptr + start + turn, adding, other=0)
        source = grad_ptr + (outer * stride_outer + place * stride_row)[:, None] + (position * stride_inner)[None, :]
        total += tl.load(source, adding[:, None] & within, other=0.0).to(ACCUMULATOR)
    destination = out_ptr + (row * inner)[:, None] + position[None, :]
    tl.store(destination, total.to(out_ptr.dtype.element_ty), (row < rows)[:, None] & within)
