"""Attention of variable lengths: torch's flash attention over sequences behind each other.

It replaces attention under a mask that asks for key and query of one sequence, and for nothing but at most so far ahead
and behind.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from cggr_compile.ir.builder import Builder
from cggr_compile.ir.index_functions import Expression
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.repeated_heads import unrepeated
from cggr_compile.ir.token_mixing import KEY, QUERY, argument, bound

aten = torch.ops.aten
VARLEN = aten._flash_attention_forward.default
_WIDEST_HEAD = 256


class Reach(NamedTuple):
    """How far ahead of the query a key may be, and how far behind; None for any distance."""

    ahead: int | None
    behind: int | None


def reach_of(asked: Collection[Expression], known: Collection[Expression] = ()) -> Reach | None:
    """What conditions over QUERY and KEY come to beside those that are `known`; None where they ask for anything
    else."""
    ahead, behind = sympy.oo, sympy.oo
    for condition in asked:
        if condition == sympy.true or condition in known:
            continue
        further, back = bound(condition, KEY, QUERY), bound(condition, QUERY, KEY)
        if further is not None and further >= 0:
            ahead = min(ahead, further)
        elif back is not None and back >= 0:
            behind = min(behind, back)
        else:
            return None
    return Reach(*(None if side is sympy.oo else int(side) for side in (ahead, behind)))


def runs_varlen(node: fx.Node) -> bool:
    """Whether torch's flash attention of variable lengths can run in the place of an attention [B, H, S, D]."""
    found = value(node)
    mask = argument(node, "attn_mask")
    alike = {value(argument(node, name)).shape[-1] for name in ("query", "key", "value")}
    return (
        found.device.type == "cuda"
        and found.dtype in (torch.float16, torch.bfloat16)
        and found.dim() == 4
        and len(alike) == 1
        and next(iter(alike)) <= _WIDEST_HEAD
        and next(iter(alike)) % 8 == 0
        and not argument(node, "dropout_p")
        and (mask is None or value(mask).dtype == torch.bool)
    )


def attend(
    builder: Builder[Analysed],
    node: fx.Node,
    env: dict[fx.Node, fx.Node],
    reach: Reach,
    ends: fx.Node,
    longest: fx.Node,
) -> fx.Node:
    """Attention [B, H, S, D] within the sequences of B · S tokens that begin and end at `ends`, int32, none of more
    than `longest` tokens; the kernel takes grouped heads as they are."""
    call = partial(builder.call_for, node)
    key, held = (unrepeated(builder.program, argument(node, name)) for name in ("key", "value"))
    if key is None or held is None:
        key, held = argument(node, "key"), argument(node, "value")
    operands = []
    for old in (argument(node, "query"), key, held):
        new = call(aten.flatten.using_ints, call(aten.transpose.int, env[old], 1, 2), 0, 1)
        operands.append(new if value(new).dtype == value(node).dtype else call(aten.to.dtype, new, value(node).dtype))
    behind, ahead = (-1 if side is None else side for side in (reach.behind, reach.ahead))
    options: dict[str, Any] = {"window_size_left": behind, "window_size_right": ahead, "scale": argument(node, "scale")}
    causal = (behind, ahead) == (-1, 0)
    found = call(VARLEN, *operands, ends, ends, longest, longest, 0.0, causal, False, **options)
    rows, length = (call(aten.sym_size.int, env[argument(node, "query")], dim) for dim in (0, 2))
    attended = call(aten.unflatten.int, call(operator.getitem, found, 0), 0, [rows, length])
    return call(aten.transpose.int, attended, 1, 2)
