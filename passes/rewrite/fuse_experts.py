"""Makes one operator of a mixture's experts, `cggr::grouped_mlp`, of which providers are chosen like of any other.

`find_experts` proves what is replaced: Σ_k w[t, k] · down[e] · act(gate_up[e] · x[t]). On the CPU the provider computes
grouped products with the operators and in the order of those that are replaced, so results and gradients stay the same
bit for bit; products with one table a pair, whose sums are of another order, stay there. On CUDA these stay where torch
has no grouped kernel, and under autocast, which makes the two differ in dtype.

Before::

    main    %sort = aten.sort(%experts_flat)
    main    … 20 nodes …
    main    %products = aten._grouped_mm(%rows, %gate_up_t, %ends)
    main    … 15 nodes …
    main    %sum = aten.sum(%by_token, [1])

After::

    main    %sum = cggr.grouped_mlp(%hidden, %gate_up, %down, %weights, %experts, None, None, None, 'silu_gated', False)
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.op.grouped_mm import LINE
from cggr_compile.passes.analyse.find_experts import Experts, find_experts
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import REGION, Analysed, Region, callers_region, value

aten = torch.ops.aten


def fuse_experts(program: Analysed, config: RoutingConfig) -> Analysed:
    """Replaces each sum over experts that `find_experts` finds, and what only it needs, by the operator."""
    found: dict[fx.Node, Experts] = {}
    for total in program.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList, sort=True):
        experts = find_experts(program, total)
        if experts is None or (experts.batched and not _may_be_grouped(total, experts)):
            continue
        wide = value(total).dtype != value(experts.hidden).dtype
        results = [user for user in total.users if _rounds(user, experts)] if wide else [total]
        if len(results) == (len(total.users) if wide else 1):
            found |= dict.fromkeys(results, experts)
    if not found:
        return program
    builder = Builder(program)
    for node in program.graph.nodes:
        if node in found:
            builder.env[node] = _operator(builder, node, found[node])
        elif node.op != "output":
            builder.copy(node)
    builder.copy_rest()
    _drop_unused(builder, found)
    return builder.finish("fuse_experts")


def _may_be_grouped(total: fx.Node, experts: Experts) -> bool:
    device, hidden = value(total).device, value(experts.hidden)
    regions = (callers_region(device.type), total.meta.get(REGION, Region()))
    if device.type != "cuda" or any(cast.enabled for region in regions for cast in region.autocasts):
        return False
    widths = (*value(experts.gate_up[0]).shape[1:], *value(experts.down[0]).shape[1:])
    return hidden.dtype == torch.bfloat16 and not any(width % LINE for width in widths)


def _rounds(node: fx.Node, experts: Experts) -> bool:
    """Whether it casts to the dtype of the tokens, as the operator does."""
    dtype = value(experts.hidden).dtype
    copied = node.target == aten._to_copy.default and node.kwargs == {"dtype": dtype}
    return copied or (node.target == aten.to.dtype and node.args[1:] == (dtype,) and not node.kwargs)


def _operator(builder: Builder[Analysed], node: fx.Node, experts: Experts) -> fx.Node:
    def tables(found: tuple[fx.Node, bool]) -> fx.Node:
        there = builder.env[found[0]]
        return builder.call_for(node, aten.transpose.int, there, 1, 2) if found[1] else there

    def given(argument: fx.Node | None) -> fx.Node | None:
        return None if argument is None else builder.env[argument]

    arguments = (
        given(experts.hidden),
        tables(experts.gate_up),
        tables(experts.down),
        *map(given, (experts.weights, experts.experts, experts.gate_up_bias, experts.down_bias)),
    )
    return builder.call_for(node, torch.ops.cggr.grouped_mlp.default, *arguments, None, *experts.rest)


def _drop_unused(builder: Builder[Analysed], found: dict[fx.Node, Experts]) -> None:
    """Drops the copies of what only the replaced nodes needed."""
    inside = {node for result, experts in found.items() for node in ancestors([result], stop=_read(experts))}
    copies = {builder.env[node] for node in inside - set(found)}
    for node in reversed(builder.graph.nodes):
        if node in copies and node.op == "call_function" and not node.users:
            builder.graph.erase_node(node)


def _read(experts: Experts) -> list[fx.Node]:
    biases = [bias for bias in (experts.gate_up_bias, experts.down_bias) if bias is not None]
    return [experts.hidden, experts.gate_up[0], experts.down[0], experts.weights, experts.experts, *biases]
