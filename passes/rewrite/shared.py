"""Nodes that several rewrites write: rows and positions of values, selections, sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from itertools import chain, count
from operator import getitem
from typing import Any

import torch
from cggr_compile.kernels.op.selection import register
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors, clone
from cggr_compile.ir.program import Analysed, Head, hint, is_tensor, value
from cggr_compile.ir.roles import is_token_argument, token_ids
from cggr_compile.ir.token_mixing import ATTENTION, argument
from cggr_compile.torch_internals import symbols

aten = torch.ops.aten


def selectable(builder: Builder[Analysed]) -> tuple[fx.Node, fx.Node]:
    """Which rows have counted targets, [B] bool, and how many, [B] int64; of the placeholders in `builder.env`."""
    head = builder.program.head
    inputs = {node: builder.env[node] for node in builder.program.placeholders}
    counts = count_by_row(builder, head, clone(builder, [head.target], inputs)[head.target])
    return builder.call(aten.gt.Scalar, counts, 0), counts


def count_by_row(builder: Builder[Analysed], head: Head, target: fx.Node) -> fx.Node:
    """How many targets of each row are counted, [B] int64."""
    counted = builder.call(aten.ne.Scalar, target, head.ignore_index)
    by_row = builder.call(aten.view.default, counted, [batch_size(builder), -1])
    return builder.call(aten.sum.dim_IntList, by_row, [1])


def mean_by_row(builder: Builder[Analysed], head: Head, of_tokens: fx.Node, target: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The mean of values [N], which are 0 where the target is ignored, over each row's counted targets, 0 where there
    is none: [B]; and how many are counted, [B] int64."""
    by_row = builder.call(aten.view.default, of_tokens, [batch_size(builder), -1])
    totals = builder.call(aten.sum.dim_IntList, by_row, [1])
    counts = count_by_row(builder, head, target)
    return builder.call(aten.div.Tensor, totals, builder.call(aten.clamp_min.default, counts, 1)), counts


def rows_of(builder: Builder[Analysed], head: Head, hidden: fx.Node) -> fx.Node:
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
            args[1] = [*(-1 if size is None else size for size in sizes), width]
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


def _size(builder: Builder[Analysed], arg: Any) -> Any:
    """An argument of a row move in the graph that is built: a size is computed anew of the inputs' sizes where it is
    not there; None where that takes more than them."""
    if not isinstance(arg, fx.Node) or arg in builder.env:
        return builder.env.get(arg, arg) if isinstance(arg, fx.Node) else arg
    if any(is_tensor(node) and node.op != "placeholder" for node in ancestors([arg])):
        return None
    return clone(builder, [arg], {node: builder.env[node] for node in builder.program.placeholders})[arg]


def by_position(builder: Builder[Analysed], values: fx.Node, fill: float, sizes: tuple[fx.Node, fx.Node]) -> fx.Node:
    """Values [N] of the loss's rows as [B, S] = `sizes`, each at the position whose logits the row is; `fill` at the
    positions that are no row of the loss."""
    program = builder.program
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


