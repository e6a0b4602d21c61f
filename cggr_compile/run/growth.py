"""What the layers of a model that grows start from: copies of the layers that trained so far, made in place."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.roles import is_state

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=^)\d+(?=\.)")


class Copies:
    """Layer i of a stack as a copy of layer i mod `count`: which inputs of a call are copied into which.

    What is copied are the parameters and buffers that a layer reads and none of the first `count` does. Each becomes a
    copy of the one whose path differs in numbers only; several of those (experts) go by these numbers, in order.

    Raises:
        CannotOptimize: the layer it would be a copy of has none of that shape and dtype, or two layers share it.
    """

    def __init__(self, program: Analysed, count: int) -> None:
        place = {node: index for index, node in enumerate(program.placeholders)}
        states_of = _states(program)
        trained = {node for states in states_of[:count] for node in states}
        readers = Counter(node for states in states_of for node in states)
        layers = [_by_path(program, states) for states in states_of]
        self._pairs: list[tuple[int, int]] = []
        for index in range(count, len(layers)):
            like = index % count
            new_states = [node for node in states_of[index] if node not in trained]
            for name, states in _by_path(program, new_states).items():
                partners = layers[like].get(name, [])
                shared = [node for node in states if readers[node] > 1]
                if shared:
                    raise CannotOptimize(
                        f"{program.path(shared[0])} belongs to several of the layers that do not train yet",
                        hint="choose more depth_layers, or grow='random'",
                    )
                if list(map(_kind, states)) != list(map(_kind, partners)):
                    raise CannotOptimize(
                        f"layer {index} of {program.stack.path or 'the stack'} cannot become a copy of layer {like}, "
                        f"which has no such {program.path(states[0])}",
                        hint="choose depth_layers so that these are alike (a multiple of the pattern's length), or "
                        "grow='random'",
                    )
                self._pairs += [(place[new], place[old]) for new, old in zip(states, partners, strict=True)]

    @torch.no_grad()
    def make(self, inputs: Sequence[Any]) -> None:
        """Copies the values, of the inputs of a call."""
        for new, old in self._pairs:
            inputs[new].copy_(inputs[old])


def _by_path(program: Analysed, states: list[fx.Node]) -> dict[str, list[fx.Node]]:
    """States by their path without its numbers, each group in the order of these."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in sorted(states, key=lambda node: list(map(int, _NUMBERS.findall(program.path(node))))):
        found[_NUMBERS.sub("#", program.path(node))].append(node)
    return found


def _states(program: Analysed) -> list[list[fx.Node]]:
    """The parameters and buffers that each layer reads; with the first, what is read in front of it."""
    stack = program.stack
    found = []
    for before, after in zip((stack.entry, *stack.residuals), stack.residuals, strict=False):
        inside = ancestors([after], stop=[before])
        read = [source for node in program.graph.nodes if node in inside for source in node.all_input_nodes]
        found.append([node for node in dict.fromkeys(read) if is_state(program, node)])
    return found


def _kind(node: fx.Node) -> tuple[Any, ...]:
    return value(node).dtype, *value(node).shape
