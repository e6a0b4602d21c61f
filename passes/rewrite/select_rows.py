"""Selects the rows to train on: `cggr::select` or `cggr::draw` over the scores, with the number of rows as an input.

`kept` (k) and `noise` are inputs of the rewritten graph, supplied by the runtime: the graph stays a pure function, k
can follow a curriculum without a new capture, and a random selection never touches the generator that dropout uses.

Before::

    score   %scores: [B], %valid: [B]

After::

    %kept: k = an input
    select  %rows = cggr.select(%scores, %valid, %kept, "topk", None)    # [k]
"""

from __future__ import annotations

import dataclasses
import operator
from operator import getitem

import torch
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.rewrite.share_rows import own_part, share_scores
from cggr_compile.passes.rewrite.shared import drawn, fresh_size, selectable

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import quiet_region, ranks_of

aten = torch.ops.aten


def select_rows(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the inputs `kept` (and `noise` [B] fp32 for rules that draw) and the operator of `config.selection`.

    Sets `routing.kept`, `.rows` ([k] int64, sorted) and `.weights` ([k] fp32, 0 where a row only fills up, else 1 or
    the rule's weight). Where the ranks select together it is over the rows of all of them (`share_rows`).
    """
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept", fresh_size(program, "kept", program.batch))
    builder.copy_parts("router", "score")
    builder.part, builder.region = "select", quiet_region(program)
    rule = rule_of(config.selection)
    noise = builder.tensor_input("noise", (program.batch,), program.head.target) if rule.needs_noise else None
    if rule.needs_scores:
        routing = builder.routing()
    else:
        valid, counts = selectable(builder)
        routing = builder.routing(valid=valid, counts=counts)
    ranks, of_all = ranks_of(config), kept
    if ranks is not None:
        routing, noise = share_scores(builder, ranks, routing, noise)
        of_all = builder.call(operator.mul, kept, ranks.count)
    ranked = routing.scores if rule.needs_scores else noise
    if rule.ranking is not None:
        chosen = builder.call(torch.ops.cggr.select.default, ranked, routing.valid, of_all, rule.ranking, noise)
        rows, weights = (builder.call(getitem, chosen, index) for index in (0, 1))
    else:
        rows, weights = drawn(builder, config, ranked, routing.valid, of_all, noise)
    if rule.weighting == "inverse":
        # 1 / (M·π) of M rows becomes 1 / π, for a sum instead of a mean over rows.
        weights = builder.call(aten.mul.Tensor, weights, builder.call(aten.sum.default, routing.valid))
    if ranks is not None:
        routing = dataclasses.replace(routing, all_rows=rows, all_weights=weights)
        rows, weights = (own_part(builder, ranks, kept, node) for node in (rows, weights))
    builder.copy_rest()
    routing = dataclasses.replace(routing, kept=kept, rows=rows, weights=weights)
    return builder.finish("select_rows", routing=routing)
