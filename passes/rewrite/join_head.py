"""Spells the heads as one `linear(hidden, weight, bias)`, the operator that `find_loss` looks for.

Some models multiply by a transposed table, `hidden @ table.T`, or add the bias in a step of its own. Either is the
linear by definition, `linear(x, W, b) = x @ W.T + b`, whatever stands between it and the loss.

Before::

    %product = aten.matmul(%hidden, %table)
    %logits = aten.add(%product, %bias)

After::

    %weight = aten.t(%table)
    %logits = aten.linear(%hidden, %weight, %bias)
"""

from __future__ import annotations

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import drop_unused
from cggr_compile.ir.program import PART, REGION, Program, is_tensor, value

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.mm.default}


def join_head(program: Program, config: RoutingConfig) -> Program:
    """Replaces the product in front of each cross-entropy, and a bias [V] or [1, V] added to it, by one
    linear."""
    joined: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}
    for loss in program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default, sort=True):
        joined |= _spelled_otherwise(loss.args[0])
    if not joined:
        return program
    builder = Builder(program)
    for node in program.graph.nodes:
        if node in joined:
            builder.env[node] = _linear(builder, node, *joined[node])
        elif node.op != "output":
            builder.copy(node)
    builder.copy_rest()
    drop_unused(builder.graph)
    return builder.finish("join_head")


def _spelled_otherwise(logits: fx.Node) -> dict[fx.Node, tuple[fx.Node, fx.Node | None]]:
    """The head of these logits, where it is no single linear: its last node -> (product, bias)."""
    node, above = logits, None
    while node.target != aten.linear.default and node.target not in _PRODUCTS:
        tensors = [arg for arg in node.args if is_tensor(arg)]
        if node.op != "call_function" or not tensors:
            return {}
        node, above = max(tensors, key=lambda tensor: value(tensor).dim()), node
    if value(node.args[1]).dim() != 2:
        return {}
    bias = None if above is None or len(node.args) > 2 else _added(node, above)
    if bias is not None and above is not None:
        return {above: (node, bias)}
    return {node: (node, None)} if node.target in _PRODUCTS else {}


def _added(product: fx.Node, above: fx.Node) -> fx.Node | None:
    """What `above` adds to every row of the product, None where it does something else."""
    if above.target != aten.add.Tensor or above.kwargs or product not in above.args:
        return None
    other = next((arg for arg in above.args if arg is not product), None)
    if not is_tensor(other):
        return None
    *leading, wide = value(other).shape
    return other if wide == value(product).shape[-1] and all(size == 1 for size in leading) else None


def _linear(builder: Builder, last: fx.Node, product: fx.Node, bias: fx.Node | None) -> fx.Node:
    hidden, weight = (builder.env[arg] for arg in product.args[:2])
    builder.part, builder.region = last.meta[PART], product.meta[REGION]
    if product.target in _PRODUCTS:
        weight = builder.call(aten.t.default, weight)
    added = () if bias is None else (_flat(builder, builder.env[bias]),)
    linear = builder.call(aten.linear.default, hidden, weight, *added)
    linear.meta = {**last.meta, **linear.meta}
    return linear


def _flat(builder: Builder, bias: fx.Node) -> fx.Node:
    return bias if value(bias).dim() == 1 else builder.call(aten.view.default, bias, [-1])
