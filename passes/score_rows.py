"""Scores every row: the router's hidden states go through the head row by row, and a row's score is the mean over
its counted tokens.

The row moves between head and loss (views, slices) are replayed on the hidden states in front of the head; the head
acts on each row alone, so this commutes, and logits never exist in the graph. Targets come from the model's own label
path, so shift and ignored positions are the model's.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from cggr_compile.kernels.reference import SCORINGS
from cggr_compile.passes.build_router import quiet_region
from cggr_compile.passes.score_head import HeadCall, score_head
from cggr_compile.passes.subgraph import ancestors, clone
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.program import Builder, Head, Program, is_tensor, value

aten = torch.ops.aten


def score_rows(program: Program, config: RoutingConfig) -> Program:
    """Inserts the router's head (`score_head`) and the mean over tokens; sets `routing.token_scores` [N],
    `.scores` [B], `.valid` [B], `.counts` [B], `.basis_image` and, where k follows it, `.confidence` (0-d).

    A row without counted tokens scores 0 and is not valid. Everything is fp32 and without gradient.
    """
    assert program.head is not None
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
    statistics, image = score_head(builder, config, HeadCall((hidden, weight, bias, target), measured, options))
    if config.follows_confidence:
        of_tokens = builder.call(aten.select.int, statistics, 0, len(quantities))
        confidence = _mean_over_counted(builder, of_tokens, builder.call(aten.ne.Scalar, target, head.ignore_index))
        statistics = builder.call(aten.slice.Tensor, statistics, 0, 0, len(quantities))
    tokens = builder.call(aten.sum.dim_IntList, statistics, [0])
    by_row = builder.call(aten.view.default, tokens, [batch_size(builder), -1])
    totals = builder.call(aten.sum.dim_IntList, by_row, [1])
    counts = count_by_row(builder, head, target)
    scores = builder.call(aten.div.Tensor, totals, builder.call(aten.clamp_min.default, counts, 1))
    valid = builder.call(aten.gt.Scalar, counts, 0)
    builder.copy_rest()
    routing = builder.routing(
        token_scores=tokens, basis_image=image, scores=scores, valid=valid, counts=counts, confidence=confidence
    )
    return builder.finish("score_rows", routing=routing)


def selectable(builder: Builder) -> tuple[fx.Node, fx.Node]:
    """Which rows have counted targets, [B] bool, and how many, [B] int64; of the placeholders in `builder.env`."""
    head = builder.program.head
    assert head is not None
    inputs = {node: builder.env[node] for node in builder.program.placeholders}
    counts = count_by_row(builder, head, clone(builder, [head.target], inputs)[head.target])
    return builder.call(aten.gt.Scalar, counts, 0), counts


def count_by_row(builder: Builder, head: Head, target: fx.Node) -> fx.Node:
    """How many targets of each row are counted, [B] int64."""
    counted = builder.call(aten.ne.Scalar, target, head.ignore_index)
    by_row = builder.call(aten.view.default, counted, [batch_size(builder), -1])
    return builder.call(aten.sum.dim_IntList, by_row, [1])


def _mean_over_counted(builder: Builder, of_tokens: fx.Node, counted: fx.Node) -> fx.Node:
    """0-d: the mean over the counted tokens whose value is not NaN; 0 where there is none."""
    known = builder.call(aten.logical_not.default, builder.call(aten.isnan.default, of_tokens))
    counted = builder.call(aten.logical_and.default, counted, known)
    total = builder.call(aten.sum.default, builder.call(aten.nan_to_num.default, of_tokens, 0.0))
    return builder.call(
        aten.div.Tensor, total, builder.call(aten.clamp_min.default, builder.call(aten.sum.default, counted), 1)
    )


def rows_of(builder: Builder, head: Head, hidden: fx.Node) -> fx.Node:
    """Replays the row moves between head and loss on hidden states: [B, S, D] to the loss's rows [N, D].

    A view of logits is a reshape here: hidden states may be a slice where the head's result is a tensor of its own.
    """
    width = value(hidden).shape[-1]
    rows = hidden
    for move in head.row_ops:
        args = list(move.args)
        args[0] = rows
        target = move.target
        if isinstance(args[1], (list, tuple)):  # a view: its last size is the vocabulary
            # A size that is read off the logits is not there; being the only one, it follows.
            sizes = [_size(builder, size) for size in args[1][:-1]]
            args[1] = [-1 if size is None else size for size in sizes] + [width]
            target = aten.reshape.default
        else:
            args = [arg if arg is rows else _size(builder, arg) for arg in args]
            if any(arg is None and move.args[place] is not None for place, arg in enumerate(args)):
                raise CannotOptimize(
                    "the loss's rows are cut out of the logits by a size that is read off the logits",
                    node=move,
                    hint="read that size off input_ids or labels",
                )
        rows = builder.call(target, *args)
    return rows


def _size(builder: Builder, arg: Any) -> Any:
    """An argument of a row move in the graph that is built: a size is computed anew of the inputs' sizes where it is
    not there; None where that takes more than them."""
    if not isinstance(arg, fx.Node) or arg in builder.env:
        return builder.env.get(arg, arg) if isinstance(arg, fx.Node) else arg
    if any(is_tensor(node) and node.op != "placeholder" for node in ancestors([arg])):
        return None
    return clone(builder, [arg], {node: builder.env[node] for node in builder.program.placeholders})[arg]


def by_position(builder: Builder, values: fx.Node, fill: float, sizes: tuple[fx.Node, fx.Node]) -> fx.Node:
    """Values [N] of the loss's rows as [B, S] = `sizes`, each at the position whose logits the row is; `fill` at the
    positions that are no row of the loss."""
    program = builder.program
    assert program.head is not None
    batch, sequence = sizes
    if program.same_size(value(values).shape[0], value(batch) * value(sequence)):
        return builder.call(aten.view.default, values, [batch, sequence])
    tokens, device = builder.call(operator.mul, batch, sequence), value(values).device
    places = builder.call(aten.arange.default, tokens, device=device)
    places = builder.call(aten.view.default, places, [batch, sequence, 1])
    places = builder.call(aten.view.default, rows_of(builder, program.head, places), [-1])
    spread = builder.call(aten.full.default, [tokens], fill, dtype=value(values).dtype, device=device)
    spread = builder.call(aten.scatter.src, spread, 0, places, values)
    return builder.call(aten.view.default, spread, [batch, sequence])


def token_ids(program: Program) -> fx.Node:
    """The placeholder of the token ids [B, S]."""
    return next(
        node for node in program.placeholders if program.kind(node) == "batch" and is_by_token(program, value(node))
    )


def is_by_token(program: Program, val: Any) -> bool:
    """Whether a value is an integer or boolean tensor [B, S]."""
    return has_tokens(program, val) and not val.is_floating_point()


def has_tokens(program: Program, val: Any) -> bool:
    """Whether a value is a tensor [B, S]."""
    if not isinstance(val, torch.Tensor) or val.dim() != 2:
        return False
    shape = (program.batch, program.sequence)
    return all(program.same_size(size, wanted) for size, wanted in zip(val.shape, shape, strict=True))


def head_parameters(builder: Builder, head: Head, inputs: dict[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """The head's weight [V, D] and bias, computed from the model's parameters where they are not parameters."""
    roots = [head.weight] if head.bias is None else [head.weight, head.bias]
    env = clone(builder, roots, inputs)
    parameters = {**inputs, **env}
    return parameters[head.weight], None if head.bias is None else parameters[head.bias]


def batch_size(builder: Builder) -> fx.Node:
    """The batch size as a node: the size input where the capture has one, else read off the token ids."""
    program = builder.program
    for node in program.placeholders:
        if program.kind(node) == "size" and program.same_size(value(node), program.batch):
            return builder.env[node]
    return builder.call(aten.sym_size.int, builder.env[token_ids(program)], 0)
