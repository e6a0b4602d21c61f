"""Rebuilds the step of a padded batch [B, S] on its real tokens, one row behind the other in one sequence [1, T].

What is done token by token then runs on T tokens, and on no padding. Attention stays within the rows: it is made by
flash attention of variable lengths where that can run (`varlen.py`), and else under a mask [T, T]. Behind the real
tokens come a few of the padding, so that T takes few values; nobody sees them, and their labels are ignored.

That this is the step of the padded batch is proved, or the pass refuses: tokens meet in attention alone
(`token_mixing`), also those of different rows; its masks ask for real tokens, at most so far ahead and behind; and
nothing but the loss reads what tokens become. Values that go by place, or by the attention mask alone (positions), are
made for the padded batch and read at the real tokens' places. So every token computes what it did, and the loss has the
same terms. The caller sees to it that no place of padding predicts a label (`run/unpadding.py`).

Before::

    main    %hidden = aten.embedding(embed.weight, %input_ids)    # [B, S, D]
    main    %attention = aten.scaled_dot_product_attention(%q, %k, %v, %mask)

After::

    gather  %ids = aten.index_select(aten.flatten(%input_ids), 0, %places)    # [1, T]
    main    %hidden = aten.embedding(embed.weight, %ids)    # [1, T, D]
    main    %attention = aten._flash_attention_forward(%q, %k, %v, %ends, %ends, S, S, …)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from cggr_compile.passes.rewrite.shared import Rewrite, attention_with, fresh_size, own_labels, write_main_pass
from cggr_compile.passes.rewrite.varlen import Reach, attend, reach_of, runs_varlen
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, Refusal
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors, carries_activations, clone, descendants
from cggr_compile.ir.index_functions import IndexFunctions, element_of
from cggr_compile.ir.program import Analysed, hint, is_tensor, value
from cggr_compile.ir.roles import PADDING, main_roots, token_argument
from cggr_compile.ir.sequence_order import is_pointwise, packet_of
from cggr_compile.ir.token_mixing import (
    ATTENTION,
    BATCH,
    KEY,
    QUERY,
    Attention,
    argument,
    attentions,
    conditions,
    copies_of_tokens,
    is_scalar,
    only_the_loss_reads,
    read_besides,
    rows_meet,
)

aten = torch.ops.aten
PLACES = "places"
_CONSTANTS = {aten.zeros.default, aten.ones.default, aten.full.default}
_REAL = [sympy.Ne(element_of(PADDING, BATCH, place), 0) for place in (KEY, QUERY)]


def _refusal(reason: str, node: fx.Node | None = None) -> CannotOptimize:
    hint = "leave unpad out, or give unpad='auto', to compute padding"
    return CannotOptimize(f"padding is not left out: {reason}", node=node, hint=hint)


def unpad_rows(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the input `places` int64 [T]: the real tokens' places in the flattened batch, in order, then some padding's;
    copies the step onto the tokens there.

    Raises:
        CannotOptimize: why the step of the real tokens is not proved to be that of the padded batch.
    """
    padding = token_argument(program, PADDING)
    if padding is None:
        given = next(value(node) for node in program.placeholders if program.path(node) == PADDING)
        given_as = f"{given.dtype} {list(map(hint, given.shape))}"
        raise _refusal(f"attention_mask is {given_as}, expected integers or booleans of the labels' batch and sequence")
    functions = IndexFunctions(program.shape_env, {PADDING: padding})
    found = _proved(program, functions, padding, config)
    labels = own_labels(program, [padding])
    builder = Builder(program)
    builder.copy_inputs()
    builder.part = "gather"
    with program.fake_mode:
        total = program.batch * program.sequence
        tokens = fresh_size(program, "tokens", total)
        places = torch.empty((tokens,), dtype=torch.int64, device=value(padding).device)
    batch = _Batch(builder, padding, builder.placeholder(PLACES, places))
    roots = main_roots(program)
    masks = {mask: batch.mask(mask, functions) for attention in found for mask in attention.masks}
    substitution = {node: builder.env[node] for node in program.placeholders} | masks
    substitution |= _by_place(builder, batch, roots, masks, padding)
    ignored, shift = program.head.ignore_index, program.head.shift
    for node in program.placeholders:
        if node is labels:
            target = builder.call(aten.constant_pad_nd.default, builder.env[node], [-shift, shift], ignored)
            target = builder.call(aten.constant_pad_nd.default, batch.taken(target), [shift, -shift], ignored)
            substitution[node] = target
        elif program.kind(node) == "batch" and is_tensor(node) and node is not padding:
            substitution[node] = _of_tokens(program, batch, node)
    for node in program.placeholders:
        if program.kind(node) == "size":
            substitution[node] = batch.size(value(node), builder.env[node])
    write_main_pass(builder, roots, substitution, _attended(batch, found))
    return builder.finish("unpad_rows")


