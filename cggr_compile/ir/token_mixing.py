"""Where the tokens of a sequence meet on their way to the head, and what is proved of who sees whom there.

`attentions` finds every attention: the operator, and softmax over keys where attention is written out. What hides keys
from queries in each is a mask, whose element is known as a function of its indices (`index_functions`) where it is
computed of sizes and of inputs that the caller named. All else that is computed of tokens must be known to compute each
by itself; operators that go by place (`sequence_order`), sums and choices along the sequence, and operators that are
not listed here are refusals.

What a mixture-of-experts does to flattened tokens, to sort them by expert and back, is taken to compute each by itself.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from cggr_compile.errors import Refusal
from cggr_compile.ir.dataflow import ancestors, carries_activations, descendants
from cggr_compile.ir.index_functions import Expression, IndexFunctions, axis
from cggr_compile.ir.program import Analysed, is_tensor, value
from cggr_compile.ir.roles import changes_of, is_state, main_roots
from cggr_compile.ir.sequence_order import is_pointwise, is_token_count, order_dependence, packet_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
BATCH, QUERY, KEY = sympy.symbols("batch query key", integer=True, nonnegative=True)

_PRODUCTS = {aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
# Operators that take a dimension, or several, as their second argument, and meet along it alone.
_ALONG = {
    *(aten.sum, aten.mean, aten.prod, aten.amax, aten.amin, aten.logsumexp, aten.softmax, aten.log_softmax),
    *(aten.std, aten.var, aten.max, aten.min),
}
_SAME_ENTRIES = {
    *(aten.to, aten._to_copy, aten.dropout, aten.clone, aten.contiguous, aten.alias, aten.view, aten.reshape),
    *(aten._unsafe_view, aten.expand, aten.type_as, aten.detach),
}
# Operators whose result at a token is of that token, where `order_dependence` has nothing against them.
_BY_TOKEN = {
    *_SAME_ENTRIES,
    *(aten.linear, aten.layer_norm, aten.rms_norm, aten.embedding, aten.where, aten.masked_fill),
    *(aten.transpose, aten.permute, aten.t, aten.mT, aten.unsqueeze, aten.squeeze, aten.expand_as, aten.repeat),
    *(aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.flatten, aten.unflatten, aten.cat, aten.stack),
    *(aten.slice, aten.select, aten.index, aten.gather, aten.repeat_interleave, aten.floor_divide),
}
_VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten}
# What sends flattened tokens to their experts and back.
_OF_EXPERTS = {
    *("aten::sort", "aten::histc", "aten::index", "aten::index_put", "aten::index_add", "aten::empty_like"),
    *("aten::_grouped_mm", "transformers::grouped_mm_fallback"),
}


class Attention(NamedTuple):
    """Where queries see keys: the node, conditions over BATCH, QUERY and KEY that hold wherever one does, and the masks
    that they were read off."""

    node: fx.Node
    seen: tuple[Expression, ...]
    masks: tuple[fx.Node, ...]


def attentions(
    program: Analysed, functions: IndexFunctions, given: Iterable[fx.Node] = ()
) -> list[Attention] | Refusal:
    """The attentions between the embedding and the head, or what else lets tokens meet there.

    Of the arguments of the call, `given` may be read by any token of any other: what is computed of them alone is not
    looked at. The sequence length must be a symbol.
    """
    stream = _stream(program, given)
    between = ancestors([program.head.hidden])
    found = [attention_of(node, functions) for node in sorted(between) if is_attention(program, node)]
    masks = {mask for attention in found for mask in attention.masks}
    kept = {attention.node for attention in found}
    for node in sorted(ancestors([program.head.hidden], stop=masks) & stream - kept):
        refusal = _meeting(program, node, stream, kept) or _regrouping(program, node)
        if refusal is not None:
            return refusal
    return found


def _stream(program: Analysed, given: Iterable[fx.Node]) -> set[fx.Node]:
    """What is computed of tokens: of parameters, buffers, and arguments of the call but for `given`."""
    arguments = [node for node in program.placeholders if program.kind(node) == "batch" and node not in given]
    return activations(program) | descendants(arguments, carries_activations)


def rows_meet(program: Analysed, found: Collection[Attention], given: Iterable[fx.Node] = ()) -> Refusal | None:
    """What lets tokens of different rows meet between the embedding and the head, where `attentions` found those of one
    row to meet; None where nothing does."""
    transposed = dataclasses.replace(program, batch=program.sequence, sequence=program.batch)
    stream = _stream(program, given)
    masks = {mask for attention in found for mask in attention.masks}
    between = ancestors([program.head.hidden], stop=masks) & stream - {attention.node for attention in found}
    refusals = (_meeting(transposed, node, stream, ()) for node in sorted(between))
    return next((refusal for refusal in refusals if refusal is not None), None)


def read_besides(program: Analysed, found: Collection[Attention]) -> Refusal | None:
    """What reads a mask of attention for anything else than to hide keys, or to make another mask of attention."""
    masks = {mask for attention in found for mask in attention.masks}
    hiding = {ATTENTION, aten.masked_fill.Scalar, aten.where.ScalarOther}
    for node in sorted(ancestors(main_roots(program), stop=masks)):
        hides = node.target in hiding and (node.target == ATTENTION or _is_lowest(node.args[2]))
        if not hides and any(source in masks for source in node.all_input_nodes):
            return Refusal("a mask of attention is read for something else", node)
    return None


def is_attention(program: Analysed, node: fx.Node) -> bool:
    """Whether queries of the sequence see its keys in a node."""
    if node.target == aten.softmax.int:
        scores, dim = node.args[:2]
        last = dim in (-1, value(scores).dim() - 1)
        return (
            last and value(scores).dim() > 2 and _is_sequence(program, scores, -1) and _is_sequence(program, scores, -2)
        )
    if node.target != ATTENTION:
        return False
    return all(_is_sequence(program, argument(node, name), -2) for name in ("query", "key"))


def attention_of(node: fx.Node, functions: IndexFunctions) -> Attention:
    """What an attention node asks of the keys that its queries see."""
    masks: list[fx.Node] = []
    if node.target == ATTENTION:
        mask = argument(node, "attn_mask")
        seen = (sympy.Le(KEY, QUERY),) if argument(node, "is_causal") else ()
        if isinstance(mask, fx.Node):
            seen += (
                _letting(mask, functions, masks) if value(mask).dtype == torch.bool else _seen(mask, functions, masks)
            )
            masks.append(mask)
    else:
        seen = _seen(node.args[0], functions, masks)
    return Attention(node, seen, tuple(masks))


def activations(program: Analysed) -> set[fx.Node]:
    """What is computed of parameters and buffers, and so of what tokens become."""
    return descendants([node for node in program.placeholders if is_state(program, node)], carries_activations)


def only_the_loss_reads(program: Analysed) -> bool:
    """Whether nothing that a step returns or changes, but the loss, depends on what the tokens become."""
    inside = ancestors([program.head.hidden]) & activations(program)
    # Other outputs than these are logits and activations, which a step does not return.
    outputs = [out for i, out in enumerate(program.outputs) if i in program.stored or is_scalar(out)]
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    effects = [node for node in calls if node.is_impure() and not node.users]
    roots = [*outputs, *effects, *changes_of(program)]
    return not ancestors(roots, stop=[program.head.loss]) & inside


def is_scalar(out: Any) -> bool:
    """Whether an output is one number: a tensor of no dimension, or a size and what is computed of sizes."""
    return isinstance(out, fx.Node) and not (is_tensor(out) and value(out).dim())


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an attention node by its name in the schema, its default where it is not given."""
    for place, parameter in enumerate(ATTENTION._schema.arguments):
        if parameter.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[place] if place < len(node.args) else parameter.default_value
    raise KeyError(name)


