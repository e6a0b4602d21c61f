"""How much each route keeps of a batch, and the concrete sizes that the rewritten graph's symbols stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.program import Program, value

KEPT = {"sequence": "kept", "token": "kept_tokens", "loss": "kept_loss"}
"""The size input of each route, and the role in `Routing` that it is."""


class Amount(NamedTuple):
    """How many rows or tokens a route keeps, of how many."""

    kept: int
    total: int


def amounts_of(
    program: Program, config: RoutingConfig, step: int, rows: int, length: int, confidence: float | None = None
) -> dict[str, Amount]:
    """What each configured route keeps of `rows` sequences of `length` tokens at an optimiser step.

    Sequence: rows; token: tokens of each sequence; loss: the rows that the loss sees, of the sequences left.
    `confidence` is the router's, for the dynamic threshold.
    """
    amounts: dict[str, Amount] = {}
    for route in config.routes:
        if route == "loss":
            left = amounts["sequence"].kept if "sequence" in amounts else rows
            # A loss that slices its logits sees fewer rows than there are tokens.
            seen = concrete(_rows_of_loss(program), sizes_of(program, rows, length, amounts))
            seen = min(left * length, seen)
            amounts[route] = Amount(min(config.kept_rows(left * length, step, confidence), seen), seen)
        else:
            total = rows if route == "sequence" else length
            amounts[route] = Amount(min(config.kept_rows(total, step, confidence), total), total)
    return amounts


def _rows_of_loss(program: Program) -> Any:
    assert program.head is not None
    return program.expression(value(program.head.target).shape[0])


def sizes_of(program: Program, rows: int, length: int, amounts: Mapping[str, Amount]) -> dict[Any, int]:
    """The program's symbols with their values."""
    inputs = ((getattr(program.routing, KEPT[route]), amount.kept) for route, amount in amounts.items())
    named = [(program.batch, rows), (program.sequence, length), *((value(node), kept) for node, kept in inputs)]
    return {program.expression(symbol): size for symbol, size in named if isinstance(symbol, torch.SymInt)}


def symbols_of(program: Program, inputs: Sequence[Any]) -> dict[Any, int]:
    """The program's symbols with their values in a call with these inputs."""
    found: dict[Any, int] = {}
    for node, given in zip(program.placeholders, inputs, strict=True):
        pairs = [(value(node), given)]
        if isinstance(given, torch.Tensor):
            pairs = list(zip(value(node).shape, given.shape, strict=True))
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and program.expression(size).is_Symbol:
                found[program.expression(size)] = number
    return found


def concrete(expression: Any, sizes: Mapping[Any, int]) -> int:
    """A size (`Program.expression`) as a number."""
    return expression if isinstance(expression, int) else int(expression.xreplace(sizes))
