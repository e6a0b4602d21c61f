"""Replaces head and cross-entropy by `cggr::masked_loss` over hidden rows.

The logits of the training rows then exist only inside the operator, a batch whose labels are all ignored has loss zero
(still connected to every parameter) instead of 0 / 0, and rows that only fill up the selection count for nothing.

Rules that weigh what they select make the loss an estimate of the batch's: with weights w = 1 / π, Σ w·nll over the
batch's counted tokens, which is unbiased; with weights that stand for shares, Σ w·nll / Σ w.

A loss that the model reduces by `sum` and divides by an input (`num_items_in_batch`, which counts the whole batch) is
scaled by counted tokens of the batch / counted tokens kept: it estimates the batch's sum, so gradient accumulation has
the gradient scale of plain training. A divisor that the model counts in its rows counts the kept ones, and needs
nothing.

Before::

    main    %logits = aten.linear(%hidden, lm_head.weight)
    main    %loss = aten.cross_entropy_loss(%logits, %target)

After::

    loss    %loss = cggr.masked_loss(%hidden, lm_head.weight, None, %target, …)    # no logits
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from cggr_compile.kernels.reference.selection import rule_name, rule_of
from cggr_compile.passes.rewrite.shared import by_position, head_parameters, mean_by_row, rows_of, without_fillers
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors, clone, descendants
from cggr_compile.ir.program import Analysed, Region, StepOutputs, is_tensor, value
from cggr_compile.ir.roles import main_roots, token_ids
from cggr_compile.ir.sequence_order import packet_of

aten = torch.ops.aten


def mask_loss(program: Analysed, config: RoutingConfig) -> Analysed:
    """Inserts `cggr::masked_loss` and the outputs of the rewritten graph: the model's own, of which scalars, state and
    what the model stores survive (with `keep_logits`, everything), then `StepOutputs`."""
    head, routing = program.head, program.routing
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router", "score", "select", "whole", "gather")
    known = dict(builder.env)
    env = clone(builder, [head.hidden, head.target], known)
    builder.env.update(env)
    builder.part = "loss"
    weight, bias = head_parameters(builder, head, env)
    target = env[head.target]
    if routing.weights is not None:
        target = without_fillers(builder, target, builder.env[routing.weights])
    rows = None if routing.loss_rows is None else builder.env[routing.loss_rows]
    kept = target if rows is None else builder.call(aten.index_select.default, target, 0, rows)
    row_weight, reduction, num_items = _row_weight(builder, config, target), head.reduction, None
    unbiased = row_weight is not None and rule_of(config.selection).weighting == "inverse"
    if unbiased and reduction == "mean":
        reduction, num_items = "num_items", _counted_in_batch(builder, target, least=1)
    builder.region = head.loss.meta["cggr_region"]
    operands = (
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
        rows,
        num_items,
    )
    of_rows = figures = None
    if _is_measured(config):
        measured = builder.call(torch.ops.cggr.measured_loss.default, *operands, config.prediction_metrics)
        loss, of_rows, figures = (builder.call(getitem, measured, index) for index in range(3))
    else:
        loss = builder.call(torch.ops.cggr.masked_loss.default, *operands)
    if _is_scaled(program, config, row_weight is not None):
        loss = _scaled_to_batch(builder, loss, kept, row_weight, _counted_in_batch(builder, target))
    dtype = value(head.loss).dtype
    if dtype is not torch.float32:
        loss = builder.call(aten.to.dtype, loss, dtype)
    builder.part, builder.region = "select", Region(grad=False)
    mask = _mask_of_loss(builder, target, rows) if "loss" in config.routes else None
    found = {name: getattr(routing, name) for name in StepOutputs._fields if name not in ("loss_mask", "figures")}
    if routing.ranks is not None:
        found |= {"rows": routing.all_rows, "weights": routing.all_weights}
    extra = {name: None if node is None else builder.env[node] for name, node in found.items()}
    if config.selection == "auto":
        extra["scores"], extra["counts"] = mean_by_row(builder, head, of_rows, target)
    builder.region, builder.part = Region(), "main"
    outputs = [out if _survives(program, i, config) else None for i, out in enumerate(program.outputs)]
    roots = [node for node in main_roots(program) if node in outputs or node not in program.outputs]
    env = clone(builder, roots, {**env, head.loss: loss})
    builder.env.update(env)
    own = tuple(builder.env[out] if isinstance(out, fx.Node) else out for out in outputs)
    builder.output(own + StepOutputs(**extra, loss_mask=mask, figures=figures if config.prediction_metrics else None))
    return builder.finish("mask_loss")


def _is_measured(config: RoutingConfig) -> bool:
    """Whether the loss is `cggr::measured_loss`: somebody wants to know what it is made of. `"auto"` itself is the
    selection of its program that keeps every row."""
    return config.prediction_metrics or config.selection == "auto"


def _is_scaled(program: Analysed, config: RoutingConfig, weighted: bool) -> bool:
    """Whether a loss that is a sum is made to stand for the whole batch's.

    Raises:
        CannotOptimize: rows are weighted, and the model divides by what it counts in them.
    """
    routing = program.routing
    selects = bool(routing.gathered) or routing.loss_rows is not None
    if program.head.reduction != "sum" or not selects:
        return False
    unbiased = weighted and rule_of(config.selection).weighting == "inverse"
    if routing.loss_rows is not None:  # whatever divides counts more than the kept tokens
        return not unbiased
    divisor = _divisor(program)
    if divisor is None:
        return weighted and not unbiased
    if not _counts_rows(program, divisor):
        return not unbiased
    if weighted:
        raise CannotOptimize(
            f"selection={rule_name(config.selection)!r} weighs what it selects, and the loss is a sum that the model "
            "divides by what it counts itself",
            node=divisor,
            hint="let the model use reduction='mean', or a selection that weighs all alike, e.g. 'topk'",
        )
    return False


def _divisor(program: Analysed) -> Any:
    """The first that the model divides its loss by, a node or a number that the call was given; None where there is
    none but constants of the model's."""
    of_loss = descendants([program.head.loss])
    for node in program.graph.nodes:
        if node in of_loss and packet_of(node) in (aten.div, aten.div_):
            divisor = node.args[1]
            if isinstance(divisor, fx.Node) or divisor in program.numbers:
                return divisor
    return None