def bound(condition: Expression, later: sympy.Symbol, earlier: sympy.Symbol) -> int | None:
    """The c of a condition that says later - earlier <= c, or None for any other condition."""
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    # gts and lts are the greater and the lesser side, whichever way the relation was written.
    rest = sympy.expand(condition.gts - condition.lts - (earlier - later))
    if not rest.is_Integer:
        return None
    return int(rest) - isinstance(condition, (sympy.Lt, sympy.Gt))


def _letting(mask: fx.Node, functions: IndexFunctions, masks: list[fx.Node], negated: bool = False) -> tuple[Any, ...]:
    """What a boolean mask asks of the places that it lets through; it is added to `masks` if that is known."""
    found = conditions(functions, mask, negated)
    masks += [mask] if found else []
    return found


def _seen(scores: Any, functions: IndexFunctions, masks: list[fx.Node]) -> tuple[Expression, ...]:
    """What holds wherever an entry of attention's scores is not the lowest number: what was added to it, or filled in,
    elsewhere. Sums and copies of scores are looked through."""
    if not isinstance(scores, fx.Node) or not is_tensor(scores):
        return ()
    packet = packet_of(scores)
    if scores.target == aten.where.ScalarOther and _is_lowest(scores.args[2]):
        return _letting(scores.args[0], functions, masks) + _seen(scores.args[1], functions, masks)
    if scores.target == aten.masked_fill.Scalar and _is_lowest(scores.args[2]):
        return _letting(scores.args[1], functions, masks, negated=True) + _seen(scores.args[0], functions, masks)
    if packet == aten.add and scores.kwargs.get("alpha", 1) == 1:
        return tuple(condition for operand in scores.args for condition in _seen(operand, functions, masks))
    if packet in (aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias):
        return _seen(scores.args[0], functions, masks)
    return ()


