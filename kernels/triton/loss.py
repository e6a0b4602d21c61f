"""`masked_loss` without logits, by one of three algorithms.

`one_pass` computes the gradients with the loss, a block of rows at a time: the exponentials of a block's logits are
written once, unnormalised (2^(x - x[target])), and both gradient products read them. Normalisation is a factor a row,
which multiplies the rows of hidden and of hidden's gradient instead: three matrix products in all, as many as with
stored logits.

`one_pass_small` is the same in smaller blocks: less memory, for more additions to the head's gradient.

`recompute` saves each row's log-sum-exp in the forward pass, a fourth product, and in the backward pass makes the
gradient by the logits a block of columns at a time. It needs the least memory and takes every dtype.

Both are deterministic: no atomics, every sum in a fixed order. Products are summed in fp32 over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from cggr_compile.kernels.reference.rows import LossArguments
from cggr_compile.kernels.triton import head
from cggr_compile.kernels.triton.blocks import (
    Exponentials,
    add_column_sums,
    add_product,
    aligned,
    product,
    scale_rows,
)
from cggr_compile.kernels.triton.gather import gather_backward
from cggr_compile.kernels.triton.rows import Rows, counted_first
from cggr_compile.kernels.triton.score import Head, Statistics, target_logits
from cggr_compile.kernels.triton.tiles import tile_for
from torch import Tensor

ONE_PASS_BYTES = {"one_pass": 2**31, "one_pass_small": 2**29}
"""The algorithms that make the gradients with the loss, each with the most bytes of exponentials that it holds, a block
of rows by the whole vocabulary."""
RECOMPUTE_BYTES = 2**26
"""Most bytes of gradients by logits that `recompute` holds: all rows by a block of columns."""


class Outcome(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: 0-d fp32.
        row_loss: fp32 [M], 0 for ignored rows, before any weight.
        divisor: 0-d fp32, what the weighted sum was divided by.
        log_total, missed: fp32 [M], each row's log-sum-exp in units of log 2 and the probability that it leaves to
            other classes than its target, 0 for ignored rows (`recompute`; else empty).
        hidden, weight, bias: the gradients for a `grad` of 1, where wanted (in one pass; else empty), for `scaled`;
            of the weight in fp32 where it was added up, of the bias always.
        figures: fp32 [3], those of `reference.measured_loss`, where they are wanted (else empty).
    """

    loss: Tensor
    row_loss: Tensor
    divisor: Tensor
    log_total: Tensor
    missed: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    figures: Tensor