def _proved(
    program: Analysed, functions: IndexFunctions, padding: fx.Node, config: RoutingConfig
) -> dict[Attention, Reach]:
    """The attentions, in which alone tokens meet, and what each asks."""
    if config.keep_logits:
        raise _refusal("keep_logits=True wants the logits of padding too")
    if not isinstance(program.sequence, torch.SymInt):
        raise _refusal("the model fixes the sequence length while it is traced")
    found = attentions(program, functions, [padding])
    refusal = rows_meet(program, found, [padding]) or read_besides(program, found) if isinstance(found, list) else found
    if refusal is not None:
        raise _refusal(refusal.reason, refusal.node)
    assert not isinstance(found, Refusal)
    reaches: dict[Attention, Reach] = {}
    for attention in found:
        reach = reach_of(attention.seen, _REAL)
        # Where padding is promised to be behind, causal attention sees none.
        real = _REAL[0] in attention.seen
        if reach is None or not (real or (config.padding == "right" and reach.ahead == 0)):
            raise _refusal("an attention is not proved to see real tokens alone", attention.node)
        reaches[attention] = reach
    terms, length = value(program.head.target).numel(), program.sequence
    if not any(program.same_size(terms, program.batch * size) for size in (length, length - program.head.shift)):
        raise _refusal("the loss leaves out tokens by their places", program.head.target)
    if not only_the_loss_reads(program):
        raise _refusal(
            "more than the loss depends on what the tokens become, padding included, as an auxiliary loss does "
            "(output_router_logits=True)"
        )
    for index, out in enumerate(program.outputs):
        if (index in program.stored or is_scalar(out)) and _counts_places(program, out):
            raise _refusal("the model returns or stores what it counts in the batch, padding included", out)
    return reaches


def _counts_places(program: Analysed, out: Any) -> bool:
    """Whether an output depends on the batch's sizes or on something of each place, but for the loss."""
    read = ancestors([out], stop=[program.head.loss]) if isinstance(out, fx.Node) else ()
    kinds = {node: program.kind(node) for node in read if node.op == "placeholder"}
    return any(kind == "size" or (kind == "batch" and value(node).dim() > 1) for node, kind in kinds.items())


