"""Kernels over the logits of a language model's head, tile by tile, none of which leaves the chip.

A program holds a tile of BLOCK_M rows by BLOCK_N columns of `hidden @ weight.T` in fp32 accumulators, turns it into
logits (bias, scale, soft-cap) and reduces it at once. Logits are in units of log 2, so that exp is one `exp2`.

Soundness of the tails: descriptors read zeros beyond the tensors' ends, which a dot product over the width ignores;
columns beyond the vocabulary become -inf, and rows beyond the last are never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    # 1 - 2 / (1 + exp(2x)) is exact at both ends, where exp overflows or vanishes, but off by a rounding of 1 near 0;
    # there the Taylor series, whose next term is below a rounding of x for |x| < 1/4.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E))))


@triton.jit
def _products(
    hidden, weight, row, column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden[row : row + BLOCK_M] @ weight[column : column + BLOCK_N].T` in fp32."""
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        products = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, products, input_precision=PRECISION)
    return products


@triton.jit
def _capped(x, factor, softcap, SOFTCAP: tl.constexpr):
    """Logits of head outputs `x`, in nats: scaled by `factor`, then `softcap * tanh(x / softcap)`."""
    x = x * factor
    if SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _place(program, rows, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, COLUMN_PROGRAMS):
    """Row tile and column program of a program: GROUP row tiles share the columns that they read, in the L2 cache."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    group = program // (GROUP * COLUMN_PROGRAMS)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program - group * GROUP * COLUMN_PROGRAMS
    return first + inside % size, inside // size


@triton.jit
def target_logits_kernel(
    hidden, weight, bias, target, row_scale, class_scale, count, logit, shift,
    rows, classes, width, stride_hidden, stride_weight, factor, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The logit of each row's own label, fp32 [N]: in nats in `logit`, 0 from row `count` on, and in units of log 2 in
    `shift`, inf from row `count` on and 0 for a logit of -inf. NaN where the label is out of range."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    counted = row < tl.load(count)
    label = tl.load(target + row, inside, -1)
    valid = counted & (label >= 0) & (label < classes)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (k < width)[None, :]
        h = tl.load(hidden + row[:, None] * stride_hidden + k[None, :], mask, 0.0).to(tl.float32)
        w = tl.load(weight + label[:, None] * stride_weight + k[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(h * w, 1)
    if SCALED:
        total *= tl.load(row_scale + row, inside, 0.0) * tl.load(class_scale + label, valid, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + label, valid, 0.0).to(tl.float32)
    x = tl.where(valid, _capped(total, factor, softcap, SOFTCAP), float("nan"))
    x = tl.where(x == float("inf"), float("nan"), x)  # as inf - inf is: a row with such a logit has no softmax
    tl.store(logit + row, tl.where(counted, x, 0.0), inside)
    # A shift of -inf would make NaN of every other -inf.
    finite = tl.where(x == NEGATIVE_INFINITY, 0.0, x * LOG2_E)
    tl.store(shift + row, tl.where(counted, finite, float("inf")), inside)


@triton.jit
def statistics_kernel(
    hidden, weight, bias, log_weight, class_of, target, row_scale, column_scale, count,
    most, total, moment, second, logit_sum,
    rows, classes, width, factor, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, WITHOUT_TARGET: tl.constexpr,
    SCALED: tl.constexpr, MOMENT: tl.constexpr, SECOND: tl.constexpr, LOGIT_SUM: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of each row over one of SPLITS slices of the vocabulary, by the online algorithm.

    With x the logits in units of log 2 and y = x, each [SPLITS, N]: most = max y, total = Σ 2^(y - most),
    moment = Σ 2^(y - most) (x - most), second = the second largest y, repeats included, logit_sum = Σ x. Row tiles
    from `count` on are left out. SCALED multiplies products by row_scale[n] column_scale[v]. WEIGHTED, the columns
    are a sample of the classes, column v being class_of[v], and y = x + log2 weight[v]. WITHOUT_TARGET, y = -inf at
    a row's own target.
    """
    tile, split = _place(tl.program_id(0), rows, BLOCK_M, GROUP, SPLITS)
    row = tile * BLOCK_M
    offsets = row + tl.arange(0, BLOCK_M)
    if row >= tl.load(count):
        return
    column_tiles = tl.cdiv(classes, BLOCK_N)
    first = (column_tiles.to(tl.int64) * split // SPLITS).to(tl.int32)
    last = (column_tiles.to(tl.int64) * (split + 1) // SPLITS).to(tl.int32)
    m = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    runner_up = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    if SCALED:
        scales = tl.load(row_scale + offsets, offsets < rows, 0.0)
    if WITHOUT_TARGET:
        labels = tl.load(target + offsets, offsets < rows, -1).to(tl.int32)
    for column_tile in tl.range(first, last, flatten=True):
        start = column_tile * BLOCK_N
        x = _products(hidden, weight, row, start, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        columns = start + tl.arange(0, BLOCK_N)
        if SCALED:
            x = x * scales[:, None] * tl.load(column_scale + columns, columns < classes, 0.0)[None, :]
        if HAS_BIAS:
            x += tl.load(bias + columns, columns < classes, 0.0).to(tl.float32)[None, :]
        x = _capped(x, factor, softcap, SOFTCAP) * LOG2_E
        if LOGIT_SUM:
            u += tl.sum(tl.where((columns < classes)[None, :], x, 0.0), 1)
        if start + BLOCK_N > classes:
            x = tl.where((columns < classes)[None, :], x, NEGATIVE_INFINITY)
        y = x
        if WEIGHTED:
            y = x + tl.load(log_weight + columns, columns < classes, 0.0)[None, :] * LOG2_E
        if WITHOUT_TARGET:
            column_class = columns
            if WEIGHTED:
                column_class = tl.load(class_of + columns, columns < classes, -1).to(tl.int32)
            y = tl.where(column_class[None, :] == labels[:, None], NEGATIVE_INFINITY, y)
        tile_most = tl.max(y, 1)
        if SECOND:
            # The tile's own runner-up: its maximum without the first place of its maximum.
            place = tl.argmax(y, 1)
            others = tl.where(tl.arange(0, BLOCK_N)[None, :] == place[:, None], NEGATIVE_INFINITY, y)
            runner_up = tl.maximum(tl.maximum(runner_up, tl.max(others, 1)), tl.minimum(m, tile_most))
        larger = tl.maximum(m, tile_most)
        # A row of nothing but -inf so far has no finite shift; 0 keeps -inf - shift a number.
        shift = tl.where(larger == NEGATIVE_INFINITY, 0.0, larger)
        exponentials = tl.exp2(y - shift[:, None])
        rescale = tl.exp2(m - shift)
        if MOMENT:
            distance = x - shift[:, None]
            # 2^d d tends to 0 as d tends to -inf, where floating point would say 0 · -inf = NaN.
            terms = tl.where(exponentials > 0, exponentials * distance, 0.0)
            moved = tl.where(s > 0, s * (m - shift), 0.0)
            a = (a + moved) * rescale + tl.sum(terms, 1)
        s = s * rescale + tl.sum(exponentials, 1)
        m = larger
    offsets = offsets.to(tl.int64)
    place = split.to(tl.int64) * rows + offsets
    inside = offsets < rows
    tl.store(most + place, m, inside)
    tl.store(total + place, s, inside)
    if MOMENT:
        tl.store(moment + place, a, inside)
    if SECOND:
        tl.store(second + place, runner_up, inside)
    if LOGIT_SUM:
        tl.store(logit_sum + place, u, inside)


@triton.jit
def exponentials_kernel(
    hidden, weight, out, bias, target, shift, gain, uniform, at_target, count, flagged, total, most,
    rows, classes, width, factor, softcap, first_row, first_column, columns,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NORMALIZED: tl.constexpr, FLAGS: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Exponentials of the logits x (in units of log 2) of `columns` classes, in the dtype of `out` [rows, columns].

    NORMALIZED, with shift = lse, they are the loss's gradient by the head's outputs: `gain[n] 2^(x - shift[n]) -
    uniform[n]` off the target and `at_target[n]` on it, times the soft-cap's derivative.

    Otherwise they are `2^(x - shift[n])` off the target and 0 on it, times the soft-cap's derivative; total and most
    [column tiles, rows] hold each tile's sum and maximum of x. With FLAGS > 0, nothing is done unless one of so many
    entries of `flagged` is set. The rows are first_row, first_row + 1, ... of those that `count` counts; the others
    have shift = inf and become 0, and whole tiles of them are not multiplied.
    """
    if FLAGS > 0:  # noqa: SIM102  one is decided by the compiler, the other on the device
        if tl.max(tl.load(flagged + tl.arange(0, FLAGS)), 0) == 0:
            return
    live_rows = tl.minimum(rows, tl.maximum(tl.load(count) - first_row, 0))
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(live_rows, BLOCK_M) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = _place(tile, live_rows, BLOCK_M, GROUP, column_tiles)
        row, start = row_tile * BLOCK_M, column_tile * BLOCK_N
        x = _products(hidden, weight, row, first_column + start, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        offsets = row + tl.arange(0, BLOCK_M)
        inside = offsets < rows
        column = first_column + start + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            x += tl.load(bias + column, column < classes, 0.0).to(tl.float32)[None, :]
        x = _capped(x, factor, softcap, SOFTCAP)
        if SOFTCAP:
            slope = 1 - (x / softcap) * (x / softcap)
        x = x * LOG2_E
        if not NORMALIZED:
            if start + BLOCK_N > columns:
                x = tl.where((column < classes)[None, :], x, NEGATIVE_INFINITY)
            place = column_tile.to(tl.int64) * rows + offsets
            tl.store(most + place, tl.max(x, 1), inside)
        value = tl.exp2(x - tl.load(shift + offsets, inside, float("inf"))[:, None])
        is_target = column[None, :] == tl.load(target + offsets, inside, -1).to(tl.int32)[:, None]
        if NORMALIZED:
            value = value * tl.load(gain + offsets, inside, 0.0)[:, None]
            value -= tl.load(uniform + offsets, inside, 0.0)[:, None]
            value = tl.where(is_target, tl.load(at_target + offsets, inside, 0.0)[:, None], value)
        else:
            value = tl.where(is_target, 0.0, value)
            tl.store(total + place, tl.sum(value, 1), inside)
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
        largest = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
        at = offsets
        for _ in range(column_tiles):
            largest = tl.maximum(largest, tl.load(most + at, inside, NEGATIVE_INFINITY))
            at += rows
        tl.store(shift + offsets, largest, inside & over)


@triton.jit
def settle_kernel(
    out, total, shift, target, target_logit, loss_factor, row_loss, row_scale, count,
    rows, column_tiles, first_row, stride, softcap,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Closes a block of unnormalised exponentials: each row's loss, its scale, and the entry of its target.

    With Z' the sum off the target and Z = Z' + 2^(x[t] - shift), the loss is log Z + shift - x[t], where shift = x[t]
    log(1 + Z'), exact for Z' near 0. Rows of `out` times row_scale = loss_factor / Z are the gradient by the head's
    outputs, whose target entry p - 1 = -Z' / Z is therefore -Z' before scaling: no 1 is ever subtracted.
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


@triton.jit
def quantities_kernel(
    most, total, moment, second, target_logit, place, count, out,
    rows, splits, stride,
    WITH_TARGET: tl.constexpr, NLL: tl.constexpr, ENTROPY: tl.constexpr, MARGIN: tl.constexpr,
    CONFIDENCE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merges the slices of `statistics_kernel` and writes each quantity to its row of out [Q, N] (-1: not wanted).

    Row n of the slices is row place[n] of `out`; rows from `count` on are 0. WITH_TARGET adds the target's exponential,
    which the slices left out.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offsets < rows
    m = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    runner_up = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    if WITH_TARGET:
        m = tl.load(target_logit + offsets, inside, 0.0) * LOG2_E
        s += 1.0
    at = offsets
    for _ in range(splits):
        other = tl.load(most + at, inside, NEGATIVE_INFINITY)
        other_total = tl.load(total + at, inside, 0.0)
        larger = tl.maximum(m, other)
        shift = tl.where(larger == NEGATIVE_INFINITY, 0.0, larger)
        if MARGIN >= 0:
            runner_up = tl.maximum(runner_up, tl.minimum(m, other))
            runner_up = tl.maximum(runner_up, tl.load(second + at, inside, NEGATIVE_INFINITY))
        mine, theirs = tl.exp2(m - shift), tl.exp2(other - shift)
        if ENTROPY >= 0:
            moved = tl.where(s > 0, s * (m - shift), 0.0)
            other_moved = tl.where(other_total > 0, other_total * (other - shift), 0.0)
            a = (a + moved) * mine + (tl.load(moment + at, inside, 0.0) + other_moved) * theirs
        s = s * mine + other_total * theirs
        m = larger
        at += rows
    # No finite logit at all: the softmax is 0 / 0.
    s = tl.where(m == NEGATIVE_INFINITY, float("nan"), s)
    counted = offsets < tl.load(count)
    destination = out + tl.load(place + offsets, inside, 0)
    log_total = tl.log(s)
    if NLL >= 0:
        # Sum and target logit round apart, so a probability of nearly 1 can come out above it.
        nll = log_total + m * LN_2 - tl.load(target_logit + offsets, inside, 0.0)
        tl.store(destination + NLL * stride, tl.where(counted, tl.where(nll < 0.0, 0.0, nll), 0.0), inside)
    if ENTROPY >= 0:
        tl.store(destination + ENTROPY * stride, tl.where(counted, log_total - a * LN_2 / s, 0.0), inside)
    if MARGIN >= 0:
        margin = 1.0 - (1.0 - tl.exp2(runner_up - m)) / s
        tl.store(destination + MARGIN * stride, tl.where(counted, margin, 0.0), inside)
    if CONFIDENCE >= 0:
        tl.store(destination + CONFIDENCE * stride, tl.where(counted, 1.0 / s, 0.0), inside)
