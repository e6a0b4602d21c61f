"""What the layers of a model that grows start from: copies of the layers that trained so far, made in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import Analysed, value


class Copies:
    """Layer i of a stack as a copy of layer i mod `count`: which inputs of a call are copied into which.

    The parameters and buffers of a layer are those that it reads and no other layer does, in the order in which it
    reads them.

    Raises:
        CannotOptimize: a layer has others than the one it would be a copy of.
    """

    def __init__(self, program: Analysed, count: int) -> None:
        place = {node: index for index, node in enumerate(program.placeholders)}
        layers = _states(program)
        self._pairs: list[tuple[int, int]] = []
        for index in range(count, len(layers)):
            like = index % count
            if list(map(_kind, layers[index])) != list(map(_kind, layers[like])):
                raise CannotOptimize(
                    f"layer {index} of {program.stack.path or 'the stack'} has other parameters than layer {like}, of "
                    "which it would become a copy",
                    hint="choose depth_layers so that these are alike (a multiple of the pattern's length), or "
                    "grow='random'",
                )
            self._pairs += [(place[new], place[old]) for new, old in zip(layers[index], layers[like], strict=True)]

    @torch.no_grad()
    def make(self, inputs: Sequence[Any]) -> None:
        """Copies the values, of the inputs of a call."""
        for new, old in self._pairs:
            inputs[new].copy_(inputs[old])


def _states(program: Analysed) -> list[list[fx.Node]]:
    """The parameters and buffers that each layer alone reads, in order."""
    stack = program.stack
    found = []
    for before, after in zip((stack.entry, *stack.residuals), stack.residuals, strict=False):
        inside = ancestors([after], stop=[before])
        read = [source for node in program.graph.nodes if node in inside for source in node.all_input_nodes]
        found.append([node for node in dict.fromkeys(read) if _is_state(program, node)])
    readers = Counter(node for layer in found for node in layer)
    return [[node for node in layer if readers[node] == 1] for layer in found]


def _is_state(program: Analysed, node: fx.Node) -> bool:
    return node.op == "placeholder" and program.kind(node) == "state"


def _kind(node: fx.Node) -> tuple[Any, ...]:
    return value(node).dtype, *value(node).shape
