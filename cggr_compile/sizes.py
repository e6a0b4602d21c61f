"""How much each route keeps of a batch, and the concrete sizes that the rewritten graph's symbols stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.program import Program, value

KEPT = {"sequence": "kept", "token": "kept_tokens", "loss": "kept_loss"}
"""The size input of each route."""


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
            seen = min(
                left * length, concrete(program, _rows_of_loss(program), sizes_of(program, rows, length, amounts))
            )
            amounts[route] = Amount(min(config.kept_rows(left * length, step, confidence), seen), seen)
        else:
            total = rows if route == "sequence" else length
            amounts[route] = Amount(min(config.kept_rows(total, step, confidence), total), total)
    return amounts


def _rows_of_loss(program: Program) -> Any:
    assert program.head is not None
    return value(program.head.target).shape[0]


def sizes_of(program: Program, rows: int, length: int, amounts: Mapping[str, Amount]) -> dict[Any, int]:
    """The program's symbols with their values."""
    kept = {KEPT[route]: amount.kept for route, amount in amounts.items()}
    known = {node: kept[node.name] for node in program.placeholders if node.name in kept}
    named = [(program.batch, rows), (program.sequence, length), *((value(node), size) for node, size in known.items())]
    return {program.expression(symbol): size for symbol, size in named if isinstance(symbol, torch.SymInt)}


def concrete(program: Program, size: Any, sizes: Mapping[Any, int]) -> int:
    """A size of the program as a number."""
    return int(program.expression(size).xreplace(sizes)) if isinstance(size, torch.SymInt) else int(size)
