"""Selects the rows to train on: `cggr::select` or `cggr::draw` over the scores, with the number of rows as an input.

`kept` (k) and `noise` are inputs of the rewritten graph, supplied by the runtime: the graph stays a pure function, k
can follow a curriculum without a new capture, and a random selection never touches the generator that dropout uses.
"""

from __future__ import annotations

import dataclasses
from itertools import chain, count
from operator import getitem

import cggr_compile.kernels.op.rows  # noqa: F401  registers torch.ops.cggr
import torch
from cggr_compile.kernels.op.selection import register
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.rewrite.build_router import quiet_region
from cggr_compile.passes.rewrite.score_rows import selectable
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import Builder, Program, hint, value

aten = torch.ops.aten


def select_rows(program: Program, config: RoutingConfig) -> Program:
    """Adds the inputs `kept` (and `noise` [B] fp32 for rules that draw) and the operator of `config.selection`.

    Sets `routing.kept`, `.rows` ([k] int64, sorted) and `.weights` ([k] fp32, 0 where a row only fills up, else 1 or
    the rule's weight).
    """
    assert program.head is not None
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept", fresh_size(program, "kept", program.batch))
    builder.copy_parts("router", "score")
    builder.part, builder.region = "select", quiet_region(program)
    rule = rule_of(config.selection)
    noise = builder.tensor_input("noise", (program.batch,), program.head.target) if rule.needs_noise else None
    if rule.needs_scores:
        routing = builder.routing()
        ranked = routing.scores
    else:
        valid, counts = selectable(builder)
        routing = builder.routing(valid=valid, counts=counts)
        ranked = noise
    if rule.ranking is not None:
        chosen = builder.call(torch.ops.cggr.select.default, ranked, routing.valid, kept, rule.ranking, noise)
        rows, weights = (builder.call(getitem, chosen, index) for index in (0, 1))
    else:
        rows, weights = drawn(builder, config, ranked, routing.valid, kept, noise)
    if rule.weighting == "inverse":
        # 1 / (M·π) of M rows becomes 1 / π, for a sum instead of a mean over rows.
        weights = builder.call(aten.mul.Tensor, weights, builder.call(aten.sum.default, routing.valid))
    builder.copy_rest()
    routing = dataclasses.replace(routing, kept=kept, rows=rows, weights=weights)
    return builder.finish("select_rows", routing=routing)


def without_fillers(builder: Builder, target: fx.Node, weights: fx.Node) -> fx.Node:
    """Targets [N] in which those of the selected rows of weight 0 are ignored."""
    assert builder.program.head is not None
    rows = builder.call(aten.sym_size.int, weights, 0)
    by_row = builder.call(aten.view.default, target, [rows, -1])
    filler = builder.call(aten.unsqueeze.default, builder.call(aten.eq.Scalar, weights, 0), 1)
    ignored = builder.program.head.ignore_index
    masked = builder.call(aten.masked_fill.Scalar, by_row, filler, ignored)
    return builder.call(aten.view.default, masked, [-1])


def drawn(
    builder: Builder, config: RoutingConfig, scores: fx.Node, valid: fx.Node, kept: fx.Node, noise: fx.Node | None
) -> tuple[fx.Node, fx.Node]:
    """`cggr::draw` by the configured rule and its options: index int64 [..., k] and weight float32 [..., k]."""
    options = config.selection_options or {}
    names, values = list(options), [float(number) for number in options.values()]
    operands = (scores, valid, kept, register(config.selection), noise, names, values)
    chosen = builder.call(torch.ops.cggr.draw.default, *operands)
    return builder.call(getitem, chosen, 0), builder.call(getitem, chosen, 1)


def preferred(builder: Builder, index: fx.Node, weight: fx.Node, like: fx.Node) -> fx.Node:
    """1 at the selected places and 0 elsewhere, fp32 of the shape of `like`, for `first`; a place that only fills up
    (weight 0) adds nothing."""
    zeros = builder.call(aten.zeros_like.default, like, dtype=torch.float32)
    return builder.call(aten.scatter_add.default, zeros, -1, index, weight)


def first(builder: Builder, scores: fx.Node, preferred: fx.Node, kept: fx.Node) -> fx.Node:
    """int64 [..., k], sorted: the highest scores of what is preferred; then what is preferred and scores NaN, then the
    rest. Every place is taken at most once, which `cggr::select` does not promise where few are selectable."""
    known = builder.call(aten.nan_to_num.default, scores, torch.finfo(torch.float32).min)
    key = builder.call(aten.masked_fill.Scalar, known, builder.call(aten.logical_not.default, preferred), -torch.inf)
    every = builder.call(aten.ones_like.default, preferred)
    chosen = builder.call(torch.ops.cggr.select.default, key, every, kept, "topk", None)
    return builder.call(getitem, chosen, 0)


def fresh_size(program: Program, name: str, total: int | torch.SymInt) -> torch.SymInt:
    """A fresh symbol for a number of rows or tokens, whose size hint is equal to no other size of the graph: close to
    that of `total`, so that the graph fits it as it was captured."""
    shape_env = program.shape_env
    source = ConstantSource(name)
    sizes = [program.batch, program.sequence, *map(value, program.placeholders)]
    hints = {size.node.hint for size in sizes if isinstance(size, torch.SymInt)}
    near = next(size for size in chain(range(hint(total) - 1, 1, -1), count(2)) if size not in hints)
    symbol = shape_env.create_symbol(near, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    return shape_env.create_symintnode(symbol, hint=near, source=source)
