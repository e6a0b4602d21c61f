"""Kernels over pairs of tokens and experts, sorted by expert: products with the pair's own expert's tables.

Row r of the S sorted pairs is the pair `place[r]` = t · K + k; those of expert e are the rows from bound[e] to
bound[e + 1], and those from bound[E] on are dropped: no tile has them. Programs that stay walk tiles of rows, each of
one expert, times tiles of columns, in the order of the experts (`schedule_kernel`). Sorted rows and tables are read
through descriptors, tables [E, N, K] as [E · N, K], or [E · K, N] where they lie transposed. The tokens' rows are
copied into the order of the pairs first (`rows_kernel`): gathering them in the loads of the products took longer, most
of all in `tables_kernel` (benchmarks/results/experts-gathered-h200.md).

Soundness of the tails. A tile's rows behind its expert's last are computed of other rows, or of what was never
written, and not stored; sums over rows leave them out. A tile's columns behind a table's last are the next expert's, or
zeros, and not stored. A depth behind the last reads zeros of the rows, and of the tables finite numbers or zeros.

Every element is written once, by the program that owns it, and sums have a fixed order. Offsets of rows are 64 bits
wide.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cggr_compile.kernels.triton.head import LOG2_E, place_of


@triton.jit
def schedule_kernel(
    bound, tile_expert, tile_row, tile_count, experts,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The expert and the first row of BLOCK_T tiles of BLOCK_M rows, in the order of the experts; how many tiles."""
    expert = tl.arange(0, BLOCK_E)
    begin = tl.load(bound + expert, expert < experts, 0)
    end = tl.load(bound + expert + 1, expert < experts, 0)
    tiles = tl.where(expert < experts, tl.cdiv(end - begin, BLOCK_M), 0)
    last = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    tl.store(tile_count, total)  # the same of every program
    # The row of tile t of an expert is origin + t BLOCK_M.
    origin = begin - (last - tiles) * BLOCK_M
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    of_owner = tl.sum(tl.where(expert[None, :] == owner[:, None], origin[None, :], 0), 1)
    tl.store(tile_expert + tile, owner, tile < total)
    tl.store(tile_row + tile, of_owner + tile * BLOCK_M, tile < total)


