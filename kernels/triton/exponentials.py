"""Exponentials of logits as operands of the gradient's matrix products, and the row-wise kernels around these."""

from __future__ import annotations

import triton
import triton.language as tl
from cggr_compile.kernels.triton.head import LN_2, LOG2_E, NEGATIVE_INFINITY, capped, place_of, products


@triton.jit
def exponentials_kernel(
    hidden, weight, out, bias, target, shift, gain, at_target, count, flagged, total, most, moment,
    rows, classes, width, factor, softcap, first_row, first_column, columns,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NORMALIZED: tl.constexpr, MEASURED: tl.constexpr,
    FLAGS: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Exponentials of the logits x (in units of log 2) of `columns` classes, in the dtype of `out` [rows, columns].

    NORMALIZED, with shift = lse, they are the loss's gradient by the head's outputs: `gain[n] 2^(x - shift[n])`
    off the target and `at_target[n]` on it, times the soft-cap's derivative.

    Otherwise they are `2^(x - shift[n])` off the target and 0 on it, times the soft-cap's derivative; total and most
    [column tiles, rows] hold each tile's sum and maximum of x; MEASURED, the maximum is that of the others than the
    target, and moment holds the sum of 2^(x - shift[n]) (x - shift[n]) of these. With FLAGS > 0, nothing is done unless
    one of so many entries of `flagged` is set. The rows are first_row, first_row + 1, ... of those that `count` counts;
    the others have shift = inf and become 0, and whole tiles of them are not multiplied.
    """
    if FLAGS > 0:  # noqa: SIM102  one is decided by the compiler, the other on the device
        if tl.max(tl.load(flagged + tl.arange(0, FLAGS)), 0) == 0:
            return
    live_rows = tl.minimum(rows, tl.maximum(tl.load(count) - first_row, 0))
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(live_rows, BLOCK_M) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = place_of(tile, live_rows, BLOCK_M, GROUP, column_tiles)
        row, start = row_tile * BLOCK_M, column_tile * BLOCK_N
        x = products(hidden, weight, row, first_column + start, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        offsets = row + tl.arange(0, BLOCK_M)
        inside = offsets < rows
        column = first_column + start + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            x += tl.load(bias + column, column < classes, 0.0).to(tl.float32)[None, :]
        x = capped(x, factor, softcap, SOFTCAP)
        if SOFTCAP:
            slope = 1 - (x / softcap) * (x / softcap)
        x = x * LOG2_E
        if not NORMALIZED:
            if start + BLOCK_N > columns:
                x = tl.where((column < classes)[None, :], x, NEGATIVE_INFINITY)
            place = column_tile.to(tl.int64) * rows + offsets
            if not MEASURED:
                tl.store(most + place, tl.max(x, 1), inside)
        distance = x - tl.load(shift + offsets, inside, float("inf"))[:, None]
        value = tl.exp2(distance)
        is_target = column[None, :] == tl.load(target + offsets, inside, -1).to(tl.int32)[:, None]
        if NORMALIZED:
            value = value * tl.load(gain + offsets, inside, 0.0)[:, None]
            value = tl.where(is_target, tl.load(at_target + offsets, inside, 0.0)[:, None], value)
        else:
            value = tl.where(is_target, 0.0, value)
            tl.store(total + place, tl.sum(value, 1), inside)
            if MEASURED:
                # `survey_kernel` shifts a row whose other classes overflow, by the largest of these.
                tl.store(most + place, tl.max(tl.where(is_target, NEGATIVE_INFINITY, x), 1), inside)
                tl.store(moment + place, tl.sum(tl.where(value > 0, value * distance, 0.0), 1), inside)
        if SOFTCAP:
            value = value * slope
        out.store([row, start], value.to(out.dtype))
    nothing = tl.zeros([BLOCK_M, BLOCK_N], out.dtype)
    for tile in range(tiles + tl.program_id(0), tl.cdiv(rows, BLOCK_M) * column_tiles, PROGRAMS):
        out.store([tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N], nothing)


@triton.jit
def _summed(x, offsets, inside, rows, column_tiles, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):
    """Σ over the column tiles of x [column tiles, rows] at the row offsets, in a fixed order."""
    sums = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for start in range(0, column_tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < column_tiles)[:, None] & inside[None, :]
        sums += tl.load(x + tile.to(tl.int64)[:, None] * rows + offsets[None, :], mask, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _largest(x, offsets, inside, rows, column_tiles, BLOCK_M: tl.constexpr):
    """The maximum over the column tiles of x [column tiles, rows] at the row offsets."""
    largest = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    at = offsets
    for _ in range(column_tiles):
        largest = tl.maximum(largest, tl.load(x + at, inside, NEGATIVE_INFINITY))
        at += rows
    return largest


@triton.jit
def survey_kernel(
    total, most, shift, flagged, count, rows, column_tiles, first_row,
    LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Moves the shift of rows whose exponentials summed to more than LIMIT to their largest logit, and flags their
    block. NaN sums, which no shift mends, are left alone."""
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (offsets < rows) & (offsets + first_row < tl.load(count))
    over = _summed(total, offsets, inside, rows, column_tiles, BLOCK_M, BLOCK_T) > LIMIT
    any_over = tl.max(over.to(tl.int32), 0)
    tl.store(flagged + block, any_over)
    if any_over != 0:
        largest = _largest(most, offsets, inside, rows, column_tiles, BLOCK_M)
        tl.store(shift + offsets, largest, inside & over)


@triton.jit
def settle_kernel(
    out, total, most, moment, shift, target, target_logit, loss_factor, row_loss, row_scale, entropy, hit, count,
    rows, column_tiles, first_row, stride, softcap,
    SOFTCAP: tl.constexpr, MEASURED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Closes a block of unnormalised exponentials: each row's loss, its scale, and the entry of its target.

    With Z' the sum off the target and Z = Z' + 2^(x[t] - shift), the loss is log Z + shift - x[t], where shift = x[t]
    log(1 + Z'), exact for Z' near 0. Rows of `out` times row_scale = loss_factor / Z are the gradient by the head's
    outputs, whose target entry p - 1 = -Z' / Z is therefore -Z' before scaling: no 1 is ever subtracted.

    MEASURED, with M = Σ 2^(x - shift) (x - shift) over all classes, a row's entropy is log Z - M / Z log 2, and it is a
    hit where no other class has a larger logit than the target.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offsets < rows
    counted = inside & (offsets + first_row < tl.load(count))
    others = _summed(total, offsets, counted, rows, column_tiles, BLOCK_M, BLOCK_T)
    x = tl.load(target_logit + offsets, counted, 0.0)
    distance = x * LOG2_E - tl.load(shift + offsets, counted, 0.0)
    z = others + tl.exp2(distance)
    # log(1 + Z') by its quotient with the Z' that the rounded sum stands for (Goldberg 1991, theorem 4).
    near = tl.where(z == 1.0, others, tl.log(z) * others / (z - 1.0))
    loss = tl.where(distance == 0.0, near, tl.log(z) - distance * LN_2)
    tl.store(row_loss + offsets, tl.where(counted, loss, 0.0), inside)
    tl.store(row_scale + offsets, tl.where(counted, tl.load(loss_factor + offsets, inside, 0.0) / z, 0.0), inside)
    if MEASURED:
        m = _summed(moment, offsets, counted, rows, column_tiles, BLOCK_M, BLOCK_T)
        m += tl.where(distance > NEGATIVE_INFINITY, tl.exp2(distance) * distance, 0.0)
        tl.store(entropy + offsets, tl.where(counted, tl.log(z) - LN_2 * m / z, 0.0), inside)
        largest = _largest(most, offsets, counted, rows, column_tiles, BLOCK_M)
        tl.store(hit + offsets, (counted & (x * LOG2_E >= largest)).to(tl.float32), inside)
    entry = -others
    if SOFTCAP:
        entry = entry * (1 - (x / softcap) * (x / softcap))
    # A label out of range has a NaN logit, and its row is NaN without this entry.
    label = tl.load(target + offsets, inside, 0)
    tl.store(out + offsets * stride + label, entry.to(out.dtype.element_ty), counted & (x == x))


@triton.jit
def scale_rows_kernel(
    x, row_scale, row_of, out, rows, width, stride, stride_out, HAS_ROW_OF: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row_of[n]] = row_scale[n] x[n], or out[n] without `row_of`, in the dtype of `out`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    scale = tl.load(row_scale + row, inside, 0.0)
    to = row
    if HAS_ROW_OF:
        to = tl.load(row_of + row, inside, 0)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < width)[None, :]
        values = tl.load(x + row[:, None] * stride + k[None, :], mask, 0.0).to(tl.float32) * scale[:, None]
        tl.store(out + to[:, None] * stride_out + k[None, :], values.to(out.dtype.element_ty), mask)


@triton.jit
def scale_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    """out = factor[0] x in fp32, rounded once."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + offsets, values.to(out.dtype.element_ty), inside)


@triton.jit
def column_sums_kernel(x, row_scale, out, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[v] = Σ_n row_scale[n] x[n, v] in fp32, added to what `out` holds."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(x + row[:, None] * stride + column[None, :], mask, 0.0).to(tl.float32)
        sums += tl.sum(values * tl.load(row_scale + row, row < rows, 0.0)[:, None], 0)
    inside = column < columns
    tl.store(out + column, tl.load(out + column, inside, 0.0) + sums, inside)