def _counts_rows(program: Analysed, node: Any) -> bool:
    """Whether a value depends on the rows that the step is given, or on how many they are."""
    if not isinstance(node, fx.Node):
        return False
    read = [source for source in ancestors([node]) | {node} if source.op == "placeholder"]
    return any(
        program.kind(source) in ("size", "added")
        or (is_tensor(source) and any(program.mentions(size, program.batch) for size in value(source).shape))
        for source in read
    )


def _row_weight(builder: Builder[Analysed], config: RoutingConfig, target: fx.Node) -> fx.Node | None:
    """The weight of each row that enters the loss, fp32, or None where all count alike: its sequence's, its own, or,
    where both were selected by weight, the product."""
    routing = builder.program.routing
    if routing.weights is None and routing.loss_weights is None:
        return None
    if rule_of(config.selection).weighting == "none":
        return None
    found = None
    if routing.weights is not None:
        found = _by_token(builder, target, builder.env[routing.weights])
    if routing.loss_rows is None or routing.loss_weights is None:
        return found
    own = builder.env[routing.loss_weights]
    if found is None:
        return own
    of_sequence = builder.call(aten.index_select.default, found, 0, builder.env[routing.loss_rows])
    return builder.call(aten.mul.Tensor, of_sequence, own)


def _counted_in_batch(builder: Builder[Analysed], target: fx.Node, least: int = 0) -> fx.Node:
    """How many targets of the whole batch are counted, `least` at least, int64 []; where R ranks select together, an
    R-th of those of all ranks, fp32: gradients are the mean over the ranks."""
    counts, ranks = builder.program.routing.counts, builder.program.routing.ranks
    if counts is not None:
        counted = builder.call(aten.sum.default, builder.env[counts])
    else:
        ignored = builder.program.head.ignore_index
        counted = builder.call(aten.sum.default, builder.call(aten.ne.Scalar, target, ignored))
    counted = builder.call(aten.clamp_min.default, counted, least) if least else counted
    if ranks is None:
        return counted
    return builder.call(aten.div.Tensor, builder.call(aten.to.dtype, counted, torch.float32), ranks.count)


