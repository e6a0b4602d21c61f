"""Branches that a model's own lines took on sizes while it was traced, and whether they go the same way for fewer rows.

A trace follows one side of `if x.shape[0] > 4`, and Dynamo guards that later calls take it too. The rewritten program
runs the same side on k rows, or its middle layers on k tokens; eager, given the k rows alone, might take the other.
So every such decision is written down with the expression that decided it, and evaluated again with k in its place.

What torch's operators decide on sizes by themselves does not count: they compute the same either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.amounts import Amount
from cggr_compile.ir.program import Layers, Program
from cggr_compile.torch_internals import decisions

# transformers' masks compare the batch size with 1 to expand what is broadcast anyway: both sides give the same mask.
_BROADCASTING = "/transformers/masking_utils.py:"


@dataclass(frozen=True)
class Branch:
    """One decision: the `expression` over sizes, what it was (`outcome`), the source line and the modules around it."""

    expression: Any
    outcome: Any
    line: str
    modules: tuple[str, ...]


def branches_of(shape_env: ShapeEnv) -> tuple[Branch, ...]:
    """The decisions of a finished trace, its assertions among them."""
    taken = [
        Branch(made.expression, outcome, made.line, made.modules)
        for made, outcome in decisions.of(shape_env).items()
        if not (_BROADCASTING in made.line and sympy.Integer(1) in made.expression.args)
    ]
    return (*taken, *(Branch(expression, True, line, ()) for expression, line in decisions.asserted(shape_env)))


class Branches:
    """The decisions of one capture, looked at once for each size of a call and number of what is kept."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: set[Any] = set()

    def refuse_other_side(self, layers: Layers | None, sizes: Mapping[Any, int], amounts: Mapping[str, Amount]) -> None:
        """Raises `CannotOptimize` where k in place of the batch size, or in place of the sequence length in the middle
        layers or on the segment route, decides a branch of the model otherwise.

        Args:
            layers: the stack, where it was found.
            sizes: the call's own, by symbol.
            amounts: what each route keeps.
        """
        key = (*sizes.items(), *amounts.items())
        if key in self._known or not self.program.branches:
            return
        program, branches = self.program, self.program.branches
        if "sequence" in amounts:
            self._refuse("batch size", "rows", program.batch, amounts["sequence"].kept, sizes, branches)
        if "segment" in amounts:
            self._refuse("sequence length", "tokens", program.sequence, amounts["segment"].kept, sizes, branches)
        if "token" in amounts:
            inside = _inside(branches, layers)
            self._refuse("sequence length", "tokens", program.sequence, amounts["token"].kept, sizes, inside)
        self._known.add(key)

    def _refuse(
        self, name: str, what: str, size: Any, kept: int, sizes: Mapping[Any, int], branches: Iterable[Branch]
    ) -> None:
        own = self.program.expression(size)
        for branch in branches:
            condition = self.program.shape_env.replace(branch.expression)
            if own not in condition.free_symbols:
                continue
            decided = condition.xreplace({**sizes, own: sympy.Integer(kept)})
            if not decided.free_symbols and decided != sympy.sympify(branch.outcome):
                raise CannotOptimize(
                    f"the model branches on the {name}: {kept} selected {what} would take the other side than all "
                    f"{sizes.get(own, own)}",
                    source=branch.line,
                    hint="make that line independent of the size, or choose a ratio that stays on the same side",
                )


def _inside(branches: Iterable[Branch], layers: Layers | None) -> list[Branch]:
    """The branches inside a layer of the stack; all of them where its modules have no path."""
    if layers is None or not layers.path:
        return list(branches)
    stack = re.compile(rf"(^|\.){re.escape(layers.path)}\.\d+(\.|$)")
    return [branch for branch in branches if any(stack.search(module) for module in branch.modules)]
