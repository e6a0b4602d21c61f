"""Whether two captures are one step: the same operators on the same inputs, whatever their symbols are called.

Dynamo captures a model anew when parameters were frozen or thawed, which changes no operator. Such a capture needs no
plan of its own: autograd follows the parameters as they are, and compiled code is kept apart by what requires a
gradient (`Variant`). Nothing but requiring one may differ, so graphs are compared node by node, constants, regions and
all, and sizes up to a renaming of symbols that is one to one.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from cggr_compile.ir.program import PART, REGION, Program, expression, value

_META = (REGION, PART, "recompute", "ac_graph_id")


def same_step(left: Program, right: Program) -> bool:
    """Whether the captures differ in nothing but what requires a gradient, and in the names of their symbols."""
    nodes = list(left.graph.nodes), list(right.graph.nodes)
    told = ("inputs", "shards", "stored", "loss_output")
    if len(nodes[0]) != len(nodes[1]) or any(getattr(left, name) != getattr(right, name) for name in told):
        return False
    if [(b.line, b.outcome) for b in left.branches] != [(b.line, b.outcome) for b in right.branches]:
        return False
    names = _Renaming(left, right)
    number = {node: place for each in nodes for place, node in enumerate(each)}
    return names.same((left.batch, left.sequence), (right.batch, right.sequence)) and all(
        _same_node(a, b, left, right, number) and names.same(_description(value(a)), _description(value(b)))
        for a, b in zip(*nodes, strict=True)
    )


def _same_node(a: fx.Node, b: fx.Node, left: Program, right: Program, number: dict[fx.Node, int]) -> bool:
    if a.op != b.op or any(a.meta.get(name) != b.meta.get(name) for name in _META):
        return False
    if a.op == "get_attr":
        return _same_constant(getattr(left.root, str(a.target)), getattr(right.root, str(b.target)))
    if a.op != "placeholder" and a.target != b.target:
        return False
    return _text(a, number) == _text(b, number)


def _text(node: fx.Node, number: dict[fx.Node, int]) -> str:
    """A node's arguments, with nodes by their places: in text 1, 1.0 and True are not the same."""
    return repr(fx.map_arg((node.args, node.kwargs), lambda old: _Place(number[old])))


class _Place(int):
    """A node among arguments: not a number that the node is given."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _same_constant(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def _description(item: Any) -> Any:
    """All of a value but whether it requires a gradient."""
    if isinstance(item, torch.Tensor):
        return (item.dtype, item.device, tuple(item.shape), tuple(item.stride()))
    if isinstance(item, (tuple, list)):
        return tuple(map(_description, item))
    return item


class _Renaming:
    """Symbols of one program that stand where those of another do."""

    def __init__(self, left: Program, right: Program) -> None:
        self._programs = left, right
        self._names: dict[Any, Any] = {}
        self._taken: set[Any] = set()

    def same(self, a: Any, b: Any) -> bool:
        """Whether two descriptions are the same under the names so far, new symbols getting theirs."""
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(self.same, a, b))
        sizes = (torch.SymInt, torch.SymFloat, torch.SymBool)
        if not isinstance(a, sizes):
            return not isinstance(b, sizes) and type(a) is type(b) and bool(a == b)
        if type(a) is not type(b):
            return False
        old, new = (expression(program.shape_env, size) for program, size in zip(self._programs, (a, b), strict=True))
        if old.is_Symbol and new.is_Symbol and old not in self._names and new not in self._taken:
            self._names[old] = new
            self._taken.add(new)
        return bool(sympy.sympify(old).xreplace(self._names) == new)
