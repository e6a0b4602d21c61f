"""Where the tokens of a sequence meet on their way to the head, and what is proved of who sees whom there.

`attentions` finds every attention: the operator, and softmax over keys where attention is written out. What hides keys
from queries in each is a mask, whose element is known as a function of its indices (`index_functions`) where it is
computed of sizes and of inputs that the caller named. Whatever else would let a token read another one is a refusal:
operators that go by place (`sequence_order`), sums and products along the sequence.

Flattened tokens (a mixture-of-experts) are taken to be what each makes of itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from cggr_compile.errors import Refusal
from cggr_compile.ir.dataflow import ancestors, carries_activations, descendants
from cggr_compile.ir.index_functions import Expression, IndexFunction, IndexFunctions, axis
from cggr_compile.ir.program import Analysed, is_tensor, value
from cggr_compile.ir.roles import is_state
from cggr_compile.ir.sequence_order import order_dependence, packet_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
BATCH, QUERY, KEY = sympy.symbols("batch query key", integer=True, nonnegative=True)

_PRODUCTS = {aten.matmul, aten.bmm, aten.baddbmm, aten.einsum}
_REDUCTIONS = {
    *(aten.sum, aten.mean, aten.prod, aten.amax, aten.amin, aten.max, aten.min, aten.logsumexp, aten.norm),
    *(aten.std, aten.var, aten.linalg_vector_norm, aten.log_softmax),
}
_SAME_ENTRIES = {
    *(aten.to, aten._to_copy, aten.dropout, aten.clone, aten.contiguous, aten.alias, aten.view, aten.reshape),
    *(aten._unsafe_view, aten.expand, aten.type_as),
}


class Attention(NamedTuple):
    """Where queries see keys: the node, and conditions over BATCH, QUERY and KEY that hold wherever one does."""

    node: fx.Node
    seen: tuple[Expression, ...]


def attentions(program: Analysed, functions: IndexFunctions) -> list[Attention] | Refusal:
    """The attentions between the embedding and the head, or what else lets tokens meet there.

    The sequence length must be a symbol.
    """
    stream = activations(program)
    found: list[Attention] = []
    for node in sorted(ancestors([program.head.hidden]) & stream):
        if node.target == ATTENTION:
            found.append(Attention(node, _seen_by(node, functions)))
        elif node.target == aten.softmax.int and _is_sequence(program, node.args[0], node.args[1]):
            found.append(Attention(node, _seen(node.args[0], functions)))
        elif not _flattened(program, node):
            refusal = order_dependence(program, node, stream) or _sums(program, node)
            if refusal is not None:
                return refusal
    return found


def activations(program: Analysed) -> set[fx.Node]:
    """What is computed of parameters and buffers, and so of what tokens become."""
    return descendants([node for node in program.placeholders if is_state(program, node)], carries_activations)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an attention node by its name in the schema, its default where it is not given."""
    for place, parameter in enumerate(ATTENTION._schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[place] if place < len(node.args) else parameter.default_value
    raise KeyError(name)


def _seen_by(node: fx.Node, functions: IndexFunctions) -> tuple[Expression, ...]:
    mask = argument(node, "attn_mask")
    causal = (sympy.Le(KEY, QUERY),) if argument(node, "is_causal") else ()
    if not isinstance(mask, fx.Node):
        return causal
    if value(mask).dtype == torch.bool:
        return (*causal, *_conditions(functions.of(mask), negated=False))
    return (*causal, *_seen(mask, functions))


def _seen(scores: fx.Node, functions: IndexFunctions) -> tuple[Expression, ...]:
    """What holds wherever an entry of attention's scores is not the lowest number: what was added to it, or filled in,
    elsewhere. Sums and moves of scores are looked through."""
    packet = packet_of(scores)
    if scores.target in (aten.where.ScalarOther, aten.where.self) and _is_lowest(scores.args[2]):
        return _conditions(functions.of(scores.args[0]), negated=False) + _seen_beside(scores.args[1], functions)
    if scores.target == aten.masked_fill.Scalar and _is_lowest(scores.args[2]):
        return _conditions(functions.of(scores.args[1]), negated=True) + _seen(scores.args[0], functions)
    if packet == aten.add and scores.kwargs.get("alpha", 1) == 1:
        return sum((_seen_beside(operand, functions) for operand in scores.args), ())
    if packet in (aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias):
        return _seen(scores.args[0], functions)
    return ()


def _seen_beside(operand: Any, functions: IndexFunctions) -> tuple[Expression, ...]:
    return _seen(operand, functions) if is_tensor(operand) and isinstance(operand, fx.Node) else ()


def _is_lowest(filled: Any) -> bool:
    lowest = (-math.inf, *(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)))
    return isinstance(filled, float) and filled in lowest


def _conditions(mask: IndexFunction | None, negated: bool) -> tuple[Expression, ...]:
    """What a mask [..., Q, K], whose first of four dimensions is the batch, asks of the places that it lets through."""
    if mask is None or len(mask.sizes) not in (2, 4):
        return ()
    places = [QUERY, KEY] if len(mask.sizes) == 2 else [BATCH, axis(1), QUERY, KEY]
    element = mask.at(places)
    element = sympy.Not(element) if negated else element
    return tuple(element.args) if isinstance(element, sympy.And) else (element,)


def _sums(program: Analysed, node: fx.Node) -> Refusal | None:
    """Refuses what adds up tokens elsewhere than behind a softmax over keys."""
    packet = packet_of(node)
    if packet in _PRODUCTS:
        left = node.args[1] if packet == aten.baddbmm else node.args[0]
        if packet == aten.einsum or (_is_sequence(program, left, -1) and not _of_softmax(left)):
            return Refusal(f"{packet} adds up tokens, and is no attention", node)
    if packet in (*_REDUCTIONS, aten.softmax) and is_tensor(node.args[0]):
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = list(given) if isinstance(given, (list, tuple)) else [given]
        if not dims or None in dims:
            dims = list(range(value(node.args[0]).dim()))
        if any(isinstance(dim, int) and _is_sequence(program, node.args[0], dim) for dim in dims):
            return Refusal(f"{packet} adds up tokens, and is no attention", node)
    return None


def _flattened(program: Analysed, node: fx.Node) -> bool:
    """Whether a call of a batch of one row sees tokens without their batch in front; of several rows, the size of such
    a dimension is not the sequence's."""
    if program.batch != 1:
        return False
    tensors = [value(each) for each in (node, *node.all_input_nodes) if is_tensor(each)]
    return all(
        dim == 0 for val in tensors for dim, size in enumerate(val.shape) if program.mentions(size, program.sequence)
    )


def _of_softmax(node: Any) -> bool:
    """Whether a value holds attention's weights."""
    while packet_of(node) in _SAME_ENTRIES:
        node = node.args[0]
    return bool(node.target == aten.softmax.int)


def _is_sequence(program: Analysed, node: Any, dim: Any) -> bool:
    """Whether a dimension of a tensor is the sequence's, or keys with others."""
    shape = value(node).shape
    return bool(len(shape)) and program.same_size(shape[dim], program.sequence)
