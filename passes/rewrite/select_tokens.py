"""Selects the tokens of each sequence that the middle layers, or their experts alone, run on.

A token is selectable if it is a real one (`attention_mask`, of any dtype, is not 0 there), whether its label counts or
not: a prompt token carries context. Its score is that of the prediction made at its position, and 0, the lowest of
every scoring, where the label is ignored. Positions of one sequence must be distinct, or attention would see a key
twice; so where a sequence has fewer than k real tokens, the selection is filled up with padding, which the gathered
mask hides from the others.

Before::

    score   %scores: [B, S]

After::

    %kept_tokens: k = an input
    select  %positions = cggr.select(%scores, %real, %kept_tokens, "topk", None)    # [B, k], ascending
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.rewrite.shared import by_position, drawn, first, fresh_size, preferred
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import descendants
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.roles import has_tokens, middle_layers, quiet_region, token_ids
from cggr_compile.ir.sequence_order import packet_of

aten = torch.ops.aten

_MOVES = {
    *(aten.view, aten.reshape, aten.unsqueeze, aten.expand, aten.repeat, aten.slice, aten.select, aten.index),
    *(aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias),
}


def select_tokens(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the inputs `kept_tokens` and, for rules that draw, `token_noise` ([B, S] fp32, or [layers, B, S] with
    `resample="layer"`); sets `routing.kept_tokens` and `.positions` ([B, k] int64, sorted, or [layers, B, k]).

    Raises:
        CannotOptimize: the capture fixed the sequence length, or no layer is left to run on fewer tokens.
    """
    if not isinstance(program.sequence, torch.SymInt):
        raise CannotOptimize(
            f"the model fixes the sequence length to {program.sequence} while it is traced",
            hint="the token route needs it as a symbol; use route='sequence'",
        )
    layers = middle_layers(program, config)
    builder = Builder(program)
    builder.copy_inputs()
    kept = builder.placeholder("kept_tokens", fresh_size(program, "kept_tokens", program.sequence))
    builder.copy_parts("router", "score")
    builder.part, builder.region = "select", quiet_region(program)
    ids = token_ids(program)
    shape: tuple[Any, ...] = (value(ids).shape[0], program.sequence)
    if config.resample == "layer":
        shape = (len(layers), *shape)
    rule = rule_of(config.selection)
    noise = builder.tensor_input("token_noise", shape, ids) if rule.needs_noise else None
    real = _real_tokens(builder, ids)
    scores = noise
    if rule.needs_scores:
        sizes = (builder.call(aten.sym_size.int, builder.env[ids], dim) for dim in (0, 1))
        scores = by_position(builder, builder.env[program.routing.token_scores], 0.0, tuple(sizes))
    if noise is not None and config.resample == "layer":
        real, scores = (builder.call(aten.expand_as.default, x, noise) for x in (real, scores))
    if rule.needs_scores and noise is not None:
        scores = preferred(builder, *drawn(builder, config, scores, real, kept, noise), real)
    positions = first(builder, scores, real, kept)
    builder.copy_rest()
    routing = dataclasses.replace(builder.routing(), kept_tokens=kept, positions=positions)
    return builder.finish("select_tokens", routing=routing)


def _real_tokens(builder: Builder[Analysed], ids: fx.Node) -> fx.Node:
    """bool [B, S]: False where an `attention_mask` [B, S], of any dtype, is 0; every token where there is none.

    Raises:
        CannotOptimize: the model adds the mask to something, so that 0 is what it leaves alone.
    """
    program = builder.program
    for node in program.placeholders:
        if program.path(node) == "attention_mask" and has_tokens(program, value(node)):
            if value(node).is_floating_point():
                _refuse_added(node)
            return builder.call(aten.ne.Scalar, builder.env[node], 0)
    return builder.call(aten.ones_like.default, builder.env[ids], dtype=torch.bool)


def _refuse_added(mask: fx.Node) -> None:
    """Raises where a floating mask itself, moved or in another floating dtype, is added to something or is what an
    attention adds."""
    for node in descendants([mask], lambda user: packet_of(user) in _MOVES and value(user).is_floating_point()):
        for user in node.users:
            if packet_of(user) in (aten.add, aten.add_) or user.target == aten.scaled_dot_product_attention.default:
                raise CannotOptimize(
                    f"attention_mask of {value(mask).dtype} is added to something, so 0 in it may mean a real token",
                    node=user,
                    hint="pass a mask that is 1 at real tokens and 0 at padding, or use route='sequence'",
                )