def _is_lowest(filled: Any) -> bool:
    lowest = (-math.inf, *(torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)))
    return isinstance(filled, float) and filled in lowest


def conditions(functions: IndexFunctions, node: fx.Node, negated: bool = False) -> tuple[Expression, ...]:
    """What a mask [..., Q, K], whose first of four dimensions is the batch, asks of the places that it lets through. A
    dimension of one entry has that for every query, key or row."""
    mask = functions.of(node)
    if mask is None or len(mask.sizes) not in (2, 4):
        return ()
    places = [QUERY, KEY] if len(mask.sizes) == 2 else [BATCH, axis(1), QUERY, KEY]
    running = [
        size != 1 or (place is BATCH and functions.one_row) for place, size in zip(places, mask.sizes, strict=True)
    ]
    element = mask.at([place if runs else sympy.Integer(0) for place, runs in zip(places, running, strict=True)])
    element = sympy.Not(element) if negated else element
    return tuple(element.args) if isinstance(element, sympy.And) else (element,)


def _meeting(
    program: Analysed, node: fx.Node, stream: Collection[fx.Node], weights: Collection[fx.Node]
) -> Refusal | None:
    """Why what a node computes of a token may depend on others, outside of attention, which has the `weights`."""
    if node.op != "call_function" or not any(_has_tokens(program, each) for each in (node, *node.all_input_nodes)):
        return None
    if _is_of_experts(program, node):
        return None
    refusal = order_dependence(program, node, stream)
    if refusal is not None:
        return refusal
    packet, adds = packet_of(node), f"{packet_of(node)} adds up tokens, and is no attention"
    if packet in _PRODUCTS:
        left = node.args[1] if packet in (aten.baddbmm, aten.addmm) else node.args[0]
        return Refusal(adds, node) if _is_tokens(program, left, -1) and _weights(left) not in weights else None
    if packet in _BY_TOKEN or is_pointwise(node) or node.target is operator.getitem:
        return None
    if packet in _ALONG:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        along = list(dims) if isinstance(dims, (list, tuple)) else [dims]
        if not along or None in along:
            along = list(range(value(node.args[0]).dim()))
        return Refusal(adds, node) if any(_is_tokens(program, node.args[0], dim) for dim in along) else None
    if packet == aten.topk:
        dim = node.args[2] if len(node.args) > 2 else -1
        return Refusal("aten.topk chooses among tokens", node) if _is_tokens(program, node.args[0], dim) else None
    return Refusal(f"whether {node.target} computes each token by itself is not known", node)


