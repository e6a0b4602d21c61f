"""Lets the tokens that are not selected pass by the experts of the middle layers (null routing).

Attention, norms, the experts' own router, shared experts and dense MLPs run on every token. Each `cggr::grouped_mlp` of
a middle layer gets the selection as its mask, and gives 0 for the other tokens at no cost: shapes stay as they are, and
nothing else of the graph is about the selection. What a mixture counts over its router's choices is the model's own.

Before::

    select  %positions = cggr.select(…)    # [B, k], ascending
    main    %sum = cggr.grouped_mlp(%hidden, …, None, 'silu_gated', False)

After::

    select  %positions = cggr.select(…)
    select  %kept = aten.scatter(%none, 1, %positions, True)    # bool [B, S]
    select  %mask = aten.flatten(%kept, 0, 1)
    main    %sum = cggr.grouped_mlp(%hidden, …, %mask, 'silu_gated', False)
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.reference.experts import ExpertArguments
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import ORIGIN, Analysed, Shortened, value
from cggr_compile.ir.roles import middle_layers, quiet_region, token_ids
from cggr_compile.ir.token_shapes import TokenShapes, shape_text

aten = torch.ops.aten

_KEEP = ExpertArguments._fields.index("keep")


def skip_experts(program: Analysed, config: RoutingConfig) -> Analysed:
    """Gives the experts of the middle layers the selection of their layer as their mask; sets `routing.shortened`.

    Raises:
        CannotOptimize: no middle layer has experts, or some run on rows that are not known to be the batch's tokens.
    """
    middle = middle_layers(program, config)
    place = _experts(program, middle)
    builder = Builder(program)
    masks: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op != "output":
            builder.copy(node)
        if node in place:
            args = list(builder.env[node].args)
            args[_KEEP] = masks[place[node] if config.resample == "layer" else 0]
            builder.env[node].args = tuple(args)
        if node is program.routing.positions:
            masks = _masks(builder, config, len(middle))
    builder.copy_rest()
    shortened = tuple(_shortened(program, node, middle[index]) for node, index in place.items())
    return builder.finish("skip_experts", routing=builder.routing(shortened=shortened))


def _experts(program: Analysed, middle: range) -> dict[fx.Node, int]:
    """The experts of the middle layers, in order, each with the place of its layer among these."""
    residuals, shapes = program.stack.residuals, TokenShapes(program)
    found: dict[fx.Node, int] = {}
    for index, layer in enumerate(middle):
        inside = ancestors([residuals[layer]], stop=[residuals[layer - 1]])
        for node in sorted(inside):
            if node.target != torch.ops.cggr.grouped_mlp.default:
                continue
            if not shapes.is_flattened(node.args[0]):
                raise CannotOptimize(
                    f"the experts of layer {layer} run on rows of shape {shapes.text(node.args[0])} that are not known "
                    "to be the tokens of the batch in order",
                    node=node,
                    hint="keep that layer whole (first_layers, last_layers), or use skip='layers'",
                )
            found[node] = index
    if not found:
        text = f"layers {middle[0]}–{middle[-1]}" if len(middle) > 1 else f"layer {middle[0]}"
        raise CannotOptimize(
            f"skip='experts', and no experts were found in {text} of {len(residuals)}",
            hint="it takes a mixture whose experts fuse_experts recognises (experts_implementation='grouped_mm'; "
            "lower first_layers or last_layers where such layers are there), or use skip='layers'",
        )
    return found


def _masks(builder: Builder[Analysed], config: RoutingConfig, layers: int) -> list[fx.Node]:
    """Which tokens of the batch are kept, bool [B · S]: one mask, or with `resample="layer"` one a middle layer."""
    program = builder.program
    builder.part, builder.region = "select", quiet_region(program)
    positions = builder.env[program.routing.positions]
    nothing = builder.call(aten.zeros_like.default, builder.env[token_ids(program)], dtype=torch.bool)
    selections = [positions]
    if config.resample == "layer":
        selections = [builder.call(aten.select.int, positions, 0, index) for index in range(layers)]
    kept = [builder.call(aten.scatter.value, nothing, 1, own, True) for own in selections]
    return [builder.call(aten.flatten.using_ints, mask, 0, 1) for mask in kept]


def _shortened(program: Analysed, node: fx.Node, layer: int) -> Shortened:
    name, shape = node.args[0].meta.get(ORIGIN, node.args[0].name), shape_text(program, value(node.args[0]))
    return Shortened(name, shape, (0,), f"read by the experts of layer {layer}")
