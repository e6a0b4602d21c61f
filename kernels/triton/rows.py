"""Which rows a head kernel computes: the selected ones, those with a counted label first.

Everything keeps its shape, so that nothing is read back to the host: kernels get the number of counted rows as a
tensor and leave out the tiles behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cggr_compile.kernels.triton.gather import gather
from cggr_compile.kernels.triton.launch import is_aligned, launch
from torch import Tensor

BLOCK = 4096


class Rows(NamedTuple):
    """M selected rows in the order of computation.

    Attributes:
        index: int64 [M], the row of hidden.
        place: int64 [M], the place in the selection.
        target: int64 [M], the labels; those from `count` on are ignored.
        weights: fp32 [M], 1 or the row's weight; 0 from `count` on.
        count: int32 [1], the number of counted rows.
        divisor: 0-d fp32, what the reduction divides the weighted sum by.
        hidden: [M, D'], the rows themselves, contiguous, D' being D or D padded by zeros (`padded`).
    """

    index: Tensor
    place: Tensor
    target: Tensor
    weights: Tensor
    count: Tensor
    divisor: Tensor
    hidden: Tensor


def counted_first(
    hidden: Tensor,
    target: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    row_weight: Tensor | None = None,
    reduction: str = "sum",
    num_items: Tensor | None = None,
) -> Rows:
    """Gathers `rows` [M] (all of them where None) of hidden [N, D] and target [N], counted labels first, each part in
    the order given."""
    size = target.shape[0] if rows is None else rows.shape[0]
    index, place, labels = target.new_empty((3, size), dtype=torch.int64)
    weights = target.new_empty(size, dtype=torch.float32)
    count = target.new_empty(1, dtype=torch.int32)
    divisor = target.new_empty((), dtype=torch.float32)
    launch(
        _order_kernel,
        1,
        target.contiguous(),
        rows if rows is None else rows.contiguous(),
        row_weight if row_weight is None else row_weight.contiguous(),
        num_items,
        index,
        place,
        labels,
        weights,
        count,
        divisor,
        size,
        ignore_index,
        REDUCTION=reduction,
        BLOCK=BLOCK,
        num_warps=16,
    )
    return Rows(index, place, labels, weights, count, divisor, padded(gather(hidden, index, 0)))


def padded(x: Tensor) -> Tensor:
    """`x` [R, D] as a tensor descriptor takes it: rows contiguous and 16-byte aligned, zeros added at their ends."""
    per_line = 16 // x.element_size()
    if x.shape[1] % per_line:
        return F.pad(x, (0, -x.shape[1] % per_line))
    return x if x.is_contiguous() and is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _order_kernel(  # type: ignore[no-untyped-def]
    target, rows, row_weight, num_items, index, place, labels, weights, count, divisor, size, ignore_index,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    before = 0
    total = 0.0
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        row = i.to(tl.int64)
        if rows is not None:
            row = tl.load(rows + i, inside, 0).to(tl.int64)
        label = tl.load(target + row, inside, ignore_index).to(tl.int64)
        counted = inside & (label != ignore_index)
        weight = counted.to(tl.float32)
        if row_weight is not None:
            weight = tl.load(row_weight + i, counted, 0.0).to(tl.float32)
        so_far = before + tl.cumsum(counted.to(tl.int32), 0)
        # Counted rows fill the front in order, ignored ones the back from its end.
        at = tl.where(counted, so_far - 1, size - 1 - (i - so_far))
        tl.store(index + at, row, inside)
        tl.store(place + at, i, inside)
        tl.store(labels + at, label, inside)
        tl.store(weights + at, weight, inside)
        before += tl.sum(counted.to(tl.int32), 0)
        total += tl.sum(weight, 0)
    tl.store(count, before)
    by = 1.0
    if REDUCTION == "num_items":
        by = tl.load(num_items).to(tl.float32)
    elif REDUCTION == "mean":
        # Without rows, or with weights that cancel, the loss is 0 and its gradients too.
        by = tl.where(total == 0, float("inf"), total)
    tl.store(divisor, by)