class _Batch:
    """The padded batch and the places that are read of it, as nodes of the graph that is built."""

    def __init__(self, builder: Builder[Analysed], padding: fx.Node, places: fx.Node) -> None:
        self.builder = builder
        self.program = builder.program
        self.places = places
        self._padding = builder.env[padding]
        call = builder.call
        self.length = call(aten.sym_size.int, self._padding, 1)
        self.columns = call(aten.remainder.Scalar, places, self.length)
        self._masks: dict[Any, fx.Node] = {}
        self._one = call(aten.sym_size.int, call(aten.unsqueeze.default, places, 0), 0)
        self._count = call(aten.sym_size.int, places, 0)

    def taken(self, node: fx.Node) -> fx.Node:
        """Of a value [B, S, …] the entries of the tokens, [1, T, …]."""
        call = self.builder.call
        flat = call(aten.flatten.using_ints, node, 0, 1)
        return call(aten.unsqueeze.default, call(aten.index_select.default, flat, 0, self.places), 0)

    def size(self, size: Any, node: fx.Node) -> fx.Node:
        """What stands for a size of the padded batch."""
        if self.program.same_size(size, self.program.batch):
            return self._one
        return self._count if self.program.same_size(size, self.program.sequence) else node

    def mask(self, node: fx.Node, functions: IndexFunctions) -> fx.Node:
        """The mask [T, T], with dimensions of 1 in front as there were, that asks what a mask asks, and for keys of the
        query's row; its negation for the negation of one."""
        function = functions.of(node)
        assert function is not None
        negated = reach_of(conditions(functions, node), _REAL) is None
        reach = reach_of(conditions(functions, node, negated), _REAL)
        if reach is None:
            raise _refusal("a mask is not proved to ask for real tokens alone", node)
        return self._once(reach, negated, len(function.sizes))

    def within(self, reach: Reach) -> fx.Node:
        """The mask [1, 1, T, T] of an attention that has none."""
        return self._once(reach, False, 4)

    def _once(self, *key: Any) -> fx.Node:
        if key not in self._masks:
            self._masks[key] = self._written(*key)
        return self._masks[key]

    def _written(self, reach: Reach, negated: bool, dims: int) -> fx.Node:
        call = self.builder.call

        def apart(of_tokens: fx.Node) -> tuple[fx.Node, fx.Node]:
            return call(aten.unsqueeze.default, of_tokens, 1), call(aten.unsqueeze.default, of_tokens, 0)

        query, key = apart(self._rows())
        mask = call(aten.eq.Tensor, query, key)
        behind = call(aten.sub.Tensor, *apart(self.columns))
        if reach.ahead is not None:
            mask = call(aten.__and__.Tensor, mask, call(aten.ge.Scalar, behind, -reach.ahead))
        if reach.behind is not None:
            mask = call(aten.__and__.Tensor, mask, call(aten.le.Scalar, behind, reach.behind))
        if negated:
            mask = call(aten.logical_not.default, mask)
        for _ in range(dims - 2):
            mask = call(aten.unsqueeze.default, mask, 0)
        return mask

    def _rows(self) -> fx.Node:
        """The row of each token [T]; each place of padding is a row of its own, which no other sees."""
        call = self.builder.call
        rows = call(aten.div.Tensor_mode, self.places, self.length, rounding_mode="floor")
        flat = call(aten.flatten.using_ints, self._padding, 0, 1)
        padded = call(aten.eq.Scalar, call(aten.index_select.default, flat, 0, self.places), 0)
        own = call(aten.arange.default, self._count, device=value(self.places).device)
        return call(aten.where.self, padded, call(aten.bitwise_not.default, own), rows)

    def ends(self) -> fx.Node:
        """Where each row begins and the last ends, and the end of the padding behind them: int32 [B + 2]."""
        call = self.builder.call
        real = call(aten.ne.Scalar, self._padding, 0)
        ends = call(aten.cumsum.default, call(aten.sum.dim_IntList, real, [1]), 0)
        ends = call(aten.constant_pad_nd.default, ends, [1, 0], 0)
        last = call(aten.full.default, [1], self._count, dtype=torch.int64, device=value(self.places).device)
        return call(aten.to.dtype, call(aten.cat.default, [ends, last], 0), torch.int32)


def _of_tokens(program: Analysed, batch: _Batch, node: fx.Node) -> fx.Node:
    """An argument of the call, of the tokens at the places."""
    shape = value(node).shape
    if len(shape) > 1 and program.same_size(shape[0], program.batch) and program.same_size(shape[1], program.sequence):
        others = shape[2:]
        if not any(program.mentions(size, each) for size in others for each in (program.batch, program.sequence)):
            return batch.taken(batch.builder.env[node])
    if any(isinstance(size, torch.SymInt) for size in shape):
        raise _refusal(f"it cannot be told what each token has of {program.path(node)} of shape {tuple(shape)}")
    return batch.builder.env[node]