def _mask_of_loss(builder: Builder[Analysed], target: fx.Node, rows: fx.Node | None) -> fx.Node:
    """bool [B, S]: the positions whose logits enter the loss."""
    program = builder.program
    mask = builder.call(aten.ne.Scalar, target, program.head.ignore_index)
    if rows is not None:
        nothing = builder.call(aten.zeros_like.default, mask)
        mask = builder.call(aten.__and__.Tensor, mask, builder.call(aten.scatter.value, nothing, 0, rows, True))
    ids = builder.env[token_ids(program)]
    batch, sequence = (builder.call(aten.sym_size.int, ids, dim) for dim in (0, 1))
    selected = program.routing.rows
    if selected is None:
        return by_position(builder, mask, False, (batch, sequence))
    sequences = builder.env[selected]
    mask = by_position(builder, mask, False, (builder.call(aten.sym_size.int, sequences, 0), sequence))
    # A sequence that only fills up is repeated and has no token in the loss: its places add nothing.
    nothing = builder.call(aten.zeros.default, [batch, sequence], dtype=torch.int64, device=value(mask).device)
    ones = builder.call(aten.to.dtype, mask, torch.int64)
    return builder.call(aten.gt.Scalar, builder.call(aten.index_add.default, nothing, 0, sequences, ones), 0)


def _survives(program: Analysed, index: int, config: RoutingConfig) -> bool:
    """Whether an output is still returned; what is not would force the logits of every row into memory.

    What the model stores in an attribute is kept, of the selected rows, and so is what no input of the batch decides:
    state, which the step may put back into the model.
    """
    out = program.outputs[index]
    kept = config.keep_logits or index in program.stored or index == program.loss_output
    if out is None or kept or not is_tensor(out) or value(out).dim() == 0:
        return out is not None
    return not any(node.op == "placeholder" and program.kind(node) == "batch" for node in ancestors([out]))


def _by_token(builder: Builder[Analysed], target: fx.Node, weights: fx.Node) -> fx.Node:
    """The rows' weights [k], one for each of their targets [N]."""
    rows = builder.call(aten.sym_size.int, weights, 0)
    by_row = builder.call(aten.view.default, target, [rows, -1])
    ones = builder.call(aten.ones_like.default, by_row, dtype=torch.float32)
    weighed = builder.call(aten.mul.Tensor, ones, builder.call(aten.unsqueeze.default, weights, 1))
    return builder.call(aten.view.default, weighed, [-1])


def _scaled_to_batch(
    builder: Builder[Analysed], loss: fx.Node, target: fx.Node, row_weight: fx.Node | None, counted: fx.Node
) -> fx.Node:
    """The kept tokens' (weighted) sum, times the batch's counted tokens over the kept ones (their weights' sum)."""
    kept = builder.call(aten.ne.Scalar, target, builder.program.head.ignore_index)
    if row_weight is None:
        kept = builder.call(aten.clamp_min.default, builder.call(aten.sum.default, kept), 1)
    else:
        kept = builder.call(aten.sum.default, builder.call(aten.mul.Tensor, row_weight, kept))
        kept = builder.call(aten.where.ScalarSelf, builder.call(aten.eq.Scalar, kept, 0), 1.0, kept)
    # A quotient of two integers is of the default dtype.
    share = builder.call(aten.div.Tensor, builder.call(aten.to.dtype, counted, torch.float32), kept)
    return builder.call(aten.mul.Tensor, loss, share)
