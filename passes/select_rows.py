"""Selects the rows to train on: `cggr::select` over the scores, with the number of rows as an input.

`kept` (k) and `noise` are inputs of the rewritten graph, supplied by the runtime: the graph stays a pure function, k
can follow a curriculum without a new capture, and a random selection never touches the generator that dropout uses.
"""

from __future__ import annotations

import dataclasses
from operator import getitem

import cggr_compile.kernels.ops  # noqa: F401  registers torch.ops.cggr
import torch
from cggr_compile.passes.build_router import quiet_region
from cggr_compile.passes.score_rows import count_by_row
from cggr_compile.passes.subgraph import clone
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from cggr_compile.config import RoutingConfig
from cggr_compile.program import Builder, Program, value

aten = torch.ops.aten

NEEDS_SCORES = {"topk": True, "random": False}


def select_rows(program: Program, config: RoutingConfig) -> Program:
    """Adds the inputs `kept` (and `noise` [B] fp32 for rules without scores) and `cggr::select`.

    Sets `routing.kept`, `.rows` ([k] int64, sorted) and `.weights` ([k] fp32, 0 where a row only fills up).
    """
    assert program.head is not None
    head = program.head
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept", _kept_symbol(program))
    builder.copy_parts("router", "score")
    builder.part, builder.region = "select", quiet_region(program)
    noise = None
    if NEEDS_SCORES[config.selection]:
        routing = builder.routing()
    else:
        with program.fake_mode:
            fake = torch.empty(program.batch, device=value(head.target).device)
        noise = builder.placeholder("noise", fake)
        inputs = {node: builder.env[node] for node in program.placeholders}
        target = clone(builder, [head.target], inputs)[head.target]
        counts = count_by_row(builder, head, target)
        valid = builder.call(aten.gt.Scalar, counts, 0)
        routing = builder.routing(scores=noise, valid=valid, counts=counts)
    chosen = builder.call(torch.ops.cggr.select.default, routing.scores, routing.valid, kept, config.selection, noise)
    rows, weights = (builder.call(getitem, chosen, index) for index in (0, 1))
    builder.copy_rest()
    routing = dataclasses.replace(routing, kept=kept, rows=rows, weights=weights)
    return builder.finish("select_rows", routing=routing)


def _kept_symbol(program: Program) -> torch.SymInt:
    """A fresh symbol for k, whose size hint is equal to no other size of the graph."""
    shape_env = program.shape_env
    source = ConstantSource("kept")
    hints = {size.node.hint for size in (program.batch, program.sequence) if isinstance(size, torch.SymInt)}
    hint = next(size for size in range(2, 6) if size not in hints)
    symbol = shape_env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)