@triton.jit
def rows_kernel(
    x, place, bound, out, experts, choices, columns, stride_x, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[r] = x[token of r] of the pairs that are not dropped: x [T, columns], out [S, columns]."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offsets = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offsets < tl.load(bound + experts)
    token = tl.load(place + offsets, inside, 0) // choices
    mask = inside[:, None] & (at < columns)[None, :]
    row = tl.load(x + (token * stride_x)[:, None] + at[None, :], mask)
    tl.store(out + (offsets.to(tl.int64) * stride_out)[:, None] + at[None, :], row, mask)


@triton.jit
def _block(table, expert, row, depth, rows, width, ROWS_LAST: tl.constexpr):
    """Rows `row`.. and depths `depth`.. of an expert's table [rows, width], as [BLOCK_K, BLOCK_N]."""
    # No return of its own for either: the compiler asks for one type of all.
    return table.load([expert * width + depth, row]) if ROWS_LAST else table.load([expert * rows + row, depth]).T


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of the columns: what an epilogue holds in registers at a time."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2_E))


@triton.jit
def _clamped(x, limit):
    # By a comparison, which keeps a NaN as torch's clamp does.
    return tl.where(x > limit, limit, x)


@triton.jit
def _activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    if ACTIVATION == "clamped_gated":
        gate = _clamped(gate, limit)
        value = (1 - _clamped(-_clamped(up, limit), limit)) * (gate * _sigmoid(gate * alpha))
    else:
        value = gate * _sigmoid(gate)
        if ACTIVATION == "silu_gated":
            value = value * up
    return value


@triton.jit
def _slopes(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The derivatives of `_activated` by gate and up."""
    if ACTIVATION == "clamped_gated":
        low = _clamped(gate, limit)
        s = _sigmoid(low * alpha)
        by_gate = (1 - _clamped(-_clamped(up, limit), limit)) * s * (1 + low * alpha * (1 - s))
        by_gate = tl.where(gate > limit, 0.0, by_gate)
        by_up = tl.where((up > limit) | (up < -limit), 0.0, low * s)
    else:
        s = _sigmoid(gate)
        by_gate = s * (1 + gate * (1 - s))
        by_up = gate * s
        if ACTIVATION == "silu_gated":
            by_gate = by_gate * up
    return by_gate, by_up


@triton.jit
def _store_activated(
    gate, up, bias, products, activations, column, inside, features, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the bias to first products of BLOCK_N columns from `column` on, stores them and what they are activated to;
    INTERLEAVED, `gate` has both kinds, 2 BLOCK_N. Pointers are those of the rows."""
    columns = column + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (columns < features)[None, :]
    if INTERLEAVED:
        both = 2 * column + tl.arange(0, 2 * BLOCK_N)
        if bias is not None:
            gate += tl.load(bias + both, both < 2 * features, 0.0).to(tl.float32)[None, :]
        if products is not None:
            there = inside[:, None] & (both < 2 * features)[None, :]
            tl.store(products + both[None, :], gate.to(products.dtype.element_ty), there)
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    else:
        if bias is not None:
            gate += tl.load(bias + columns, columns < features, 0.0).to(tl.float32)[None, :]
            if ACTIVATION != "silu":
                up += tl.load(bias + features + columns, columns < features, 0.0).to(tl.float32)[None, :]
        if products is not None:
            tl.store(products + columns[None, :], gate.to(products.dtype.element_ty), mask)
            if ACTIVATION != "silu":
                tl.store(products + features + columns[None, :], up.to(products.dtype.element_ty), mask)
    value = _activated(gate, up, alpha, limit, ACTIVATION)
    tl.store(activations + columns[None, :], value.to(activations.dtype.element_ty), mask)


@triton.jit
def up_kernel(
    x, table, bias, bound, tile_expert, tile_row, tile_count, products, activations,
    features, width, stride_products, stride_activations, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS_LAST: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first products of sorted rows x [S, width], `products` [S, 2F] where it is no None, and `activations` [S, F]
    of them."""
    GATED: tl.constexpr = ACTIVATION != "silu"
    WIDE: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    rows = 2 * features if GATED else features
    column_tiles = tl.cdiv(features, BLOCK_N)
    row_tiles = tl.load(tile_count)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = place_of(tile, row_tiles, 1, GROUP, column_tiles)
        column = column_tile * BLOCK_N
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        gate = tl.zeros([BLOCK_M, WIDE], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        first = 2 * column if INTERLEAVED else column
        for k in range(0, width, BLOCK_K):
            token = x.load([row, k])
            w = _block(table, expert, first, k, rows, width, ROWS_LAST)
            gate = tl.dot(token, w, gate, input_precision=PRECISION)
            if GATED and not INTERLEAVED:
                w = _block(table, expert, features + first, k, rows, width, ROWS_LAST)
                up = tl.dot(token, w, up, input_precision=PRECISION)
        offsets = row + tl.arange(0, BLOCK_M)
        inside = offsets < tl.load(bound + expert + 1)
        out, at = products, offsets.to(tl.int64)
        if products is not None:
            out = products + (at * stride_products)[:, None]
        own = bias
        if bias is not None:
            own = bias + expert * rows
        value = activations + (at * stride_activations)[:, None]
        low, high = _halves(gate, BLOCK_M, WIDE)
        low_up, high_up = _halves(up, BLOCK_M, BLOCK_N)
        _store_activated(
            low, low_up, own, out, value, column, inside, features, alpha, limit,
            ACTIVATION, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _store_activated(
            high, high_up, own, out, value, column + BLOCK_N // 2, inside, features, alpha, limit,
            ACTIVATION, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def down_kernel(
    x, table, bias, weights, place, bound, tile_expert, tile_row, tile_count, out,
    columns, width,
    ROWS_LAST: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[place[r]] = weights[place[r]] (table x[r] + bias) of sorted rows x [S, width], out [S, columns]; without
    weights the factor is 1."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row_tiles = tl.load(tile_count)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = place_of(tile, row_tiles, 1, GROUP, column_tiles)
        column = column_tile * BLOCK_N
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            w = _block(table, expert, column, k, columns, width, ROWS_LAST)
            total = tl.dot(x.load([row, k]), w, total, input_precision=PRECISION)
        offsets = row + tl.arange(0, BLOCK_M)
        inside = offsets < tl.load(bound + expert + 1)
        to = tl.load(place + offsets, inside, 0)
        at = column + tl.arange(0, BLOCK_N)
        if bias is not None:
            total += tl.load(bias + expert * columns + at, at < columns, 0.0).to(tl.float32)[None, :]
        if weights is not None:
            total *= tl.load(weights + to, inside, 0.0).to(tl.float32)[:, None]
        mask = inside[:, None] & (at < columns)[None, :]
        tl.store(out + (to * columns)[:, None] + at[None, :], total.to(out.dtype.element_ty), mask)


@triton.jit
def _store_gradients(
    unweighed, products, by_products, weighed, weight, column, inside, features, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `down_backward_kernel` stores of BLOCK_N columns from `column` on, but for by_weight, of which it gives
    their part. Pointers are those of the rows."""
    columns = column + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (columns < features)[None, :]
    both = 2 * column + tl.arange(0, 2 * BLOCK_N)
    if INTERLEAVED:
        wide = tl.load(products + both[None, :], inside[:, None] & (both < 2 * features)[None, :], 0.0)
        gate, up = tl.split(tl.reshape(wide.to(tl.float32), (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = tl.load(products + columns[None, :], mask, 0.0).to(tl.float32)
        up = gate
        if ACTIVATION != "silu":
            up = tl.load(products + features + columns[None, :], mask, 0.0).to(tl.float32)
    value = _activated(gate, up, alpha, limit, ACTIVATION)
    part = tl.sum(tl.where(mask, unweighed * value, 0.0), 1)
    if weighed is not None:
        tl.store(weighed + columns[None, :], (value * weight[:, None]).to(weighed.dtype.element_ty), mask)
    if by_products is not None:
        grad = unweighed * weight[:, None]
        by_gate, by_up = _slopes(gate, up, alpha, limit, ACTIVATION)
        by_gate = (by_gate * grad).to(by_products.dtype.element_ty)
        by_up = (by_up * grad).to(by_products.dtype.element_ty)
        if INTERLEAVED:
            wide = tl.reshape(tl.join(by_gate, by_up), (BLOCK_M, 2 * BLOCK_N))
            tl.store(by_products + both[None, :], wide, inside[:, None] & (both < 2 * features)[None, :])
        else:
            tl.store(by_products + columns[None, :], by_gate, mask)
            if ACTIVATION != "silu":
                tl.store(by_products + features + columns[None, :], by_up, mask)
    return part


@triton.jit
def down_backward_kernel(
    grad, table, products, weights, place, bound, tile_expert, tile_row, tile_count, by_products, weighed, by_weight,
    pairs, features, width, stride_products, stride_weighed, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS_LAST: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From sorted rows of the result's gradient [S, width]: `by_products`, that by the first products [S, 2F];
    `weighed`, each pair's weight times the activations [S, F]; and by_weight [column tiles, S], in the order of the
    pairs, that by its weight but for the bias, a part of each tile of columns. Those that are None are left out."""
    column_tiles = tl.cdiv(features, BLOCK_N)
    row_tiles = tl.load(tile_count)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS):
        row_tile, column_tile = place_of(tile, row_tiles, 1, GROUP, column_tiles)
        column = column_tile * BLOCK_N
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        unweighed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            w = _block(table, expert, column, k, features, width, ROWS_LAST)
            unweighed = tl.dot(grad.load([row, k]), w, unweighed, input_precision=PRECISION)
        offsets = row + tl.arange(0, BLOCK_M)
        inside = offsets < tl.load(bound + expert + 1)
        pair = tl.load(place + offsets, inside, 0)
        weight = tl.load(weights + pair, inside, 0.0).to(tl.float32)
        at = offsets.to(tl.int64)
        source = products + (at * stride_products)[:, None]
        slopes, values = by_products, weighed
        if by_products is not None:
            slopes = by_products + (at * stride_products)[:, None]
        if weighed is not None:
            values = weighed + (at * stride_weighed)[:, None]
        low, high = _halves(unweighed, BLOCK_M, BLOCK_N)
        part = _store_gradients(
            low, source, slopes, values, weight, column, inside, features, alpha, limit,
            ACTIVATION, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        part += _store_gradients(
            high, source, slopes, values, weight, column + BLOCK_N // 2, inside, features, alpha, limit,
            ACTIVATION, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        if by_weight is not None:
            tl.store(by_weight + column_tile.to(tl.int64) * pairs + pair, part, inside)


@triton.jit
def tables_kernel(
    x, y, bound, out, experts, rows, columns, stride_expert, stride_row, stride_column,
    PROGRAMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ x[r] ⊗ y[r] over the pairs r of expert e: sorted rows x [S, rows] and y [S, columns], out
    [E, rows, columns] of any strides; zeros for an expert without pairs."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in range(tl.program_id(0), experts * row_tiles * column_tiles, PROGRAMS):
        expert, inner = tile // (row_tiles * column_tiles), tile % (row_tiles * column_tiles)
        row, column = inner // column_tiles * BLOCK_M, inner % column_tiles * BLOCK_N
        begin, end = tl.load(bound + expert), tl.load(bound + expert + 1)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        last = begin + (end - begin) // BLOCK_K * BLOCK_K
        for pair in range(begin, last, BLOCK_K):
            total = tl.dot(x.load([pair, row]).T, y.load([pair, column]), total, input_precision=PRECISION)
        if last < end:
            inside = (last + tl.arange(0, BLOCK_K) < end)[:, None]
            left, right = tl.where(inside, x.load([last, row]), 0.0), tl.where(inside, y.load([last, column]), 0.0)
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        at = column + tl.arange(0, BLOCK_N)
        down = row + tl.arange(0, BLOCK_M)
        into = out + expert.to(tl.int64) * stride_expert + (down.to(tl.int64) * stride_row)[:, None]
        into += (at.to(tl.int64) * stride_column)[None, :]
        tl.store(into, total.to(out.dtype.element_ty), (down < rows)[:, None] & (at < columns)[None, :])


@triton.jit
def column_sums_kernel(
    x, weights, place, bound, out, choices, columns, stride,
    GATHERED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ x[r] over the pairs r of expert e, out [E, columns]; GATHERED, Σ weights[r] x[token of r]."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    expert = tl.program_id(0) // column_tiles
    at = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(bound + expert), tl.load(bound + expert + 1)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_M):
        offsets = start + tl.arange(0, BLOCK_M)
        row = offsets.to(tl.int64)
        factor = tl.where(offsets < end, 1.0, 0.0)
        if GATHERED:
            pair = tl.load(place + offsets, offsets < end, 0)
            factor = tl.load(weights + pair, offsets < end, 0.0).to(tl.float32)
            row = pair // choices
        mask = (offsets < end)[:, None] & (at < columns)[None, :]
        values = tl.load(x + (row * stride)[:, None] + at[None, :], mask, 0.0).to(tl.float32)
        sums += tl.sum(values * factor[:, None], 0)
    tl.store(out + expert * columns + at, sums.to(out.dtype.element_ty), at < columns)


@triton.jit
def add_pairs_kernel(
    rows, expert, out, tokens, experts, columns, choices, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[t] = Σ_k rows[t K + k] over the pairs whose `expert` is below `experts`, which are not dropped."""
    column_tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    token = program // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None] & (at < columns)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(choices):
        pair = token * choices + k
        counted = tl.load(expert + pair, token < tokens, experts) < experts
        source = rows + (pair * columns)[:, None] + at[None, :]
        total += tl.load(source, inside & counted[:, None], 0.0).to(tl.float32)
    tl.store(out + (token * columns)[:, None] + at[None, :], total.to(out.dtype.element_ty), inside)
