"""Softmax statistics of every row by the online algorithm, and the quantities that scores are made of."""

from __future__ import annotations

import triton
import triton.language as tl
from cggr_compile.kernels.triton.head import LN_2, LOG2_E, NEGATIVE_INFINITY, capped, place_of, products


@triton.jit
def statistics_kernel(
    hidden, weight, bias, log_weight, class_of, target, row_scale, column_scale, count,
    most, total, moment, second,
    rows, classes, width, factor, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, WITHOUT_TARGET: tl.constexpr,
    SCALED: tl.constexpr, MOMENT: tl.constexpr, SECOND: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of each row over one of SPLITS slices of the vocabulary, by the online algorithm.

    With x the logits in units of log 2 and y = x, each [SPLITS, N]: most = max y, total = Σ 2^(y - most),
    moment = Σ 2^(y - most) (x - most), second = the second largest y, repeats included. Row tiles
    from `count` on are left out. SCALED multiplies products by row_scale[n] column_scale[v]. WEIGHTED, the columns
    are a sample of the classes, column v being class_of[v], and y = x + log2 weight[v]. WITHOUT_TARGET, y = -inf at
    a row's own target.
    """
    tile, split = place_of(tl.program_id(0), rows, BLOCK_M, GROUP, SPLITS)
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
    if SCALED:
        scales = tl.load(row_scale + offsets, offsets < rows, 0.0)
    if WITHOUT_TARGET:
        labels = tl.load(target + offsets, offsets < rows, -1).to(tl.int32)
    for column_tile in tl.range(first, last, flatten=True):
        start = column_tile * BLOCK_N
        x = products(hidden, weight, row, start, width, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        columns = start + tl.arange(0, BLOCK_N)
        if SCALED:
            x = x * scales[:, None] * tl.load(column_scale + columns, columns < classes, 0.0)[None, :]
        if HAS_BIAS:
            x += tl.load(bias + columns, columns < classes, 0.0).to(tl.float32)[None, :]
        x = capped(x, factor, softcap, SOFTCAP) * LOG2_E
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
