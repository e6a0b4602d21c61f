"""Scores every row: the router's hidden states go through the head row by row, and a row's score is the mean over
its counted tokens.

The row moves between head and loss (views, slices) are replayed on the hidden states in front of the head; the head
acts on each row alone, so this commutes, and logits never exist in the graph. Targets come from the model's own label
path, so shift and ignored positions are the model's.

Before::

    router  %norm: [B, S, D]

After::

    score   %nll = cggr.score(%rows, lm_head.weight, None, %target, ["nll"])
    score   %scores = sum over tokens / counted tokens    # [B]
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.reference.rows import SCORINGS
from cggr_compile.passes.rewrite.score_head import HeadCall, score_head
from cggr_compile.passes.rewrite.shared import head_parameters, mean_by_row, rows_of
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import clone
from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import quiet_region

aten = torch.ops.aten


def score_rows(program: Analysed, config: RoutingConfig) -> Analysed:
    """Inserts the router's head (`score_head`) and the mean over tokens; sets `routing.token_scores` [N],
    `.scores` [B], `.valid` [B], `.counts` [B] and, where k follows it, `.confidence` (0-d).

    A row without counted tokens scores 0 and is not valid. Everything is fp32 and without gradient.
    """
    assert program.routing.router_hidden is not None
    head = program.head
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router")
    builder.part, builder.region = "score", quiet_region(program)
    hidden = rows_of(builder, head, builder.env[program.routing.router_hidden])
    inputs = {node: builder.env[node] for node in program.placeholders}
    target = clone(builder, [head.target], inputs)[head.target]
    weight, bias = head_parameters(builder, head, inputs)
    options = (head.scale, head.divisor, head.softcap, head.ignore_index)
    quantities, confidence = SCORINGS[config.scoring], None
    measured = (*quantities, "confidence") if config.follows_confidence else quantities
    statistics = score_head(builder, config, HeadCall((hidden, weight, bias, target), measured, options))
    if config.follows_confidence:
        of_tokens = builder.call(aten.select.int, statistics, 0, len(quantities))
        confidence = _mean_over_counted(builder, of_tokens, builder.call(aten.ne.Scalar, target, head.ignore_index))
        statistics = builder.call(aten.slice.Tensor, statistics, 0, 0, len(quantities))
    tokens = builder.call(aten.sum.dim_IntList, statistics, [0])
    scores, counts = mean_by_row(builder, head, tokens, target)
    valid = builder.call(aten.gt.Scalar, counts, 0)
    builder.copy_rest()
    routing = builder.routing(token_scores=tokens, scores=scores, valid=valid, counts=counts, confidence=confidence)
    return builder.finish("score_rows", routing=routing)


def _mean_over_counted(builder: Builder[Analysed], of_tokens: fx.Node, counted: fx.Node) -> fx.Node:
    """0-d: the mean over the counted tokens whose value is not NaN; 0 where there is none."""
    known = builder.call(aten.logical_not.default, builder.call(aten.isnan.default, of_tokens))
    counted = builder.call(aten.logical_and.default, counted, known)
    total = builder.call(aten.sum.default, builder.call(aten.nan_to_num.default, of_tokens, 0.0))
    return builder.call(
        aten.div.Tensor, total, builder.call(aten.clamp_min.default, builder.call(aten.sum.default, counted), 1)
    )
