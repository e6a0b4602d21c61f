"""The memory of CUDA graphs, and who uses it between two replays.

A replay writes its activations and gradients where the one before did. Gradients are handed out right there, without a
copy, while a loop lets go of them before its next forward. Where one is held for longer (`.grad` where micro-batches
add up or are cleared by zeros, a tensor kept aside or a view of one), its memory is left to the holder: what was
recorded so far may write there and is recorded anew, and from then on gradients are copied out. Work on another stream
that reads a gradient has to hold it until it is done.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cggr_compile.torch_internals import autograd

SHARE_OF_MEMORY = 0.1
"""Of the device's memory: the budget of a model's recordings."""

MOST_RECORDINGS = 64
"""Each takes some MiB of the host and of the driver besides."""

CALLS_THAT_DISPLACE = 8


class Turn:
    """One replayed forward, kept alive by its autograd nodes: whether its backward has `begun`, and is `over`."""

    begun = False
    over = False


class Lending:
    """Gradients that are handed out where a replay writes them; with `copies`, copies of them are."""

    def __init__(self) -> None:
        self.copies = False
        self._lent: list[Tensor] = []

    @property
    def held(self) -> bool:
        """Whether somebody still holds a gradient that was lent. One that nobody holds cannot be held again."""
        self._lent = [x for x in self._lent if autograd.shares_memory(x)]
        return bool(self._lent)

    def stop(self) -> None:
        """Leaves what is lent to its holders, and hands out copies from now on."""
        self.copies, self._lent = True, []

    def hand_out(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A replay's gradients, each as a tensor that nothing else of ours refers to.

        One that shares its memory, with another gradient or a constant, is copied.
        """
        found: list[Tensor | None] = []
        sources, copies = [], []
        for gradient in gradients:
            if gradient is None:
                found.append(None)
            elif self.copies or autograd.shares_memory(gradient):
                found.append(torch.empty_like(gradient))
                sources.append(gradient)
                copies.append(found[-1])
            else:
                found.append(gradient.detach())
                self._lent.append(gradient)
        if copies:
            torch._foreach_copy_(copies, sources)
        return found


class Recorded(Protocol):
    """What holds one recording."""

    def forget(self) -> None:
        """Drops it."""


class Shelf:
    """Which recordings are kept, within a budget of bytes and a number of them.

    Each keeps its gradients and its copies of inputs; activations are in memory that all share. A recording takes about
    five steps, so sizes that come in turn, more of them than there is room for, must not displace each other: room is
    made by dropping what was replayed longest ago, and only for sizes that came CALLS_THAT_DISPLACE times since then.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._calls = 0
        # Bytes, and the call of the last replay; in the order of last replays.
        self._kept: weakref.WeakKeyDictionary[Recorded, tuple[int, int]] = weakref.WeakKeyDictionary()

    def next_call(self) -> int:
        """The number of a call."""
        self._calls += 1
        return self._calls

    def keep(self, recorded: Recorded, nbytes: int) -> None:
        """Takes a new recording in."""
        self._kept[recorded] = (nbytes, self._calls)

    def replayed(self, recorded: Recorded) -> None:
        """Notes a replay."""
        nbytes, _ = self._kept.pop(recorded)
        self.keep(recorded, nbytes)

    def makes_room(self, recorded: Recorded, nbytes: int, calls: Sequence[int]) -> bool:
        """Whether there is room for another recording of so many bytes, or was made; `calls` are the last ones, at most
        CALLS_THAT_DISPLACE, of what it is for. A single recording is kept whatever its size."""
        self._kept.pop(recorded, None)
        left = list(self._kept.items())
        dropped = []
        while left and (len(left) >= MOST_RECORDINGS or sum(size for _, (size, _) in left) + nbytes > self.budget):
            oldest, (_, last) = left.pop(0)
            if len(calls) < CALLS_THAT_DISPLACE or calls[0] < last:
                return False
            dropped.append(oldest)
        for each in dropped:
            del self._kept[each]
            each.forget()
        return True

    def clear(self) -> None:
        """Drops all recordings."""
        for each in list(self._kept):
            each.forget()
        self._kept.clear()


class Pool:
    """What the recordings of one model share: memory, the shelf of those kept, the turn of the forward that waits for
    its backward, and the gradients that are lent. Recordings of an `epoch` before this one write where somebody holds a
    gradient."""

    def __init__(self) -> None:
        self.lending = Lending()
        self.shelf = Shelf(int(torch.cuda.mem_get_info()[1] * SHARE_OF_MEMORY))
        self.epoch = 0
        self.handle = torch.cuda.graph_pool_handle()
        self._open: weakref.ReferenceType[Turn] | None = None
        # A pool whose last graph is gone cannot be recorded into again; this one stays.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, pool=self.handle):
            torch.zeros(1, device="cuda")

    @property
    def busy(self) -> bool:
        """Whether a replayed forward still waits for its backward: its loss is alive and was not differentiated."""
        turn = None if self._open is None else self._open()
        return turn is not None and not turn.over

    def leave_to_holders(self) -> None:
        """Where a lent gradient is held: ends the epoch, whose recordings are not to be replayed any more. Memory that
        is held is not given to later ones."""
        if self.lending.held:
            self.lending.stop()
            self.epoch += 1
            self.shelf.clear()

    def open(self, turn: Turn) -> None:
        """Hands the memory for activations to a forward."""
        self._open = weakref.ref(turn)
