"""The memory of CUDA graphs, and who uses it between replays.

Activations and gradients have a memory pool each: what a backward writes is never where a forward writes, so gradients
can be handed out where a replay left them, without a copy. The next replay of any backward writes there again. Whoever
holds a gradient until then (`.grad` in a loop that adds up micro-batches or clears by zeros, a tensor kept aside or a
view of one) keeps its values: they are set aside and written back behind the replay. From then on gradients are copied
out, for what was held once will be again. Work on another stream that reads a gradient has to hold it until it is done.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cggr_compile import compat


class Turn:
    """One replayed forward, kept alive by its autograd node; `over` once its backward has run."""

    over = False


class Memory:
    """Memory that CUDA graphs are recorded into, one after another."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        # A pool whose last graph is gone cannot be recorded into again; this one stays.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, pool=self.handle):
            torch.zeros(1, device="cuda")

    def holder(self) -> Callable[[Tensor], bool]:
        """Whether a tensor lies in this memory, as it is now."""
        segments = [
            range(segment["address"], segment["address"] + segment["total_size"])
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.handle)
        ]
        return lambda x: any(x.data_ptr() in segment for segment in segments)


class Pool:
    """What the recordings of one model share: memory, the turn of the forward that waits for its backward, and the
    gradients that are handed out."""

    def __init__(self) -> None:
        self.activations, self.gradients = Memory(), Memory()
        self.lending = Lending()
        self._open: weakref.ReferenceType[Turn] | None = None

    @property
    def busy(self) -> bool:
        """Whether a replayed forward still waits for its backward: its loss is alive and was not differentiated."""
        turn = None if self._open is None else self._open()
        return turn is not None and not turn.over

    def open(self, turn: Turn) -> None:
        """Hands the memory for activations to a forward."""
        self._open = weakref.ref(turn)


class Gradient(NamedTuple):
    """What a recording computes for one of its inputs; `lendable` says that only replays of backwards write to its
    memory, and that no other gradient lies there."""

    tensor: Tensor
    lendable: bool


def gradients_of(tensors: Sequence[Tensor | None], backward_alone: Callable[[Tensor], bool]) -> list[Gradient | None]:
    """The gradients of a recording; `backward_alone` says of a tensor that only backwards write where it lies."""
    storages = Counter(x.untyped_storage().data_ptr() for x in tensors if x is not None)
    return [
        None if x is None else Gradient(x, storages[x.untyped_storage().data_ptr()] == 1 and backward_alone(x))
        for x in tensors
    ]


class Lending:
    """Hands gradients out, in their own memory until somebody was found to hold one over the next replay."""

    def __init__(self) -> None:
        self.copies = False
        self._lent: list[Tensor] = []

    @contextmanager
    def held_kept(self) -> Iterator[None]:
        """Around the replay of a backward and `hand_out`: gradients that are held have their values afterwards."""
        self._lent = [x for x in self._lent if compat.shares_memory(x)]
        self.copies = self.copies or bool(self._lent)
        values = [x.clone() for x in self._lent]
        yield
        if values:
            torch._foreach_copy_(self._lent, values)

    def hand_out(self, gradients: Sequence[Gradient | None]) -> list[Tensor | None]:
        """The gradients of a replay, as tensors that nothing else of ours refers to."""
        present = [gradient for gradient in gradients if gradient is not None]
        copied = [x for x, lendable in present if self.copies or not lendable or compat.shares_memory(x)]
        copies = [torch.empty_like(x) for x in copied]
        if copies:
            torch._foreach_copy_(copies, copied)
        own = {id(x): copy for x, copy in zip(copied, copies, strict=True)}
        lent = [x for x, _ in present if id(x) not in own]
        own |= {id(x): x.detach() for x in lent}
        self._lent += lent
        return [None if gradient is None else own[id(gradient.tensor)] for gradient in gradients]