def _by_place(
    builder: Builder[Analysed],
    batch: _Batch,
    roots: list[fx.Node],
    masks: dict[fx.Node, fx.Node],
    padding: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """Values that are made of sizes and the attention mask, where something made of tokens reads them: made for the
    padded batch, and read at the places of the tokens."""
    program = builder.program
    arguments = [node for node in program.placeholders if program.kind(node) == "batch" and node is not padding]
    stream = descendants([*arguments, *masks], carries_activations)
    needed = ancestors(roots, stop=masks)
    of_sizes = [padding, *(node for node in program.placeholders if program.kind(node) == "size")]
    sized = descendants([*of_sizes, *(n for n in needed if n.target == aten.sym_size.int)]) - stream
    read = [node for node in sorted(needed & stream) if node.op == "call_function"]
    for node in read:
        numbers = [n for n in node.all_input_nodes if isinstance(value(n), (torch.SymInt, torch.SymFloat))]
        if (is_pointwise(node) or packet_of(node) == aten.where) and any(_grows(program, value(n)) for n in numbers):
            raise _refusal("a value depends on the batch size or the sequence length", node)
    frontier = {s for node in read for s in node.all_input_nodes if s in sized and is_tensor(s) and s not in masks}
    frontier = {
        node for node in frontier if not _is_constant(program, node) and not _numbers_tokens(program, node, stream)
    }
    copies = clone(builder, sorted(frontier), {node: builder.env[node] for node in program.placeholders})
    return {node: _at_places(program, batch, node, copies[node]) for node in sorted(frontier)}


def _grows(program: Analysed, number: Any) -> bool:
    return any(program.mentions(number, size) for size in (program.batch, program.sequence))


def _is_constant(program: Analysed, node: fx.Node) -> bool:
    """Whether all entries of a value are one number, whatever the sizes of the batch."""
    numbers = node.args[1:2] if node.target == aten.full.default else node.args if is_pointwise(node) else ()
    if any(_grows(program, value(number)) for number in numbers):
        return False
    if node.target in _CONSTANTS:
        return True
    tensors = [source for source in node.all_input_nodes if is_tensor(source)]
    spread = is_pointwise(node) or packet_of(node) in (aten.expand, aten.view, aten.reshape, aten.to, aten.unsqueeze)
    return bool(tensors) and spread and all(_is_constant(program, source) for source in tensors)


def _numbers_tokens(program: Analysed, node: fx.Node, stream: set[fx.Node]) -> bool:
    """Whether a value is the numbers of the flattened tokens, or of n choices of each, and says which are meant."""
    if node.target != aten.arange.default or any(is_pointwise(user) for user in node.users if user in stream):
        return False
    return copies_of_tokens(program, value(node).shape[0]) > 0


def _at_places(program: Analysed, batch: _Batch, node: fx.Node, made: fx.Node) -> fx.Node:
    shape = value(node).shape
    dims = [dim for dim, size in enumerate(shape) if program.same_size(size, program.sequence)]
    growing = [dim for dim, size in enumerate(shape) if _grows(program, size)]
    if not growing:
        return made
    if dims == growing and len(dims) == 1:
        return batch.builder.call(aten.index_select.default, made, dims[0], batch.columns)
    if growing == [0, 1] and dims == [1] and program.same_size(shape[0], program.batch):
        return batch.taken(made)
    raise _refusal(f"a value of shape {tuple(map(hint, shape))} goes by the places of tokens in the padded batch", node)


def _attended(batch: _Batch, found: dict[Attention, Reach]) -> Rewrite:
    """Attention of the tokens of each row, in the place of that of the padded rows."""
    lengths = {attention.node: reach for attention, reach in found.items() if attention.node.target == ATTENTION}
    varlen = {node for node in lengths if runs_varlen(node)}
    bare = {node for node in lengths if not isinstance(argument(node, "attn_mask"), fx.Node)} - varlen
    # What the attentions share is written in front of them all: a checkpoint of a layer is one run of nodes.
    ends = batch.ends() if varlen else None
    within = {node: batch.within(lengths[node]) for node in sorted(bare)}

    def rewrite(builder: Builder, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
        if node in within:
            return attention_with(builder, node, env, {"attn_mask": within[node], "is_causal": False})
        if ends is None or node not in varlen:
            return None  # where there is a mask, a substitute stands for it
        return attend(builder, node, env, lengths[node], ends, batch.length)

    return rewrite
