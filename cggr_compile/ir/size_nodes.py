"""Sizes as nodes: a symbolic expression written out over the nodes of its symbols."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from cggr_compile.errors import CannotOptimize
from cggr_compile.torch_internals import symbols

_OPERATORS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
    **symbols.SIZE_FUNCTIONS,
}


class Writer(Protocol):
    """What nodes are written with: a `Builder`, or a plain graph (`lower_regions`)."""

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Adds a call."""


def emit_size(builder: Writer, expression: Any, known: Mapping[Any, fx.Node | int]) -> fx.Node | int:
    """The nodes that compute `expression` from the sizes `known`, by symbol.

    Raises:
        CannotOptimize: the expression has another symbol, or an operation that sizes of shapes do not have.
    """
    if expression in known:
        return known[expression]
    if expression.is_Integer:
        return int(expression)
    if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
        operands, function = [expression.base] * int(expression.exp), operator.mul
    elif expression.func in _OPERATORS:
        operands, function = expression.args, _OPERATORS[expression.func]
    else:
        raise CannotOptimize(
            f"the size {expression} cannot be computed from the batch size and the sequence length",
            hint="use route='sequence', or report it with this line",
        )
    nodes = [emit_size(builder, operand, known) for operand in operands]
    return reduce(lambda left, right: builder.call(function, left, right), nodes)
