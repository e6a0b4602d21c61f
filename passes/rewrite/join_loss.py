"""Spells a loss of log-probabilities, `nll_loss(log_softmax(logits), target)`, as the cross-entropy that it is.

`cross_entropy_loss` is defined as these two operators; `find_loss` looks for it alone.

Before::

    %log = aten.log_softmax(%logits, -1)
    %loss = aten.nll_loss(%log, %target, None, 1, -100)

After::

    %loss = aten.cross_entropy_loss(%logits, %target, None, 1, -100)
"""

from __future__ import annotations

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import drop_unused
from cggr_compile.ir.program import PART, REGION, Program, value

aten = torch.ops.aten

_LOSSES = {aten.nll_loss_nd.default, aten.nll_loss.default}


def join_loss(program: Program, config: RoutingConfig) -> Program:
    """Replaces each negative log-likelihood [N, V] of a log-softmax over V by one cross-entropy."""
    if not any(_is_cross_entropy(node) for node in program.graph.nodes):
        return program
    builder = Builder(program)
    for node in program.graph.nodes:
        if _is_cross_entropy(node):
            builder.env[node] = _cross_entropy(builder, node)
        elif node.op != "output":
            builder.copy(node)
    builder.copy_rest()
    drop_unused(builder.graph)
    return builder.finish("join_loss")


def _is_cross_entropy(node: fx.Node) -> bool:
    if node.target not in _LOSSES or node.args[0].target != aten.log_softmax.int:
        return False
    logits, dim = node.args[0].args[:2]
    return value(logits).dim() == 2 and dim in (1, -1)


def _cross_entropy(builder: Builder, node: fx.Node) -> fx.Node:
    logits, _, *dtype = node.args[0].args
    builder.part, builder.region = node.meta[PART], node.meta[REGION]
    rows = builder.env[logits]
    dtype = dtype or [node.args[0].kwargs.get("dtype")]
    if dtype[0] not in (None, value(logits).dtype):
        rows = builder.call(aten.to.dtype, rows, dtype[0])
    args, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda old: builder.env[old])
    loss = builder.call(aten.cross_entropy_loss.default, rows, *args, **kwargs)
    loss.meta = {**node.meta, **loss.meta}
    return loss
