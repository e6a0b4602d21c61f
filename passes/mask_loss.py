"""Replaces head and cross-entropy by `cggr::masked_loss` over hidden rows.

The logits of the training rows then exist only inside the operator, a batch whose labels are all ignored has loss zero
(still connected to every parameter) instead of 0 / 0, and rows that only fill up the selection count for nothing.

Rules that weigh what they select make the loss an estimate of the batch's: with weights w = 1 / π, Σ w·nll over the
batch's counted tokens, which is unbiased; with weights that stand for shares, Σ w·nll / Σ w.

A loss that the model reduces by `sum` (divided later by `num_items_in_batch`, which counts the whole batch) is scaled
by counted tokens of the batch / counted tokens kept: it estimates the batch's sum, so gradient accumulation keeps the
gradient scale of plain training.
"""

from __future__ import annotations

import cggr_compile.kernels.ops  # noqa: F401  registers torch.ops.cggr
import torch
from cggr_compile.kernels.selection import rule_of
from cggr_compile.passes.gather_rows import main_roots
from cggr_compile.passes.score_rows import head_parameters, rows_of
from cggr_compile.passes.subgraph import clone
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.program import Builder, Program, Region, is_tensor, value

aten = torch.ops.aten


def mask_loss(program: Program, config: RoutingConfig) -> Program:
    """Inserts `cggr::masked_loss` and the outputs of the rewritten graph: the model's own, of which only scalars (and,
    with `keep_logits`, everything) survive, then rows, weights, scores, counts, a low-rank router head's image and the
    mean confidence."""
    assert program.head is not None
    head, routing = program.head, program.routing
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router", "score", "select", "gather")
    known = dict(builder.env)
    env = clone(builder, [head.hidden, head.target], known)
    builder.env.update(env)
    builder.part = "loss"
    weight, bias = head_parameters(builder, head, env)
    target = env[head.target]
    if routing.weights is not None:
        target = _without_fillers(builder, target, builder.env[routing.weights])
    row_weight, reduction, num_items = None, head.reduction, None
    weighting = "none" if routing.weights is None else rule_of(config.selection).weighting
    if weighting != "none":
        row_weight = _by_token(builder, target, builder.env[routing.weights])
    if weighting == "inverse":
        assert routing.counts is not None
        if reduction == "mean":
            counted = builder.call(aten.sum.default, builder.env[routing.counts])
            reduction, num_items = "num_items", builder.call(aten.clamp_min.default, counted, 1)
    builder.region = head.loss.meta["cggr_region"]
    loss = builder.call(
        torch.ops.cggr.masked_loss.default,
        rows_of(builder, head, env[head.hidden]),
        weight,
        bias,
        target,
        row_weight,
        head.scale,
        head.divisor,
        head.softcap,
        head.ignore_index,
        reduction,
        0.0,
        0.0,
        None,
        num_items,
    )
    if head.reduction == "sum" and weighting != "inverse" and routing.counts is not None:
        loss = _scaled_to_batch(builder, loss, target, row_weight, builder.env[routing.counts])
    builder.region, builder.part = Region(), "main"
    outputs = [out if _survives(out, config) else None for out in program.outputs]
    roots = [node for node in main_roots(program) if node in outputs or node not in program.outputs]
    env = clone(builder, roots, {**env, head.loss: loss})
    builder.env.update(env)
    extra = (
        routing.rows,
        routing.weights,
        routing.scores,
        routing.counts,
        routing.basis_image,
        routing.confidence,
    )
    builder.output(
        tuple(None if out is None else builder.env[out] for out in outputs)
        + tuple(None if node is None else builder.env[node] for node in extra)
    )
    return builder.finish("mask_loss")


def _survives(out: object, config: RoutingConfig) -> bool:
    """Whether an output is still returned; what is not would force the logits of every row into memory."""
    return is_tensor(out) and (config.keep_logits or value(out).dim() == 0)


def _without_fillers(builder: Builder, target: fx.Node, weights: fx.Node) -> fx.Node:
    """Targets of the rows of weight 0 are ignored."""
    assert builder.program.head is not None
    rows = builder.call(aten.sym_size.int, weights, 0)
    by_row = builder.call(aten.view.default, target, [rows, -1])
    filler = builder.call(aten.unsqueeze.default, builder.call(aten.eq.Scalar, weights, 0), 1)
    ignored = builder.program.head.ignore_index
    masked = builder.call(aten.masked_fill.Scalar, by_row, filler, ignored)
    return builder.call(aten.view.default, masked, [-1])


def _by_token(builder: Builder, target: fx.Node, weights: fx.Node) -> fx.Node:
    """The rows' weights [k], one for each of their targets [N]."""
    rows = builder.call(aten.sym_size.int, weights, 0)
    by_row = builder.call(aten.view.default, target, [rows, -1])
    ones = builder.call(aten.ones_like.default, by_row, dtype=torch.float32)
    weighed = builder.call(aten.mul.Tensor, ones, builder.call(aten.unsqueeze.default, weights, 1))
    return builder.call(aten.view.default, weighed, [-1])


def _scaled_to_batch(
    builder: Builder, loss: fx.Node, target: fx.Node, row_weight: fx.Node | None, counts: fx.Node
) -> fx.Node:
    """The kept tokens' (weighted) sum, times the batch's counted tokens over the kept ones (their weights' sum)."""
    assert builder.program.head is not None
    kept = builder.call(aten.ne.Scalar, target, builder.program.head.ignore_index)
    if row_weight is None:
        kept = builder.call(aten.clamp_min.default, builder.call(aten.sum.default, kept), 1)
    else:
        kept = builder.call(aten.sum.default, builder.call(aten.mul.Tensor, row_weight, kept))
        kept = builder.call(aten.where.ScalarSelf, builder.call(aten.eq.Scalar, kept, 0), 1.0, kept)
    share = builder.call(aten.div.Tensor, builder.call(aten.sum.default, counts), kept)
    return builder.call(aten.mul.Tensor, loss, share)
