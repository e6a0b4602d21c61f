"""Makes products with the model's weights in float8 (`cggr::fp8_linear`): the router's, the trained parts', or both.

Scores only rank rows, and nothing else reads the router, so rounding its operands (`router_body="fp8"`) moves no loss
and no gradient of the rows that are selected. Rounding those of the trained parts (`matmul="fp8"`) changes what is
trained: forward and input gradients are of rounded rows, weight gradients are not (`fp8_linear.py`).

A product is quantised where it is a linear by definition, `linear(x, W, b)` or a product with a table of two dimensions
that is computed from the model's state alone, and where the sizes of that table are multiples of what tensor cores take
(`fp8_linear.MULTIPLE`); the rule does not ask for the device, so that the same products are quantised on all. Tables of
other sizes, products that the model makes in a wider dtype than its weights have, or leaves autocast for, experts'
grouped products and convolutions stay exact and are counted; so does, uncounted, whatever other operator reads weights.
The head, an operator of its own by then, and its logits, where they are kept, stay exact.

In front of the lowering, behind all that reads a product for what it is (`skip_experts`).

Before::

    router  %q = aten.linear(%x, q_proj.weight)
    main    %o = aten.linear(%y, o_proj.weight)

After::

    router  %q = cggr.fp8_linear(%x, q_proj.weight, None)
    main    %o = cggr.fp8_linear(%y, o_proj.weight, None)
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
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import PART, REGION, TRAINED_PARTS, Analysed, Float8Products, value

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
    "aten.bmm": (1,),
    "aten.baddbmm": (2,),
    "aten.conv1d": (1,),
    "aten.convolution": (1,),
    "aten._grouped_mm": (1,),
    "transformers.grouped_mm_fallback": (1,),
    "cggr.grouped_mlp": (1, 2),
}
# What an option asks for: whose products, and where `Routing` counts them.
_OPTIONS = {"router_body": ("router's", "quantized_router"), "matmul": ("model's", "quantized")}


def quantize_linears(program: Analysed, config: RoutingConfig) -> Analysed:
    """Replaces products with weights by `cggr.fp8_linear`, in the parts that the options ask for, and sets
    `routing.quantized` and `.quantized_router`.

    Raises:
        CannotOptimize: float8 can make none that an option asks for.
    """
    parts = _parts(program, config)
    if not parts:
        return program
    builder, weights = Builder(program), _weights(program)
    made, exact = Counter[str](), {option: Counter[str]() for option in parts.values()}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        option, tables = parts.get(node.meta.get(PART, "")), _tables(node, weights)
        if option is None or not tables or node is program.head.linear:
            builder.copy(node)
        elif (obstacle := _obstacle(node)) is None:
            builder.env[node] = _quantized(builder, node)
            made[option] += 1
        else:
            builder.copy(node)
            exact[option].update(f"{node.target.overloadpacket} by {_shape(w)}: {obstacle.reason}" for w in tables)
    counts = {option: Float8Products(made[option], tuple(left.items())) for option, left in exact.items()}
    for option, products in counts.items():
        if not products.made:
            raise CannotOptimize(
                f"{option}='fp8', and float8 can make none of the {_OPTIONS[option][0]} products with weights "
                f"({products.left})",
                hint=f"leave {option} out",
            )
    builder.copy_rest()
    found = {_OPTIONS[option][1]: products for option, products in counts.items()}
    return builder.finish("quantize_linears", routing=builder.routing(**found))


def _parts(program: Analysed, config: RoutingConfig) -> dict[str, str]:
    """The parts of the program whose products are made in float8, each with the option that asks for it."""
    found = {}
    if config.router_body == "fp8" and program.routing.router_hidden is not None:
        found["router"] = "router_body"
    if config.matmul == "fp8" and program.loss_output >= 0:  # a program of scores alone trains nothing
        found |= dict.fromkeys(TRAINED_PARTS, "matmul")
    return found


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


def _tables(node: fx.Node, weights: set[fx.Node]) -> list[fx.Node]:
    """The weights that a product of activations multiplies by; none for other operators."""
    if node.target in _LINEARS:
        places: tuple[int, ...] = (_LINEARS[node.target].weight,)
    else:
        places = _OTHERS.get(str(getattr(node.target, "overloadpacket", None)), ())
    tables = [node.args[place] for place in places]
    return tables if node not in weights and weights.issuperset(tables) else []


def _shape(weight: fx.Node) -> str:
    return " × ".join(str(size) for size in value(weight).shape)


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
    if _is_widened(node, node.args[places.weight]):
        return Refusal("in full precision by the model's own choice", node)
    if node.kwargs or (bias is not None and value(bias).shape != (value(node).shape[-1],)):
        return Refusal("more than a product and a bias", node)
    return None


def _is_widened(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the model leaves autocast for a product, or makes it in a wider dtype than the weight's own, as some
    gates of experts are."""
    own = [value(source).dtype.itemsize for source in ancestors([weight]) if source.op == "placeholder"]
    return value(weight).dtype.itemsize > max(own) or not all(cast.enabled for cast in node.meta[REGION].autocasts)


def _quantized(builder: Builder[Analysed], node: fx.Node) -> fx.Node:
    places = _LINEARS[node.target]
    input, weight = (builder.env[node.args[place]] for place in (places.input, places.weight))
    bias = places.bias_of(node)
    if node.target != aten.linear.default:
        weight = builder.call_for(node, aten.t.default, weight)
    operands = input, weight, None if bias is None else builder.env[bias]
    return builder.call_for(node, torch.ops.cggr.fp8_linear.default, *operands)