def head_parameters(
    builder: Builder[Analysed], head: Head, inputs: dict[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node | None]:
    """The head's weight [V, D] and bias, computed from the model's parameters where they are not parameters."""
    roots = [head.weight] if head.bias is None else [head.weight, head.bias]
    env = clone(builder, roots, inputs)
    parameters = {**inputs, **env}
    return parameters[head.weight], None if head.bias is None else parameters[head.bias]


def batch_size(builder: Builder[Analysed]) -> fx.Node:
    """The batch size as a node: the size input where the capture has one, else read off the token ids."""
    program = builder.program
    for node in program.placeholders:
        if program.kind(node) == "size" and program.same_size(value(node), program.batch):
            return builder.env[node]
    return builder.call(aten.sym_size.int, builder.env[token_ids(program)], 0)


def without_fillers(builder: Builder[Analysed], target: fx.Node, weights: fx.Node) -> fx.Node:
    """Targets [N] in which those of the selected rows of weight 0 are ignored."""
    rows = builder.call(aten.sym_size.int, weights, 0)
    by_row = builder.call(aten.view.default, target, [rows, -1])
    filler = builder.call(aten.unsqueeze.default, builder.call(aten.eq.Scalar, weights, 0), 1)
    ignored = builder.program.head.ignore_index
    masked = builder.call(aten.masked_fill.Scalar, by_row, filler, ignored)
    return builder.call(aten.view.default, masked, [-1])


def drawn(
    builder: Builder[Analysed],
    config: RoutingConfig,
    scores: fx.Node,
    valid: fx.Node,
    kept: fx.Node,
    noise: fx.Node | None,
) -> tuple[fx.Node, fx.Node]:
    """`cggr::draw` by the configured rule and its options: index int64 [..., k] and weight float32 [..., k]."""
    options = config.selection_options or {}
    names, values = list(options), [float(number) for number in options.values()]
    operands = (scores, valid, kept, register(config.selection), noise, names, values)
    chosen = builder.call(torch.ops.cggr.draw.default, *operands)
    return builder.call(getitem, chosen, 0), builder.call(getitem, chosen, 1)


def preferred(builder: Builder[Analysed], index: fx.Node, weight: fx.Node, like: fx.Node) -> fx.Node:
    """1 at the selected places and 0 elsewhere, fp32 of the shape of `like`, for `first`; a place that only fills up
    (weight 0) adds nothing."""
    zeros = builder.call(aten.zeros_like.default, like, dtype=torch.float32)
    return builder.call(aten.scatter_add.default, zeros, -1, index, weight)


def first(builder: Builder[Analysed], scores: fx.Node, preferred: fx.Node, kept: fx.Node) -> fx.Node:
    """int64 [..., k], sorted: the highest scores of what is preferred; then what is preferred and scores NaN, then the
    rest. Every place is taken at most once, which `cggr::select` does not promise where few are selectable."""
    known = builder.call(aten.nan_to_num.default, scores, torch.finfo(torch.float32).min)
    key = builder.call(aten.masked_fill.Scalar, known, builder.call(aten.logical_not.default, preferred), -torch.inf)
    every = builder.call(aten.ones_like.default, preferred)
    chosen = builder.call(torch.ops.cggr.select.default, key, every, kept, "topk", None)
    return builder.call(getitem, chosen, 0)


def own_labels(program: Analysed, besides: Collection[fx.Node] = ()) -> fx.Node:
    """The argument [B, S] that the loss's target is made of, `besides` not counted.

    Raises:
        CannotOptimize: it is read by the model too, or there are several.
    """
    made_of = ancestors([program.head.target], stop=besides)
    found = [node for node in made_of if is_token_argument(program, node)]
    if len(found) == 1 and found[0] not in ancestors([program.head.hidden]):
        return found[0]
    raise CannotOptimize(
        f"the labels are made of {', '.join(program.path(node) for node in found) or 'no argument [batch, sequence]'}, "
        "and labels of first tokens are to be ignored in an argument of their own",
        node=program.head.target,
        hint="pass labels as a tensor of their own, e.g. labels=input_ids.clone()",
    )


def fresh_size(program: Analysed, name: str, total: int | torch.SymInt) -> torch.SymInt:
    """A fresh symbol for a number of rows or tokens, whose size hint is equal to no other size of the graph: close to
    that of `total`, so that the graph fits it as it was captured."""
    sizes = [program.batch, program.sequence, *map(value, program.placeholders)]
    hints = {size.node.hint for size in sizes if isinstance(size, torch.SymInt)}
    near = next(size for size in chain(range(hint(total) - 1, 1, -1), count(2)) if size not in hints)
    return symbols.new_size(program.shape_env, name, near)


def attention_with(
    builder: Builder[Analysed], node: fx.Node, env: dict[fx.Node, fx.Node], changes: dict[str, Any]
) -> fx.Node:
    """A copy of an attention node with some arguments, by their names in the schema, replaced."""
    schema = ATTENTION._schema.arguments
    given = {parameter.name: argument(node, parameter.name) for parameter in schema if parameter.name not in changes}
    mapped = {**fx.map_arg(given, lambda old: env[old]), **changes}
    args = tuple(mapped.pop(parameter.name) for parameter in schema if not parameter.kwarg_only)
    return builder.copy_call(node, env, args=args, kwargs=mapped)


Rewrite = Callable[[Builder, fx.Node, dict[fx.Node, fx.Node]], "fx.Node | None"]


def write_main_pass(
    builder: Builder[Analysed],
    roots: list[fx.Node],
    substitution: dict[fx.Node, fx.Node],
    rewrite: Rewrite = lambda builder, node, env: None,
) -> None:
    """Copies what the roots need onto what stands in for inputs, and writes the outputs of it; `rewrite` may return
    another node for an old one."""
    builder.part = "main"
    env = clone(builder, roots, substitution, lambda *call: _checked_before(*call) or rewrite(*call))
    builder.env.update({old: new for old, new in env.items() if old not in builder.env})
    outputs = builder.program.outputs
    builder.output(tuple(env.get(out, builder.env.get(out)) if isinstance(out, fx.Node) else out for out in outputs))


def _checked_before(builder: Builder[Analysed], node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The kept labels in place of a check: those of the whole batch passed it before any were selected."""
    checks = node.target in (torch.ops.cggr.checked_target.default, torch.ops.cggr.checked_padding.default)
    return env[node.args[0]] if checks else None
