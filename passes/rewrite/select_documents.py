"""Selects the documents of packed sequences that train, whole, up to k tokens of each sequence.

A document's score is the mean of the router's scores over its counted tokens. The labels of first tokens are ignored by
now (`separate_documents`), so a token's score is about its own document.

Before::

    score   %scores: [B · S], one for each row that the loss sees

After::

    %kept_tokens: k = an input
    select  %positions = cggr.select_documents(%documents, %counted, %scores, %kept_tokens, "topk", …)    # [B, k]
"""

from __future__ import annotations

import dataclasses
from operator import getitem

import torch
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.rewrite.shared import by_position, fresh_size
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import clone
from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import quiet_region, token_ids

aten = torch.ops.aten


def select_documents(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the inputs `kept_tokens` and, for rules that draw, `token_noise` ([B, S] fp32); sets `routing.kept_tokens`,
    `.positions` ([B, k] int64, ascending, -1 behind the last), `.documents_kept` ([B, 4] int64, FIGURES) and `.counts`
    ([B]). Scores of rows are none of this route."""
    assert program.routing.documents is not None
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept_tokens", fresh_size(program, "kept_tokens", program.sequence))
    builder.copy_parts("router", "score", "select")
    builder.part, builder.region = "select", quiet_region(program)
    rule, ids = rule_of(config.selection), token_ids(program)
    noise = builder.tensor_input("token_noise", (program.batch, program.sequence), ids) if rule.needs_noise else None
    sizes = tuple(builder.call(aten.sym_size.int, builder.env[ids], dim) for dim in (0, 1))
    inputs = {node: builder.env[node] for node in program.placeholders}
    target = clone(builder, [program.head.target], inputs)[program.head.target]
    counted = builder.call(aten.ne.Scalar, target, program.head.ignore_index)
    counted = by_position(builder, counted, False, (sizes[0], sizes[1]))
    scores: fx.Node | None = None
    if rule.needs_scores:
        scores = by_position(builder, builder.env[program.routing.token_scores], 0.0, (sizes[0], sizes[1]))
    options = config.selection_options or {}
    chosen = builder.call(
        torch.ops.cggr.select_documents.default,
        builder.env[program.routing.documents],
        counted,
        scores,
        kept,
        config.selection,
        noise,
        list(options),
        [float(number) for number in options.values()],
    )
    positions, figures = (builder.call(getitem, chosen, index) for index in (0, 1))
    counts = builder.call(aten.sum.dim_IntList, counted, [1])
    builder.copy_rest()
    found = {"positions": positions, "documents_kept": figures, "counts": counts, "scores": None, "valid": None}
    routing = dataclasses.replace(builder.routing(), kept_tokens=kept, **found)
    return builder.finish("select_documents", routing=routing)
