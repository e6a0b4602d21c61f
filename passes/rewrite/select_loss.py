"""Selects the tokens of the batch whose logits enter the loss.

Tokens are the rows that the loss sees, over the whole batch; those whose label is ignored are not selectable. A rule
whose weights only say what counts fills up with ignored tokens where fewer than k are selectable: they are ignored by
the loss too, so no weight is needed and the loss is the mean over the others. A rule that fills up by repeating a token
with weight 0 is brought into that form, or the token would enter the loss as often as it is repeated; where weights
enter the loss, those of 0 do it. Behind the sequence route, the batch is what that one kept.

Before::

    score   %scores: [B · S]

After::

    %kept_loss: k = an input
    select  %rows = cggr.select(%scores, %counted, %kept_loss, "topk", None)    # of the rows that the loss sees
"""

from __future__ import annotations

import dataclasses

import torch
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.rewrite.shared import drawn, first, fresh_size, preferred, without_fillers
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import clone
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.roles import quiet_region

aten = torch.ops.aten


def select_loss(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the inputs `kept_loss` and, for rules that draw, `loss_noise` ([N] fp32, N the rows that the loss sees);
    sets `routing.kept_loss`, `.loss_rows` ([k] int64, sorted, into those rows) and `.loss_weights` ([k] fp32, or None
    where every selected row counts alike)."""
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept_loss", fresh_size(program, "kept_loss", value(program.head.target).shape[0]))
    rule = rule_of(config.selection)
    target = program.head.target
    noise = builder.tensor_input("loss_noise", value(target).shape, target) if rule.needs_noise else None
    builder.copy_parts("router", "score", "select", "whole", "gather")
    builder.part, builder.region = "select", quiet_region(program)
    target = clone(builder, [target], dict(builder.env))[target]
    if program.routing.weights is not None:
        target = without_fillers(builder, target, builder.env[program.routing.weights])
    counted = builder.call(aten.ne.Scalar, target, program.head.ignore_index)
    scores = _scores(builder, program) if rule.needs_scores else noise
    weights = None
    if rule.needs_scores and noise is not None:
        rows, weights = drawn(builder, config, scores, counted, kept, noise)
    if weights is None:
        rows = first(builder, scores, counted, kept)
    elif rule.weighting == "none":
        rows, weights = first(builder, preferred(builder, rows, weights, counted), counted, kept), None
    elif rule.weighting == "inverse":
        weights = builder.call(aten.mul.Tensor, weights, builder.call(aten.sum.default, counted))
    builder.copy_rest()
    routing = dataclasses.replace(builder.routing(), kept_loss=kept, loss_rows=rows, loss_weights=weights)
    return builder.finish("select_loss", routing=routing)


def _scores(builder: Builder[Analysed], program: Analysed) -> fx.Node:
    """The router's token scores [N], of the kept sequences where the sequence route selected some."""
    routing = program.routing
    assert routing.token_scores is not None
    scores = builder.env[routing.token_scores]
    if routing.rows is None or routing.counts is None:
        return scores
    sequences = builder.call(aten.sym_size.int, builder.env[routing.counts], 0)
    by_row = builder.call(aten.view.default, scores, [sequences, -1])
    taken = builder.call(aten.index_select.default, by_row, 0, builder.env[routing.rows])
    return builder.call(aten.view.default, taken, [-1])