def _is_of_experts(program: Analysed, node: fx.Node) -> bool:
    """Whether a call sends flattened tokens to their experts, or back."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name not in _OF_EXPERTS:
        return False
    if node.target == aten.sort.default and value(node.args[0]).is_floating_point():
        return False  # of numbers of experts alone
    shapes = [val.shape for each in (node, *node.all_input_nodes) for val in _tensors(each)]
    if program.batch == 1:  # tokens without their batch in front
        return not any(program.mentions(size, program.sequence) for shape in shapes for size in shape[1:])
    by_row = (program.batch, program.sequence)
    return not any(program.same_size(size, each) for shape in shapes for size in shape for each in by_row)


def _regrouping(program: Analysed, node: fx.Node) -> Refusal | None:
    """Why entries of several tokens are taken as those of one."""
    packet = packet_of(node)
    if packet in (aten.cat, aten.repeat) and any(copies_of_tokens(program, size) > 1 for size in value(node).shape):
        return Refusal(f"{packet} puts flattened tokens behind each other", node)
    if packet not in _VIEWS or _before_tokens(program, node.args[0]) == _before_tokens(program, node):
        return None
    return Refusal(f"{packet} takes entries of several tokens as one", node)


def copies_of_tokens(program: Analysed, size: Any) -> int:
    """How many times all tokens of the batch a dimension has; 0 for any other."""
    every = sympy.sympify(program.expression(program.batch)) * program.expression(program.sequence)
    times = sympy.cancel(program.expression(size) / every)
    return int(times) if times.is_Integer else 0


def _before_tokens(program: Analysed, node: fx.Node) -> tuple[list[Any], list[Any]]:
    """How many entries a value has in front of those of one token, and of one row: flattened tokens are in the order of
    their rows, and what several dimensions were joined to has the tokens, or rows, outermost."""
    before, of_tokens, of_rows = sympy.Integer(1), [], []
    rows = sympy.sympify(program.expression(program.batch))
    for size in value(node).shape:
        rest = sympy.sympify(program.expression(size))
        flattened = copies_of_tokens(program, size) > 0
        if flattened or (rows.free_symbols and rows.free_symbols <= rest.free_symbols):
            of_rows.append(before)
        of_tokens += [before * rows if flattened else before] if program.mentions(size, program.sequence) else []
        before *= rest
    return of_tokens, of_rows if rows.free_symbols else []


def _weights(node: fx.Node) -> fx.Node:
    """What a value has the entries of."""
    while packet_of(node) in _SAME_ENTRIES:
        node = node.args[0]
    return node


def _is_sequence(program: Analysed, node: Any, dim: Any) -> bool:
    """Whether a dimension of a tensor is the sequence's, or keys with others."""
    shape = value(node).shape
    return -len(shape) <= dim < len(shape) and program.same_size(shape[dim], program.sequence)


def _is_tokens(program: Analysed, node: Any, dim: Any) -> bool:
    """Whether a dimension of a tensor is the sequence's, or flattened tokens."""
    shape = value(node).shape
    return -len(shape) <= dim < len(shape) and _counts(program, shape[dim])


def _has_tokens(program: Analysed, node: fx.Node) -> bool:
    """Whether a dimension is the sequence's or flattened tokens, of a tensor or of one of several."""
    return any(_counts(program, size) for val in _tensors(node) for size in val.shape)


def _counts(program: Analysed, size: Any) -> bool:
    return program.mentions(size, program.sequence) and is_token_count(program, size)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = value(node)
    return [item for item in (val if isinstance(val, (list, tuple)) else [val]) if isinstance(item, torch.Tensor)]
