"""Makes the router's products with the model's weights in float8 (`cggr::fp8_linear`).

Scores only rank rows, and nothing else reads the router, so rounding its operands moves no loss and no gradient of the
rows that are selected. A product is quantised where it is a linear by definition, `linear(x, W, b)` or a product with a
table of two dimensions that is computed from the model's state alone, and where the sizes of that table are multiples
of what tensor cores take (`fp8_linear.MULTIPLE`); the rule does not ask for the device, so that the same products are
quantised on all. Tables of other sizes, experts' grouped products and convolutions stay exact and are counted; so does,
uncounted, whatever other operator reads weights. The head is an operator of its own (`score_head`).

Before::

    router  %q = aten.linear(%x, q_proj.weight)

After::

    router  %q = cggr.fp8_linear(%x, q_proj.weight, None)
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from cggr_compile.kernels.op import fp8_linear
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, Refusal
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import PART, REGION, Analysed, QuantizedBody, value

aten = torch.ops.aten


class _Places(NamedTuple):
    """Which arguments of an operator are a linear's."""

    input: int
    weight: int
    bias: int | None = None

    def bias_of(self, node: fx.Node) -> fx.Node | None:
        """The bias, None where there is none."""
        given = self.bias is not None and len(node.args) > self.bias
        return node.args[self.bias] if given else None


# All but the first multiply by the transpose of a linear's weight.
_LINEARS = {
    aten.linear.default: _Places(0, 1, 2),
    aten.addmm.default: _Places(1, 2, 0),
    aten.matmul.default: _Places(0, 1),
    aten.mm.default: _Places(0, 1),
}
# Where the other operators that multiply by weights have them.
_OTHERS = {
    "aten.bmm": 1,
    "aten.baddbmm": 2,
    "aten.conv1d": 1,
    "aten.convolution": 1,
    "aten._grouped_mm": 1,
    "transformers.grouped_mm_fallback": 1,
}


def quantize_router(program: Analysed, config: RoutingConfig) -> Analysed:
    """Replaces the router's products with weights by `cggr.fp8_linear` and sets `routing.quantized`.

    Raises:
        CannotOptimize: float8 can make none of them.
    """
    builder = Builder(program)
    weights = _weights(program)
    quantized, exact = 0, Counter[str]()
    for node in program.graph.nodes:
        place = _place_of_weight(node)
        if node.op == "output":
            continue
        if place is None or node.meta[PART] != "router" or node.args[place] not in weights or node in weights:
            builder.copy(node)
            continue
        obstacle = _obstacle(node)
        if obstacle is None:
            builder.env[node] = _quantized(builder, node)
            quantized += 1
        else:
            builder.copy(node)
            shape = " × ".join(str(size) for size in value(node.args[place]).shape)
            exact[f"{node.target.overloadpacket} by {shape}: {obstacle.reason}"] += 1
    body = QuantizedBody(quantized, tuple(exact.items()))
    if not quantized:
        raise CannotOptimize(
            f"router_body='fp8', and float8 can make none of the router's products with weights ({body.left})",
            hint="leave router_body out",
        )
    builder.copy_rest()
    return builder.finish("quantize_router", routing=builder.routing(quantized=body))


def _weights(program: Analysed) -> set[fx.Node]:
    """What is computed from the model's parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            if program.kind(node) == "state":
                found.add(node)
        elif sources and all(source in found for source in sources):
            found.add(node)
    return found


def _place_of_weight(node: fx.Node) -> int | None:
    """Which argument of a product may be its weight; None for other operators."""
    if node.target in _LINEARS:
        return _LINEARS[node.target].weight
    return _OTHERS.get(str(getattr(node.target, "overloadpacket", None)))


def _obstacle(node: fx.Node) -> Refusal | None:
    """Why a product stays exact, or None."""
    if node.target not in _LINEARS:
        return Refusal("no linear", node)
    places = _LINEARS[node.target]
    weight, bias = value(node.args[places.weight]), places.bias_of(node)
    if weight.dim() != 2:
        return Refusal("no single table", node)
    if any(size % fp8_linear.MULTIPLE for size in weight.shape):
        return Refusal(f"no multiples of {fp8_linear.MULTIPLE}", node)
    if node.kwargs or (bias is not None and value(bias).shape != (value(node).shape[-1],)):
        return Refusal("more than a product and a bias", node)
    return None


def _quantized(builder: Builder[Analysed], node: fx.Node) -> fx.Node:
    places = _LINEARS[node.target]
    input, weight = (builder.env[node.args[place]] for place in (places.input, places.weight))
    bias = places.bias_of(node)
    builder.part, builder.region = node.meta[PART], node.meta[REGION]
    if node.target != aten.linear.default:
        weight = builder.call(aten.t.default, weight)
    linear = builder.call(torch.ops.cggr.fp8_linear.default, input, weight, None if bias is None else builder.env[bias])
    linear.meta = {**node.meta, **linear.meta}
    return linear
