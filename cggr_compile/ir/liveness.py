"""How much memory a compiled graph takes while it runs, beside its inputs.

The model of a compiler: pointwise operators and reductions are written into the kernels of their neighbours, so that
only what other operators (products, attention, those of this package) read or the graph puts out lies in memory; memory
is given back behind its last reader, and a fused kernel writes over an input of the same size that it is the last to
read. What libraries take inside of an operator is not counted, but for this package's own.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from cggr_compile.ir.program import value
from cggr_compile.kernels.providers import scratch_bytes
from cggr_compile.torch_internals.partitioner import is_fusible, is_view


class Buffer(NamedTuple):
    """A piece of memory: what a node gives, or the tensor at a place among those that it gives."""

    node: fx.Node
    place: int | None = None


class Kernel(NamedTuple):
    """What runs as one: the buffers that it makes and reads, and the bytes that it holds only while it runs."""

    made: tuple[Buffer, ...]
    read: frozenset[Buffer]
    fused: bool
    scratch: int


class Liveness:
    """The kernels of a graph whose sizes are numbers, and when what they make is given back."""

    def __init__(self, graph: fx.Graph) -> None:
        self._put_out = set(graph.output_node().all_input_nodes)
        self._holding: dict[fx.Node, frozenset[Buffer]] = {}
        self._kernels = [kernel for node in graph.nodes if (kernel := self._kernel(node)) is not None]
        self._last: dict[Buffer, int] = {}
        for turn, kernel in enumerate(self._kernels):
            self._last.update(dict.fromkeys((*kernel.made, *kernel.read), turn))
        self._stays = frozenset().union(*(self._holding[node] for node in self._put_out))

    def most(self, given_up: Collection[fx.Node]) -> int:
        """The most bytes at once, over those when the graph is entered; `given_up` are the inputs that nobody else
        holds."""
        entered = [Buffer(node) for node in given_up]
        live = most = -sum(_bytes(each) for each in entered if each not in self._last and each not in self._stays)
        for turn, kernel in enumerate(self._kernels):
            dying = [
                each
                for each in (*kernel.made, *kernel.read)
                if self._last[each] == turn and each not in self._stays and (each.node in given_up or self._made(each))
            ]
            made = sum(map(_bytes, kernel.made))
            in_place = kernel.fused and any(_bytes(each) == made for each in dying)
            most = max(most, live if in_place else live + made + kernel.scratch)
            live += made - sum(map(_bytes, dying))
        return max(most, live)

    def _made(self, buffer: Buffer) -> bool:
        return buffer.node.op != "placeholder"

    def _kernel(self, node: fx.Node) -> Kernel | None:
        """The kernel that a node starts, if it is more than a name for memory or a part of another kernel."""
        if node.op == "placeholder":
            self._holding[node] = frozenset([Buffer(node)])
            return None
        read = frozenset().union(*(self._holding[source] for source in node.all_input_nodes))
        if node.target is operator.getitem and Buffer(node.args[0], node.args[1]) in read:
            read = frozenset([Buffer(node.args[0], node.args[1])])
        fused = is_fusible(node)
        if node.op != "call_function" or is_view(node) or (fused and not self._is_stored(node)):
            self._holding[node] = read
            return None
        made = tuple(_buffers(node))
        self._holding[node] = frozenset(made)
        return Kernel(made, read, fused, scratch_bytes(node.target, fx.map_arg(node.args, value)))

    def _is_stored(self, node: fx.Node) -> bool:
        """Whether what a fusible operator gives lies in memory."""
        readers = [reader for reader in node.users if reader.op == "call_function"]
        return node in self._put_out or any(
            self._is_stored(reader) if is_view(reader) else not is_fusible(reader) for reader in readers
        )


def _buffers(node: fx.Node) -> list[Buffer]:
    if isinstance(value(node), (tuple, list)):
        return [Buffer(node, place) for place, x in enumerate(value(node)) if isinstance(x, torch.Tensor)]
    return [Buffer(node)]


def _bytes(buffer: Buffer) -> int:
    found = value(buffer.node) if buffer.place is None else value(buffer.node)[buffer.place]
    return sum(nbytes(x) for x in pytree.tree_leaves(found))


def nbytes(x: Any) -> int:
    """Bytes of a tensor, 0 for all else."""
    return x.nbytes if isinstance(x, torch.Tensor) else 0