def one_pass_rows(algorithm: str, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a block of an algorithm of `ONE_PASS_BYTES`."""
    most = ONE_PASS_BYTES[algorithm] // (classes * dtype.itemsize)
    return _evenly(rows, max(1, most), tile_for(dtype, device).rows)


def forward_scratch(given: LossArguments, wanted: Sequence[bool], algorithm: str) -> int:
    """Bytes that `forward` holds at most beside its arguments and its results."""
    hidden, weight = given.hidden, given.weight
    rows, (classes, width) = (given.target if given.rows is None else given.rows).shape[0], weight.shape
    gathered = rows * width * hidden.itemsize
    if algorithm not in ONE_PASS_BYTES or not any(wanted):
        return gathered
    height = min(rows, one_pass_rows(algorithm, rows, classes, hidden.dtype, hidden.device))
    tiles = triton.cdiv(classes, tile_for(hidden.dtype, hidden.device).columns)
    # Of a block: exponentials, a product in fp32, rows times their scale, sum and maximum of each tile.
    of_row = aligned(classes, hidden) * hidden.itemsize + width * (4 + hidden.itemsize) + 2 * 4 * tiles
    return gathered + height * of_row


def backward_scratch(given: LossArguments) -> int:
    """Bytes that `backward` holds at most beside its arguments and its results."""
    rows, width = (given.target if given.rows is None else given.rows).shape[0], given.hidden.shape[1]
    return rows * width * (given.hidden.itemsize + 4) + RECOMPUTE_BYTES


def why_not_one_pass(dtype: torch.dtype) -> str | None:
    """The reason why `one_pass` does not apply, or None: its exponentials need the range of an 8-bit exponent."""
    return "float16 cannot hold unnormalised exponentials" if dtype == torch.float16 else None


def default_algorithm(dtype: torch.dtype) -> str:
    """`"one_pass"` where it applies, else `"recompute"`."""
    return "recompute" if why_not_one_pass(dtype) else "one_pass"


def forward(given: LossArguments, wanted: Sequence[bool], algorithm: str, summed: bool, measured: bool) -> Outcome:
    """The loss, in one pass the wanted gradients of (hidden, weight, bias), and, `measured`, what was predicted.

    The weight's gradient is added up over blocks of rows, in fp32, where one does not take all, or `summed`.
    """
    hidden, weight = given.hidden, given.weight
    numbers = given.ignore_index, given.row_weight, given.reduction, given.num_items
    chosen = counted_first(hidden, given.target, given.rows, *numbers)
    if chosen.target.shape[0] == 0:
        figures = hidden.new_zeros(3 if measured else 0, dtype=torch.float32)
        return _of_no_rows(given, wanted if algorithm in ONE_PASS_BYTES else (False,) * 3, figures)
    linear = _head(given)
    own, shift = target_logits(chosen, linear)

    def in_order(x: Tensor) -> Tensor:
        return torch.empty_like(x).scatter_(0, chosen.place, x)

    if algorithm in ONE_PASS_BYTES and any(wanted):
        height = one_pass_rows(algorithm, chosen.target.shape[0], len(weight), hidden.dtype, hidden.device)
        of_rows = tuple(own.new_empty((2, own.shape[0]))) if measured else None
        every_row = given.rows is None
        losses, gradients = _one_pass(chosen, hidden, linear, own, shift, every_row, wanted, of_rows, height, summed)
        log_total, missed = (hidden.new_empty(0, dtype=torch.float32) for _ in range(2))
    else:
        (losses, *statistics), of_rows = _by_statistics(chosen, linear, own, measured)
        log_total, missed = map(in_order, statistics)
        gradients = hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    # A row of weight 0 still counts with its loss, as 0 · NaN is NaN in the reference.
    loss = torch.dot(losses, chosen.weights) / chosen.divisor
    figures = hidden.new_empty(0, dtype=torch.float32)
    if of_rows is not None:
        figures = torch.stack([chosen.count[0].float(), *(x.sum() for x in of_rows)])
    return Outcome(loss, in_order(losses), chosen.divisor, log_total, missed, *gradients, figures)


def _head(given: LossArguments) -> Head:
    return Head(given.weight, given.bias, given.factor, given.softcap)


def _of_no_rows(given: LossArguments, wanted: Sequence[bool], figures: Tensor) -> Outcome:
    hidden = given.hidden
    zero, one = hidden.new_zeros((), dtype=torch.float32), hidden.new_ones((), dtype=torch.float32)

    def zeros(x: Tensor | None, want: bool) -> Tensor:
        return hidden.new_empty(0) if x is None or not want else x.new_zeros(x.shape)

    gradients = zeros(hidden, wanted[0]), zeros(given.weight, wanted[1]), zeros(given.bias, wanted[2])
    of_rows, log_total, missed = (hidden.new_empty(0, dtype=torch.float32) for _ in range(3))
    return Outcome(zero, of_rows, one, log_total, missed, *gradients, figures)


def backward(
    grad: Tensor, given: LossArguments, divisor: Tensor, log_total: Tensor, missed: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The wanted gradients of (hidden, weight, bias) by `recompute`; an unwanted one is empty."""
    hidden, weight, rows = given.hidden, given.weight, given.rows
    chosen = counted_first(hidden, given.target, rows, given.ignore_index, given.row_weight)
    if chosen.target.shape[0] == 0:
        outcome = _of_no_rows(given, wanted, hidden.new_empty(0))
        return outcome.hidden, outcome.weight, outcome.bias
    per_row = chosen.weights * (grad * (given.factor / divisor))
    log_total, missed = log_total[chosen.place], missed[chosen.place]
    shift = torch.where(_counted(chosen), log_total, torch.inf)
    # d l / d x[v] = p[v] - [v = t]; at the target that is -missed, which keeps its precision where p is nearly 1.
    at_target = -per_row * missed
    block = Exponentials(chosen, _head(given), shift)
    size, classes = chosen.hidden.shape[0], weight.shape[0]
    columns = _evenly(classes, max(1, RECOMPUTE_BYTES // (size * hidden.element_size())), block.tile.columns)
    of_hidden = None
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else weight.new_empty(0)
    of_bias = weight.new_zeros(classes, dtype=torch.float32) if wanted[2] else weight.new_empty(0, dtype=torch.float32)
    buffer = hidden.new_empty((size, aligned(columns, hidden)))
    width = hidden.shape[1]
    ones = torch.ones_like(per_row)
    for first in range(0, classes, columns):
        last = min(first + columns, classes)
        gradient = buffer[:, : last - first]
        block.normalized(gradient, per_row, at_target, first)
        if wanted[0]:
            of_hidden = add_product(of_hidden, gradient, weight[first:last])
        if wanted[1]:
            torch.mm(gradient.T, chosen.hidden[:, :width], out=of_weight[first:last])
        if wanted[2]:
            add_column_sums(of_bias[first:last], gradient, ones)
    index = chosen.index
    del buffer, block, chosen
    returned = hidden.new_empty(0)
    if of_hidden is not None and rows is None:
        returned = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        scale_rows(of_hidden, ones, returned, index)
    elif of_hidden is not None:
        returned = gather_backward(of_hidden.to(hidden.dtype), index, 0, hidden.shape[0])
    return returned, of_weight, of_bias.to(weight.dtype)


def _counted(rows: Rows) -> Tensor:
    return torch.arange(rows.target.shape[0], device=rows.count.device) < rows.count


def _by_statistics(
    rows: Rows, linear: Head, own: Tensor, measured: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Each row's loss, log-sum-exp in units of log 2, and the probability of the classes other than its target; and,
    `measured`, its entropy and whether it is a hit.

    With r = Σ exp(x - x[t]) over the others, lse = x[t] + log(1 + r) and the probability is r / (1 + r): precise where
    the target's is nearly 1. Where r overflows, lse is that of the others alone.
    """
    counted = _counted(rows)
    statistics = Statistics(rows, linear, ("entropy",) if measured else (), without_target=True)
    most = statistics.most.amax(0)
    base = torch.where(most == -torch.inf, 0.0, most)
    total = (statistics.total * torch.exp2(statistics.most - base)).sum(0)
    others = base + total.log2()  # the log-sum-exp of the other classes
    distance = others - own * head.LOG2_E.value
    ratio = torch.where(distance > 64, torch.inf, torch.exp2(base - own * head.LOG2_E.value) * total)
    losses = torch.where(ratio.isinf(), distance * head.LN_2.value, ratio.log1p())
    log_total = torch.where(ratio.isinf(), others, own * head.LOG2_E.value + ratio.log1p() * head.LOG2_E.value)
    missed = torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))
    of_rows = _predicted(statistics, own * head.LOG2_E.value) if measured else None

    def in_counted(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.where(counted, x, 0.0) for x in values)

    return in_counted((losses, log_total, missed)), None if of_rows is None else in_counted(of_rows)


def _predicted(others: Statistics, own: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's entropy, and 1.0 where no other class has a larger logit than the target's `own`, in units of log 2.

    With c the largest of all, Z = Σ 2^(x - c) and M = Σ 2^(x - c) (x - c), where each slice s of the vocabulary adds
    2^(c_s - c) (M_s + Z_s (c_s - c)), the entropy is log 2 (log2 Z - M / Z).
    """
    largest = others.most.amax(0)
    base = torch.maximum(largest, own)
    slices = ((others.most, others.total, others.moment), (own, torch.ones_like(own), torch.zeros_like(own)))
    total, moment = torch.zeros_like(own), torch.zeros_like(own)
    for most, of_total, of_moment in slices:
        lower = most - base
        scale = torch.exp2(lower)
        moved = torch.where(scale > 0, of_total * lower, 0.0)
        total = total + (scale * of_total).view(-1, own.shape[0]).sum(0)
        moment = moment + (scale * (of_moment + moved)).view(-1, own.shape[0]).sum(0)
    return head.LN_2.value * (total.log2() - moment / total), (own >= largest).float()


def _one_pass(
    rows: Rows,
    hidden: Tensor,
    linear: Head,
    own: Tensor,
    shift: Tensor,
    every_row_once: bool,
    wanted: Sequence[bool],
    of_rows: tuple[Tensor, ...] | None,
    height: int,
    summed: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Each row's loss and the wanted gradients of the weighted, divided sum of losses, `height` rows at a time; fills
    the entropies and hits `of_rows`, where they are wanted."""
    weight = linear.weight
    size, classes, width = rows.hidden.shape[0], weight.shape[0], hidden.shape[1]
    block = Exponentials(rows, linear, shift)
    losses, scale = own.new_empty((2, size))
    loss_factor = rows.weights * (linear.factor / rows.divisor)
    of_hidden = hidden.new_empty((size, width)) if wanted[0] else hidden.new_empty(0)
    of_weight: Tensor | None = None
    of_bias = weight.new_zeros(classes, dtype=torch.float32) if wanted[2] else weight.new_empty(0)
    buffer = hidden.new_empty((height, aligned(classes, hidden)))
    for first in range(0, size, height):
        part = slice(first, min(first + height, size))
        values = buffer[: part.stop - first, :classes]
        block.unnormalized(values, own, loss_factor, losses, scale, of_rows, part)
        if wanted[0]:
            # Rows that are taken once each go straight to where they came from.
            to, row_of = (of_hidden, rows.index[part]) if every_row_once else (of_hidden[part], None)
            scale_rows(product(values, weight), scale[part], to, row_of)
        if wanted[1]:
            by_scale = torch.empty((values.shape[0], width), dtype=weight.dtype, device=weight.device)
            scale_rows(rows.hidden[part, :width], scale[part], by_scale, None)
            once = height >= size and not summed
            of_weight = torch.mm(values.T, by_scale) if once else add_product(of_weight, values.T, by_scale)
        if wanted[2]:
            add_column_sums(of_bias, values, scale[part])
    del buffer, values
    if wanted[0] and not every_row_once:
        of_hidden = gather_backward(of_hidden, rows.index, 0, hidden.shape[0])
    return losses, (of_hidden, weight.new_empty(0) if of_weight is None else of_weight, of_bias)


def _evenly(size: int, most: int, multiple: int) -> int:
    """The size of equal blocks of at most about `most`, a multiple of `multiple`, that cover `size`."""
    blocks = triton.cdiv(size, max(most, multiple))
    return triton.cdiv(triton.cdiv(size, blocks), multiple) * multiple
