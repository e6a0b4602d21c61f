"""Plain-torch semantics of the router's cheap heads: estimates of what `reference.score` computes.

Each takes the operands and options of `reference.score` and returns the same statistics, float32 [Q, N] without a
gradient, 0 in rows whose target is ignored. The statistics are `reference.ShiftedRows`; what differs is the logits.

* `sampled_score` reads C of the V columns. With weights w_c that are the inverse of the chance of being drawn,
  Σ w_c exp(x_c) is an unbiased estimate of Z = Σ exp(x_c). The target's own logit is exact and enters Z once, exactly,
  in place of its weighted column: E[Σ_{c≠t} w_c exp(x_c)] + exp(x_t) is Z still, the largest term of a well-predicted
  token costs no variance, and the nll stays non-negative.
* `fp8_score` multiplies hidden states and head in float8_e4m3fn with one scale a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from cggr_compile.kernels.reference.rows import ShiftedRows, scaled, statistics
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0

SAMPLED_QUANTITIES = ("nll", "entropy")
"""What a sample of the columns can estimate; the largest logits of a sample are not those of the vocabulary."""


def sample_columns(
    target: Tensor, noise: Tensor, classes: int, frequent: int, sampled: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The columns that `sampled_score` reads: int64 [C], and how many columns each stands for, float32 [C].

    First, by index, the `frequent` most frequent targets of this batch (ties, and classes that do not occur, to the
    lower index), each for itself, then `sampled` of the other V - F columns, each for (V - F) / U: a systematic sample
    in the order of the vocabulary, one every (V - F) / U from a start that `noise` (float32 [1], uniform in [0, 1))
    draws. Every column has the same chance, and as tokenizers number tokens by frequency the sample is spread over
    frequencies. Where F + U >= V these are all columns, each for itself.

    The batch's own targets, rather than a running histogram, are the frequent ones: that leaves no state to keep.
    `target` [N] is of any integer dtype.
    """
    if frequent + sampled >= classes:
        return torch.arange(classes, device=noise.device), torch.ones(classes, dtype=noise.dtype, device=noise.device)
    counted = torch.where(target == ignore_index, classes, target).long()
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=noise.device)
    counts.index_add_(0, counted, torch.ones_like(counted))
    place = torch.arange(classes, device=noise.device)
    # Distinct keys: the order of ties is the index's, whatever `topk` does with them.
    keys = counts[:classes] * classes + (classes - 1 - place)
    least = keys.topk(frequent).values.amin() if frequent else keys.amax() + 1
    so_far = (keys >= least).cumsum(0)
    others = classes - frequent
    # In integers, the unit being 2**-24: a float32 in [0, 1) drawn uniformly is a multiple of it. This is
    # (place + noise) · others / sampled, rounded down in two steps: inductor computes products of an index in 32 bits.
    start = (place[:sampled] * others + (noise * 2**24).long() * others // 2**24) // sampled
    columns = [torch.searchsorted(so_far, place[1 : frequent + 1]), torch.searchsorted(place + 1 - so_far, start + 1)]
    stands_for = noise.new_full((frequent + sampled,), others / sampled)
    return torch.cat(columns), torch.where(place[: frequent + sampled] < frequent, 1.0, stands_for)


def sampled_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    columns: Tensor,
    column_weight: Tensor,
    quantities: Sequence[str],
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`reference.score` from the exact target logit and `columns` (int64 [C], distinct), float32 [Q, N].

    Column c stands for `column_weight[c]` (float32 [C], at least 0) columns; with every column at weight 1 the result
    is the exact one up to the order of summation. Quantities are those of SAMPLED_QUANTITIES. A NaN hidden state gives
    NaN; a NaN of a column that is not read is not seen.
    """
    hidden, weight, bias = _detached(hidden, weight, bias)
    read = weight.index_select(0, columns)
    read_bias = None if bias is None else bias.index_select(0, columns)

    def rows_of(hidden: Tensor, target: Tensor) -> ShiftedRows:
        own = _target_linear(hidden, weight, bias, target)
        own = scaled(own, scale, divisor, softcap).float()
        drawn = scaled(F.linear(hidden, read, read_bias), scale, divisor, softcap).float()
        drawn = drawn.masked_fill(columns == target.unsqueeze(1), -math.inf)
        x = torch.cat([own.unsqueeze(1), drawn], 1)
        return ShiftedRows(x, torch.zeros_like(target), F.pad(column_weight, (1, 0), value=1.0))

    return statistics(rows_of, hidden, target, quantities, columns.shape[0] + 1, ignore_index)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [R, D] of any floating dtype as float8_e4m3fn values [R, D] and float32 scales [R], x ≈ values · scale.

    The scale is amax / 448, the largest float8_e4m3fn, and 1 for a row of zeros; a NaN or an infinity makes its row
    NaN where it stands.
    """
    scale = x.abs().amax(-1).float() / FP8_LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    values = (x.float() / scale.unsqueeze(-1)).clamp(-FP8_LARGEST, FP8_LARGEST)
    return values.to(FP8), scale


def fp8_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`reference.score` of rows quantised by `quantize_rows`, float32 [Q, N].

    Products are summed in fp32, multiplied by both scales, and bias, scale, divisor and soft-cap applied in fp32; here
    by casting the float8 values back, so that it runs on every device.
    """
    hidden, weight, bias = _detached(hidden, weight, bias)
    with without_autocast(hidden):
        weight_values, weight_scale = quantize_rows(weight)
        weight_values = weight_values.float()

        def rows_of(hidden: Tensor, target: Tensor) -> ShiftedRows:
            values, row_scale = quantize_rows(hidden)
            x = F.linear(values.float(), weight_values) * row_scale.unsqueeze(1) * weight_scale
            x = x if bias is None else x + bias.float()
            return ShiftedRows(scaled(x, scale, divisor, softcap), target)

        return statistics(rows_of, hidden, target, quantities, weight.shape[0], ignore_index)


def _detached(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


def _target_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The linear's entry [R] of each row's own target, rounded (and cast by autocast) as a linear's."""
    own = torch.bmm(hidden.unsqueeze(1), weight.index_select(0, target).unsqueeze(2)).flatten()
    return own if bias is None else own + bias.index_select(0, target)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Products in the dtype they are written in, also where an operator on `x` was lowered into an autocast region."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
