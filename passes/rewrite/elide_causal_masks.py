"""Takes causal masks out of scaled dot-product attention: `is_causal=True` instead of a tensor.

A mask that was built in the graph rules out the flash-attention kernels. It is dropped where it is *proved* to be the
causal mask for every size: its element, as a function of its indices (`index_functions`), is true exactly where
key <= query. A window at least as long as the captured sequences hides nothing; such a mask is dropped too, and the
capture guarded to such lengths. A mask that depends on an input, such as padding or packing, stays, and so does one of
a shorter window.

Padding behind the tokens is what nobody sees who sees nothing ahead. With `padding="right"` a mask that is causal and
asks for keys that are no padding is dropped too, where it is proved that tokens meet in causal attention alone
(`token_mixing`) and that nothing but the loss reads what they become: real tokens then compute what they computed, and
what padding computes reaches the loss only by a label. `cggr::checked_padding` raises where padding has a label, or is
not on the right.

With the mask gone, keys and values that were repeated for grouped queries are passed unrepeated, as
transformers does wherever it passes no mask itself.

This is what transformers itself calls in eager mode without padding, so the results are those of that call; where it
passes a mask that hides nothing (a window of just the sequence's length), they are those of another kernel.

Before::

    %mask = … 40 nodes …
    %attention = aten.scaled_dot_product_attention(%q, %repeated_k, %repeated_v, %mask)

After::

    %attention = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, enable_gqa=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from cggr_compile.passes.rewrite.shared import attention_with
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import Refusal
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.index_functions import Expression, IndexFunction, IndexFunctions, axis, element_of
from cggr_compile.ir.program import Analysed, hint, value
from cggr_compile.ir.repeated_heads import unrepeated
from cggr_compile.ir.roles import PADDING, is_token_argument, token_argument
from cggr_compile.ir.token_mixing import (
    ATTENTION,
    KEY,
    QUERY,
    argument,
    attentions,
    bound,
    only_the_loss_reads,
)

aten = torch.ops.aten
# Beyond this width SDPA takes grouped queries only by its plain kernel (`use_gqa_in_sdpa` in transformers).
_WIDEST_GROUPED_HEAD = 256


def elide_causal_masks(program: Analysed, config: RoutingConfig) -> Analysed:
    """Rewrites every attention whose mask is proved causal; sets `routing.causal_attentions` to how many there are.

    Masks, and what only they were computed from, go with the next pass that copies what is needed.
    """
    padding = token_argument(program, PADDING) if config.padding == "right" else None
    functions = IndexFunctions(program.shape_env, {} if padding is None else {PADDING: padding})
    promised = padding is not None and _only_real_tokens_count(program, functions, padding, config)
    nodes = program.graph.find_nodes(op="call_function", target=ATTENTION)
    causal = {node: mask for node in nodes if (mask := _causal(node, functions, promised)) is not None}
    if not causal:
        return program
    builder = Builder(program)
    builder.copy_inputs()
    if any(padded for padded in causal.values()):
        assert padding is not None
        labels = _labels(program)
        operator = torch.ops.cggr.checked_padding.default
        arguments = (builder.env[labels], builder.env[padding], program.head.shift, program.head.ignore_index)
        builder.env[labels] = builder.call(operator, *arguments)
    for node in program.graph.nodes:
        if node in causal:
            builder.env[node] = _without_mask(builder, program, node)
        elif node.op not in ("placeholder", "output"):
            builder.copy(node)
    builder.output(fx.map_arg(program.output.args[0], lambda old: builder.env[old]))
    routing = builder.routing(causal_attentions=len(causal))
    return builder.finish("elide_causal_masks", routing=routing)


def _labels(program: Analysed) -> fx.Node:
    """The labels [B, S] that the loss's target is made of."""
    return next(node for node in ancestors([program.head.target]) if is_token_argument(program, node))


def _only_real_tokens_count(
    program: Analysed, functions: IndexFunctions, padding: fx.Node, config: RoutingConfig
) -> bool:
    """Whether no token depends on those behind it, and nothing but the loss on what the tokens become."""
    if config.keep_logits or not isinstance(program.sequence, torch.SymInt):
        return False
    meetings = attentions(program, functions, [padding])
    if isinstance(meetings, Refusal):
        return False
    for meeting in meetings:
        if not any((most := bound(condition, KEY, QUERY)) is not None and most <= 0 for condition in meeting.seen):
            return False
    return only_the_loss_reads(program)


def _causal(node: fx.Node, functions: IndexFunctions, promised: bool) -> bool | None:
    """None for an attention whose mask stays; else whether the mask also hid padding, which it may where `promised`."""
    mask = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node) or argument(node, "is_causal"):
        return None
    function = functions.of(mask)
    if function is None or len(function.sizes) < 2:
        return None
    whole, function = function, _without_padding(function) if promised else function
    # `is_causal` aligns queries and keys at their beginnings.
    length = value(argument(node, "query")).shape[-2]
    query, key = (functions.size(size) for size in (length, value(argument(node, "key")).shape[-2]))
    if query != key or function.sizes[-2:] != (query, key):
        return None
    seen = reach(function)
    # The hint first: asked of longer sequences, the comparison would keep shorter ones out of this capture.
    if seen is None or (seen is not sympy.oo and not (hint(length) <= seen + 1 and bool(length <= seen + 1))):
        return None
    return whole != function


def _without_padding(mask: IndexFunction) -> IndexFunction:
    """A mask [B, H, Q, K] without the condition that the key is no padding."""
    conditions: Sequence[Expression] = mask.element.args if isinstance(mask.element, sympy.And) else (mask.element,)
    real = sympy.Ne(element_of(PADDING, axis(0), axis(len(mask.sizes) - 1)), 0)
    return mask._replace(element=sympy.And(*(condition for condition in conditions if condition != real)))


def reach(mask: IndexFunction) -> int | sympy.Expr | None:
    """How far back a query sees under a boolean mask [..., Q, K]: the c of a mask that is true exactly where
    0 <= query - key <= c, infinity where nothing but key <= query is asked, None for any other mask."""
    rank = len(mask.sizes)
    query, key = axis(rank - 2), axis(rank - 1)
    conditions = mask.element.args if isinstance(mask.element, sympy.And) else (mask.element,)
    ahead = [bound(condition, key, query) for condition in conditions]
    behind = [bound(condition, query, key) for condition in conditions]
    if any(left is None and right is None for left, right in zip(ahead, behind, strict=True)):
        return None
    if min((most for most in ahead if most is not None), default=None) != 0:
        return None
    return min((most for most in behind if most is not None), default=sympy.oo)


def _without_mask(builder: Builder, program: Analysed, node: fx.Node) -> fx.Node:
    changes: dict[str, Any] = {"attn_mask": None, "is_causal": True}
    key, held = (unrepeated(program, argument(node, name)) for name in ("key", "value"))
    if key is not None and held is not None and _may_be_grouped(program, node, key, held):
        changes |= {"key": builder.env[key], "value": builder.env[held], "enable_gqa": True}
    return attention_with(builder, node, builder.env, changes)


def _may_be_grouped(program: Analysed, node: fx.Node, key: fx.Node, held: fx.Node) -> bool:
    width = value(key).shape[-1]
    same = program.same_size(value(key).shape[1], value(held).shape[1])
    return bool(same and width == value(held).shape[-1] and width <= _WIDEST_GROUPED_HEAD)
