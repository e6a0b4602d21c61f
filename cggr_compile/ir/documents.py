"""Documents of packed sequences, as masks of attention know them: one begins where `position_ids` do not go up by 1."""

from __future__ import annotations

from collections.abc import Collection

import sympy
import torch
from torch import fx

from cggr_compile.ir.index_functions import Expression, IndexFunctions, axis, element_of
from cggr_compile.ir.program import Program
from cggr_compile.ir.token_mixing import BATCH, KEY, QUERY

aten = torch.ops.aten
POSITIONS, _DOCUMENTS = "position_ids", "documents"
_OF_QUERY, _OF_KEY = (element_of(_DOCUMENTS, BATCH, place) for place in (QUERY, KEY))
ONE = (sympy.Eq(_OF_QUERY, _OF_KEY), sympy.Eq(_OF_KEY, _OF_QUERY))
"""The condition that query and key are of one document."""


def within_one(seen: Collection[Expression]) -> list[Expression] | None:
    """What conditions ask beside that query and key are of one document, where positions differ as places do; None
    where they do not ask that, or compare positions with places."""
    if not any(condition in ONE for condition in seen):
        return None
    at = {element_of(POSITIONS, BATCH, place): sympy.Dummy() for place in (QUERY, KEY)}
    rest = [condition.subs(at) for condition in seen if condition not in ONE]
    if any(condition.free_symbols & {*at.values()} and condition.free_symbols & {QUERY, KEY} for condition in rest):
        return None
    return [condition.subs(dict(zip(at.values(), (QUERY, KEY), strict=True))) for condition in rest]


def functions_of(program: Program, positions: fx.Node) -> IndexFunctions:
    """Index functions in which the numbers of documents that masks compute of `positions` [B, S] have a name."""
    functions = IndexFunctions(program.shape_env, {POSITIONS: positions})
    for node in program.graph.find_nodes(op="call_function", target=aten.cumsum.default):
        if _numbers_documents(node, functions):
            functions.name(node, _DOCUMENTS)
    return functions


def _numbers_documents(node: fx.Node, functions: IndexFunctions) -> bool:
    """Whether a node is `(diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)`."""
    unequal = node.args[0]
    if node.args[1] not in (1, -1) or getattr(unequal, "target", None) != aten.ne.Scalar or unequal.args[1] != 1:
        return False
    difference = unequal.args[0]
    if difference.target != aten.diff.default or difference.args[1:3] not in ((1, 1), (1, -1)):
        return False
    counted, before = (functions.of(operand) for operand in (difference.args[0], difference.args[3]))
    own = element_of(POSITIONS, axis(0), axis(1))
    ahead = element_of(POSITIONS, axis(0), sympy.Integer(0)) - 1
    return (
        counted is not None
        and before is not None
        and before.sizes[-1] == 1
        and counted.element == own
        and before.element.subs(axis(1), 0) == ahead
    )
