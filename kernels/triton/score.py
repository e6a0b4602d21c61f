"""`score` and its estimates in one pass over the vocabulary: the logits never exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from cggr_compile.kernels.reference.router_heads import quantize_rows
from cggr_compile.kernels.triton import head
from cggr_compile.kernels.triton import statistics as statistics_kernels
from cggr_compile.kernels.triton.gather import gather
from cggr_compile.kernels.triton.launch import launch
from cggr_compile.kernels.triton.rows import Rows, counted_first, padded
from cggr_compile.kernels.triton.tiles import GROUP, Tile, descriptor, precision, splits_for, tile_for
from torch import Tensor

QUANTITIES = ("nll", "entropy", "margin", "confidence")


class HeadOptions(NamedTuple):
    """What the arguments of `reference.score` end with."""

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float = 0.0
    ignore_index: int = -100

    @property
    def factor(self) -> float:
        """What the head's outputs are multiplied by."""
        return self.scale / self.divisor


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    *options: Any,
    **named: Any,
) -> Tensor:
    """`reference.score`, except that logits stay in fp32 and that a label outside [0, V) makes its row's nll NaN.

    Rows with an ignored label are not computed.
    """
    given = HeadOptions(*options, **named)
    rows = counted_first(hidden, target, None, given.ignore_index)
    return _scores(rows, Head(weight, bias, given.factor, given.softcap), None, quantities)


def sampled_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    columns: Tensor,
    column_weight: Tensor,
    quantities: Sequence[str],
    *options: Any,
    **named: Any,
) -> Tensor:
    """`router_heads.sampled_score`, with the exceptions of `score`."""
    given = HeadOptions(*options, **named)
    rows = counted_first(hidden, target, None, given.ignore_index)
    every = Head(weight, bias, given.factor, given.softcap)
    read_bias = None if bias is None else gather(bias, columns, 0)
    read = every._replace(weight=gather(weight, columns, 0), bias=read_bias)
    return _scores(rows, every, read._replace(log_weight=column_weight.log(), class_of=columns), quantities)


def fp8_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    *options: Any,
    **named: Any,
) -> Tensor:
    """`router_heads.fp8_score`, with the exceptions of `score`; products run on the fp8 tensor cores."""
    given = HeadOptions(*options, **named)
    rows = counted_first(hidden, target, None, given.ignore_index)
    values, row_scale = quantize_rows(rows.hidden)
    weight_values, column_scale = quantize_rows(weight)
    quantised = Head(weight_values, bias, given.factor, given.softcap, row_scale=row_scale, column_scale=column_scale)
    return _scores(rows._replace(hidden=padded(values)), quantised, None, quantities)


class Head(NamedTuple):
    """A head's parameters and options: weight [V, D], bias [V], the factor of its outputs, the soft-cap (0: none).

    Of fp8 values, row_scale [M] and column_scale [V] are their fp32 scales; of a sample of columns, log_weight [V] fp32
    and class_of [V] are the logarithms of their weights and their classes.
    """

    weight: Tensor
    bias: Tensor | None
    factor: float
    softcap: float
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    log_weight: Tensor | None = None
    class_of: Tensor | None = None


def _scores(rows: Rows, own: Head, sample: Head | None, quantities: Sequence[str]) -> Tensor:
    """The quantities [Q, N] of the head `own`, of which `sample` may stand for all columns but the target's."""
    size = rows.target.shape[0]
    out = torch.empty((len(quantities), size), dtype=torch.float32, device=rows.target.device)
    if size == 0:
        return out
    statistics = Statistics(rows, sample or own, quantities, without_target=sample is not None)
    wants = dict.fromkeys(QUANTITIES, -1) | {name: place for place, name in enumerate(quantities)}
    logits = statistics.most
    if wants["nll"] >= 0 or sample is not None:
        logits, _ = target_logits(rows, own)
    block = 128
    launch(
        statistics_kernels.quantities_kernel,
        triton.cdiv(size, block),
        statistics.most,
        statistics.total,
        statistics.moment,
        statistics.second,
        logits,
        rows.place,
        rows.count,
        out,
        size,
        statistics.most.shape[0],
        size,
        WITH_TARGET=sample is not None,
        NLL=wants["nll"],
        ENTROPY=wants["entropy"],
        MARGIN=wants["margin"],
        CONFIDENCE=wants["confidence"],
        BLOCK_M=block,
        num_warps=4,
    )
    # A quantity asked for twice has one place in the kernel.
    for place, name in enumerate(quantities):
        if wants[name] != place:
            out[place] = out[wants[name]]
    return out


class Statistics:
    """Softmax statistics of each row and slice of the vocabulary, fp32 [splits, M]; see `statistics.statistics_kernel`.

    `moment` and `second` are computed where a quantity needs them and are `most` elsewhere.
    """

    def __init__(self, rows: Rows, of: Head, quantities: Sequence[str], without_target: bool = False) -> None:
        hidden = rows.hidden
        size, classes = hidden.shape[0], of.weight.shape[0]
        tile: Tile = tile_for(hidden.dtype, hidden.device)
        splits = splits_for(size, classes, tile, hidden.device)

        def slices(wanted: bool) -> Tensor:
            return hidden.new_empty((splits, size), dtype=torch.float32) if wanted else self.most

        self.most = hidden.new_empty((splits, size), dtype=torch.float32)
        self.total = slices(True)
        self.moment = slices("entropy" in quantities)
        self.second = slices("margin" in quantities)
        launch(
            statistics_kernels.statistics_kernel,
            triton.cdiv(size, tile.rows) * splits,
            descriptor(hidden, tile.rows, tile),
            descriptor(padded(of.weight), tile.columns, tile),
            of.bias if of.bias is None else of.bias.contiguous(),
            of.log_weight,
            of.class_of,
            rows.target,
            of.row_scale,
            of.column_scale,
            rows.count,
            self.most,
            self.total,
            self.moment,
            self.second,
            size,
            classes,
            hidden.shape[1],
            of.factor,
            of.softcap,
            HAS_BIAS=of.bias is not None,
            SOFTCAP=of.softcap > 0,
            WEIGHTED=of.log_weight is not None,
            WITHOUT_TARGET=without_target,
            SCALED=of.row_scale is not None,
            MOMENT="entropy" in quantities,
            SECOND="margin" in quantities,
            SPLITS=splits,
            GROUP=GROUP,
            PRECISION=precision(hidden.dtype),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def target_logits(rows: Rows, of: Head) -> tuple[Tensor, Tensor]:
    """The logit of each row's own label, fp32 [M], NaN where the label is outside [0, V): in nats, 0 where it is
    ignored, and in units of log 2, inf where it is ignored."""
    size = rows.target.shape[0]
    logit, shift = torch.empty((2, size), dtype=torch.float32, device=rows.target.device)
    weight = of.weight if of.weight.stride(1) == 1 else of.weight.contiguous()
    block = 16
    launch(
        head.target_logits_kernel,
        triton.cdiv(size, block),
        rows.hidden,
        weight,
        of.bias if of.bias is None else of.bias.contiguous(),
        rows.target,
        of.row_scale,
        of.column_scale,
        rows.count,
        logit,
        shift,
        size,
        weight.shape[0],
        weight.shape[1],
        rows.hidden.stride(0),
        weight.stride(0),
        of.factor,
        of.softcap,
        HAS_BIAS=of.bias is not None,
        SOFTCAP=of.softcap > 0,
        SCALED=of.row_scale is not None,
        BLOCK_M=block,
        BLOCK_K=128,
        num_warps=4,
    )
    return logit, shift
