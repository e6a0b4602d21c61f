"""Puts `cggr::checked_target` between the model's label path and all that reads it: scores, selection and loss.

Whatever a route keeps, something that it cannot do without reads the labels of the whole batch: the sequence route
counts each row's, the others have the loss over all of them. So one check here raises for a label out of range in any
row, at the positions that eager's loss looks at, and no other.

Before::

    %target = aten.view(%labels, [-1])

After::

    %target = aten.view(%labels, [-1])
    %checked = cggr.checked_target(%target, V, -100)    # read in place of %target
"""

from __future__ import annotations

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import PART, REGION, Analysed, value


def check_labels(program: Analysed, config: RoutingConfig) -> Analysed:
    """The program whose `head.target` is checked; its other nodes are as they were."""
    head = program.head
    builder = Builder(program)
    builder.copy_inputs()
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node not in builder.env:
            builder.copy(node)
        if node is head.target:
            builder.part, builder.region = node.meta[PART], node.meta[REGION]
            classes = int(value(head.linear).shape[-1])
            operator = torch.ops.cggr.checked_target.default
            builder.env[node] = builder.call(operator, builder.env[node], classes, head.ignore_index)
    builder.copy_rest()
    return builder.finish("check_labels")
