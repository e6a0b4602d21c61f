"""`select` by counting: one program a row finds the k-th largest key by bisection, then writes the rows above it.

A row's float32 key maps to an int32 that orders as the key does: with m = its bits without the sign, m where the
key is positive and -m where it is negative. The two zeros share m = 0 and so tie; infinities are ±0x7F800000; NaN
gets the least int32 but one, and unselectable rows the least, below every key. Bisection over these integers keeps

    lo < hi  and  count(key >= lo) >= taken > count(key >= hi),

starting from the whole range, and ends where `lo` alone lies between or where count(key >= lo) is exactly `taken`.
Either way the answer is every row at or above `hi` and, of those in [lo, hi), the first in index order that make
up the number. At most 32 counts replace the reference's three sorts, counts of integers are the same in any order,
and nothing is read back to the host: the result is the reference's to the bit, and the same each time.

Output places follow from counts as well. A taken row's place is the number of taken rows before it; the missing
places, all of them the highest ranked row's repetitions, come right after it and shift what follows by their number.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from cggr_compile.kernels.reference import rows as reference
from cggr_compile.kernels.triton.launch import launch
from torch import Tensor

BLOCK = 8192
"""Keys that a program holds at a time: a shorter row is read once and stays in registers, a longer one is streamed."""

_KEYS_PER_WARP = 512
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(-(2**31) + 1)
_UNSELECTABLE = tl.constexpr(-(2**31))


def select(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.select`: index int64 [..., k], sorted, and weight float32 [..., k].

    `scores` and `noise` are float32 [..., N], `valid` is bool [..., N], all on one device and of any strides; k >= 1
    may exceed N, and N may be 0. Raises ValueError for an unknown rule and for a rule whose noise is missing.
    """
    if rule not in reference.RANKINGS:
        raise ValueError(f"rule: got {rule!r}, expected one of {list(reference.RANKINGS)}")
    key, valid = (x.contiguous() for x in reference.RANKINGS[rule](scores, valid, noise))
    *leading, length = key.shape
    index = key.new_empty((*leading, k), dtype=torch.int64)
    weight = key.new_empty((*leading, k), dtype=torch.float32)
    rows = math.prod(leading)
    if rows == 0 or k == 0:
        return index, weight
    block = min(triton.next_power_of_2(max(length, 1)), BLOCK)
    launch(
        _select_kernel,
        rows,
        key,
        valid,
        index,
        weight,
        length,
        k,
        BLOCK=block,
        num_warps=min(max(block // _KEYS_PER_WARP, 4), 32),
    )
    return index, weight


@triton.jit
def _ordered_keys(key_ptr: tl.tensor, valid_ptr: tl.tensor, row: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Order-preserving int32 of the keys of `row`, a block of row numbers; the least for what is not selectable."""
    inside = row < length
    bits = tl.load(key_ptr + row, inside, other=0.0).to(tl.int32, bitcast=True)
    valid = tl.load(valid_ptr + row, inside, other=0).to(tl.int1)
    magnitude = bits & 0x7FFFFFFF
    ordered = tl.where(magnitude <= _INFINITY, tl.where(bits < 0, -magnitude, magnitude), _NAN)
    return tl.where(valid, ordered, _UNSELECTABLE)


@triton.jit(do_not_specialize=["k"])
def _select_kernel(
    key_ptr: tl.tensor,
    valid_ptr: tl.tensor,
    index_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    length: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Program p selects from row p of `key` and `valid` [R, length] into row p of `index` and `weight` [R, k]."""
    program = tl.program_id(0).to(tl.int64)
    key_ptr += program * length
    valid_ptr += program * length
    index_ptr += program * k
    weight_ptr += program * k
    lane = tl.arange(0, BLOCK)

    first_keys = _ordered_keys(key_ptr, valid_ptr, lane, length)
    selectable = (first_keys > _UNSELECTABLE).to(tl.int32)
    # Per lane, the highest key and the first row that holds it; over the lanes, likewise.
    best, best_row = first_keys, lane
    for start in range(BLOCK, length, BLOCK):
        keys = _ordered_keys(key_ptr, valid_ptr, start + lane, length)
        selectable += (keys > _UNSELECTABLE).to(tl.int32)
        best_row = tl.where(keys > best, start + lane, best_row)
        best = tl.maximum(best, keys)
    at_lo = tl.sum(selectable)
    taken = tl.minimum(at_lo, k)
    top = tl.min(tl.where(best == tl.max(best), best_row, 0x7FFFFFFF))

    # 64 bits hold lo + hi and hi - lo.
    lo = tl.full([], _NAN, tl.int64)
    hi = tl.full([], _INFINITY + 1, tl.int64)
    at_hi = tl.full([], 0, tl.int32)
    while (at_lo != taken) & (hi - lo > 1):
        middle = (lo + hi) >> 1
        threshold = middle.to(tl.int32)
        above = (first_keys >= threshold).to(tl.int32)
        for start in range(BLOCK, length, BLOCK):
            keys = _ordered_keys(key_ptr, valid_ptr, start + lane, length)
            above += (keys >= threshold).to(tl.int32)
        count = tl.sum(above)
        if count >= taken:
            lo, at_lo = middle, count
        else:
            hi, at_hi = middle, count

    missing = k - taken
    ties = taken - at_hi
    certain_from, tie_from = hi.to(tl.int32), lo.to(tl.int32)
    # One scan counts both kinds of row before each: ties in the high half, certain ones in the low half.
    before = tl.full([], 0, tl.int64)
    up_to_top = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        row = start + lane
        keys = _ordered_keys(key_ptr, valid_ptr, row, length)
        certain = keys >= certain_from
        tie = (keys >= tie_from) & (keys < certain_from)
        one = (tie.to(tl.int64) << 32) + certain.to(tl.int64)
        seen = before + tl.cumsum(one) - one
        tie_rank = (seen >> 32).to(tl.int32)
        place = seen.to(tl.int32) + tl.minimum(tie_rank, ties)
        chosen = certain | (tie & (tie_rank < ties))
        place += tl.where(row > top, missing, 0)
        tl.store(index_ptr + place, row.to(tl.int64), chosen)
        tl.store(weight_ptr + place, 1.0, chosen)
        before += tl.sum(one)
        up_to_top += tl.sum((chosen & (row <= top)).to(tl.int32))

    # Places are missing only where every selectable row is taken. With none, `top` is 0, the first of equal keys.
    for start in range(0, missing, BLOCK):
        repetition = start + lane
        tl.store(index_ptr + up_to_top + repetition, top.to(tl.int64), repetition < missing)
        tl.store(weight_ptr + up_to_top + repetition, 0.0, repetition < missing)
