"""The memory that tensors of a trace lie in, to tell which of them are views of each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from cggr_compile.errors import CannotOptimize
from cggr_compile.torch_internals import tracing

Memory: TypeAlias = StorageWeakRef | None


def memory_of(x: torch.Tensor) -> Memory:
    """A tensor's storage; None where its layout has none of its own, as a sparse one has."""
    return StorageWeakRef(x.untyped_storage()) if x.layout == torch.strided else None


@dataclass
class _Shared:
    """Memories that functionalisation tells apart, and that are one: since the call of `node`. Some of them are `stale`
    once another one has changed."""

    node: fx.Node
    known: set[Memory] = field(default_factory=set)
    stale: set[Memory] = field(default_factory=set)


_PARTS = ("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
"""Calls whose results are of one memory with the argument, and not with each other."""


class Memories:
    """Where functionalisation takes memory of a call's argument for new, in a trace: it goes by operators' schemas, and
    those of `einsum`, `type_as` and others do not say that they may give a view, or an argument."""

    def __init__(self) -> None:
        self._shared: dict[Memory, list[_Shared]] = defaultdict(list)
        self._by_strides: set[Memory] = set()

    def refuse_stale(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> None:
        """Raises `CannotOptimize` where a node reads what has changed under another name."""
        for memory in tracing.memories_of(list(given.values())):
            for shared in self._shared[memory]:
                if memory in shared.stale:
                    name = _name(shared.node)
                    raise CannotOptimize(
                        f"what {name} gives is memory of its argument; one was changed in place, and the other is read",
                        node=node,
                        hint=f"clone what {name} gives",
                    )

    def see(self, node: fx.Node, given: Mapping[fx.Node, Any], result: Any, changed: list[Any]) -> None:
        """Takes note of a call: what it gave, and which of its arguments lie where it changed something.

        Raises:
            CannotOptimize: a change beside `as_strided`, whose gradients functionalisation adds up twice.
        """
        for memory in tracing.memories_of(changed):
            if memory in self._by_strides:
                raise CannotOptimize(
                    "a tensor is changed in place that as_strided gives, or was given",
                    node=node,
                    hint="change a clone, or take the part by an index",
                )
            for shared in self._shared[memory]:
                shared.stale |= shared.known - {memory}
        if _name(node) == "as_strided":
            self._by_strides.update(tracing.memories_of(result))
        before = [pair for source, x in given.items() for pair in _pairs(source, x)]
        known = {memory for _, memory in before}
        for fake, memory in _pairs(node, result):
            for of_argument, kept in before:
                if fake == of_argument and memory not in known:
                    self._join(node, memory, kept)

    def _join(self, node: fx.Node, new: Memory, old: Memory) -> None:
        apart = _name(node) in _PARTS
        found = [] if apart else [shared for shared in self._shared[old] if _name(shared.node) not in _PARTS]
        for shared in found or [_Shared(node)]:
            for memory in {new, old} - shared.known:
                self._shared[memory].append(shared)
            shared.known |= {new, old}


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _pairs(node: fx.Node, result: Any) -> Iterator[tuple[Memory, Memory]]:
    """The memory of each tensor that a node stands for: Dynamo's, and functionalisation's."""
    fakes = pytree.tree_leaves(node.meta.get("example_value"))
    for fake, found in zip(fakes, pytree.tree_leaves(result), strict=False):
        if isinstance(fake, torch.Tensor):
            for memory in tracing.memories_of(found):
                yield memory_of(fake), memory
