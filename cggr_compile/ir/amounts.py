"""How much each route keeps of a batch, and the concrete sizes that the rewritten graph's symbols stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import Analysed, Program, value
from cggr_compile.schedule import kept_of

Sizes: TypeAlias = Mapping[Any, int]
"""A program's symbols with their values."""

KEPT = {"sequence": "kept", "token": "kept_tokens", "loss": "kept_loss", "segment": "kept_tokens"}
"""The size input of each route, and the role in `Routing` that it is."""


class Amount(NamedTuple):
    """How many rows or tokens a route keeps, of how many."""

    kept: int
    total: int


def amounts_of(program: Analysed, config: RoutingConfig, fraction: float, rows: int, length: int) -> dict[str, Amount]:
    """What each configured route keeps of `rows` sequences of `length` tokens in a step that keeps a fraction.

    Sequence: rows; token and segment: tokens of each sequence; loss: the rows that the loss sees, of the sequences
    left.
    """
    amounts: dict[str, Amount] = {}
    for route in config.routes:
        if route == "loss":
            left = amounts["sequence"].kept if "sequence" in amounts else rows
            # A loss that slices its logits sees fewer rows than there are tokens.
            seen = concrete(_rows_of_loss(program), sizes_of(program, rows, length, amounts))
            seen = min(left * length, seen)
            amounts[route] = Amount(min(kept_of(fraction, left * length), seen), seen)
        else:
            total = rows if route == "sequence" else length
            amounts[route] = Amount(min(kept_of(fraction, total), total), total)
    return amounts


def _rows_of_loss(program: Analysed) -> Any:
    return program.expression(value(program.head.target).shape[0])


def sizes_of(program: Analysed, rows: int, length: int, amounts: Mapping[str, Amount]) -> dict[Any, int]:
    """The program's symbols with their values."""
    inputs = ((getattr(program.routing, KEPT[route]), amount.kept) for route, amount in amounts.items())
    named = [(program.batch, rows), (program.sequence, length), *((value(node), kept) for node, kept in inputs)]
    return {program.expression(symbol): size for symbol, size in named if isinstance(symbol, torch.SymInt)}


class Symbols:
    """Where the values of a program's symbols stand among the inputs of a call."""

    def __init__(self, program: Program) -> None:
        self._read: dict[Any, Callable[[Sequence[Any]], int]] = {}
        values = [(place, value(node)) for place, node in enumerate(program.placeholders)]
        for place, size in values:
            self._found(program, size, itemgetter(place))
        tensors = [(place, x) for place, x in values if isinstance(x, torch.Tensor)]
        for place, x in tensors:
            for dim, size in enumerate(x.shape):
                self._found(program, size, partial(_size, place, dim))
        # Last: the stride of a dimension of one place says nothing.
        for place, x in tensors:
            for dim, size in enumerate(x.stride()):
                self._found(program, size, partial(_stride, place, dim))

    def _found(self, program: Program, size: Any, read: Callable[[Sequence[Any]], int]) -> None:
        if isinstance(size, torch.SymInt) and program.expression(size).is_Symbol:
            self._read.setdefault(program.expression(size), read)

    def of(self, inputs: Sequence[Any]) -> dict[Any, int]:
        """The symbols with their values in a call, always in one order."""
        return {symbol: read(inputs) for symbol, read in self._read.items()}


def _size(place: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[place].shape[dim])


def _stride(place: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[place].stride(dim))


def concrete(expression: Any, sizes: Mapping[Any, int]) -> int:
    """A size (`Program.expression`) as a number."""
    return expression if isinstance(expression, int) else int(expression.xreplace(sizes))
