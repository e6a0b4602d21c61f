"""Divides a program into pieces that can be compiled by themselves: what comes in front of the layers, the layers one
by one, and the rest.

Layers of one kind have bodies that are alike, so that one of them is compiled and called for the others. A piece takes
tensors and gives tensors, and autograd joins them; which bodies are alike is decided where they are written out
(`lower_regions.lower_pieces`). The division keeps what a step means: nothing is copied, every value is computed from
the same ones, and random operators keep their order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import Refusal
from cggr_compile.ir.dataflow import ancestors, carries_data, descendants
from cggr_compile.ir.program import Analysed, is_tensor, value
from cggr_compile.torch_internals import symbols

# With fewer there is nothing to share: the first layer goes with what is in front of it.
FEWEST = 3


Pieces = tuple[tuple[fx.Node, ...], ...]


def outline_layers(program: Analysed) -> Pieces | Refusal:
    """The calls of a lowered program in an order of execution, in pieces: front, layers 1 to the last, rest; or why
    they stay in one."""
    calls = [node for node in program.graph.nodes if node.op == "call_function" and not is_size(node)]
    obstacle = _obstacle(program, calls)
    if obstacle is not None:
        return obstacle
    place = _places(program, calls)
    pieces = tuple(tuple(node for node in calls if place[node] == index) for index in range(max(place.values()) + 1))
    return _misfit(place, calls, [node for piece in pieces for node in piece]) or pieces


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number that the sizes of the inputs decide: known where a program is written out."""
    return isinstance(value(node), (int, torch.SymInt)) and not symbols.data_symbols(value(node))


def _obstacle(program: Analysed, calls: list[fx.Node]) -> Refusal | None:
    if program.layers is None:
        return program.no_layers or Refusal("layers were not looked for")
    if len(program.stack) < FEWEST:
        return Refusal(f"{len(program.stack)} layers are fewer than {FEWEST}")
    present = set(calls)
    if not all(residual in present for residual in program.stack.residuals):
        return Refusal("the residual between two layers is not a value of this program")
    for node in calls:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return Refusal(f"the step changes a tensor in place ({node.target})", node)
    return None


def _places(program: Analysed, calls: list[fx.Node]) -> dict[fx.Node, int]:
    """The piece of every call: 0 in front, i for layer i, one more for the rest."""
    residuals = program.stack.residuals
    after = descendants([residuals[0]], carries_data)
    place: dict[fx.Node, int] = {}
    for index, (entry, leaving) in enumerate(pairwise(residuals), 1):
        for node in ancestors([leaving], stop=[entry, residuals[0]]) & after:
            place.setdefault(node, index)
    # What one layer alone reads, a cast of its weights say, is its own.
    for node in reversed(calls):
        readers = {place.get(user) for user in node.users if not is_size(user)}
        if node not in place and node not in after and len(readers) == 1 and (reader := readers.pop()) is not None:
            place[node] = reader
    rest = len(residuals)
    for node in calls:
        if node not in place:
            place[node] = rest if any(place.get(source, 0) > 0 for source in node.all_input_nodes) else 0
    return place


def _misfit(place: dict[fx.Node, int], calls: list[fx.Node], order: list[fx.Node]) -> Refusal | None:
    """Why the pieces cannot stand for the program."""
    for node in calls:
        for source in node.all_input_nodes:
            if source not in place or place[source] == place[node]:
                continue
            if place[source] > place[node]:
                return Refusal(f"a layer reads what comes of a later piece ({source.name})", node)
            if not is_tensor(source):
                return Refusal(f"a value that is no tensor is read across layers ({source.name})", node)
    if list(filter(_is_random, calls)) != list(filter(_is_random, order)):
        return Refusal("random operators would change their order")
    return None


def _is_random(node: fx.Node) -> bool:
    tags: Any = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
