"""A backward in parts, each of which hands its gradients over before the next one runs.

DistributedDataParallel reduces a gradient while the rest of the backward computes, if autograd gives it that early. A
replayed backward gives all of them at its end; so among several ranks it is recorded in parts. A step in pieces
(`inner.Shared`) is run with every piece in an autograd graph of its own: what an earlier piece made is read as a leaf.
The backward then goes from piece to piece, and ends a part wherever enough gradients are complete. A parameter that
several pieces read (a tied table) is complete with the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr_compile.run.inner import Shared, call_plainly

PARTS = 8
"""At most. Each is a launch; what the last one hands over is reduced with nothing left to compute beside it."""

Gradients = list[Tensor | None]


class Part(NamedTuple):
    """One part: which of the sources it completes, by their places, and the gradients of these. Parts run in order, and
    the first takes the gradients of the differentiable outputs."""

    places: list[int]
    run: Callable[[Sequence[Tensor]], Gradients]


def differentiable(outputs: Sequence[Any]) -> list[Tensor]:
    """The outputs that have a gradient."""
    return [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]


def forward_and_parts(
    run: Callable[..., Sequence[Any]], inputs: Sequence[Any], sources: Sequence[Tensor], most: int
) -> tuple[Sequence[Any], list[Part]]:
    """Runs a step; its outputs, and its backward in at most so many parts: one where it is not in pieces.

    Args:
        run: the step.
        inputs: its inputs, leaves.
        sources: those of them that gradients are wanted for.
        most: how many parts there may be.
    """
    if most > 1 and isinstance(run, Shared):
        tape = _Tape(sources)
        with _taped(run, tape):
            outputs = run(*inputs)
        return outputs, tape.parts(outputs, most)
    outputs = run(*inputs)

    def whole(of_outputs: Sequence[Tensor]) -> Gradients:
        return list(torch.autograd.grad(differentiable(outputs), sources, of_outputs, allow_unused=True))

    return outputs, [Part(list(range(len(sources))), whole)]


@contextmanager
def _taped(run: Shared, tape: _Tape) -> Iterator[None]:
    run.call = tape.call
    try:
        yield
    finally:
        run.call = call_plainly


class _Call(NamedTuple):
    """A piece that ran: what it read of earlier pieces, as it read it; the sources it read; what it made. Each by its
    number or place."""

    taken: list[tuple[int, Tensor]]
    sources: list[int]
    made: dict[int, Tensor]


class _Tape:
    """The calls of a step's pieces, in order, and the gradients that the backward has found so far."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.sources = sources
        self.calls: list[_Call] = []
        self._places = {id(x): place for place, x in enumerate(sources)}
        self._numbers: dict[int, int] = {}  # of what pieces made, by identity; one that is gone may have had it before
        self._made = 0
        self._found: dict[int, Tensor] = {}  # gradients of what pieces made, so far
        self._complete: dict[int, Tensor] = {}  # and of the sources, by their places

    def call(self, piece: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Runs a piece in a graph of its own."""
        taken: list[tuple[int, Tensor]] = []
        sources: dict[int, None] = {}
        given = []
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad and id(x) in self._numbers:
                taken.append((self._numbers[id(x)], x.detach().requires_grad_()))
                given.append(taken[-1][1])
            else:
                given.append(x)
                if id(x) in self._places:
                    sources[self._places[id(x)]] = None
        outputs = piece(*given)
        self.calls.append(_Call(taken, list(sources), self._numbered(outputs)))
        return outputs

    def _numbered(self, outputs: Sequence[Any]) -> dict[int, Tensor]:
        made = {}
        for x in differentiable(outputs):
            self._numbers[id(x)] = self._made
            made[self._made] = x
            self._made += 1
        return made

    def parts(self, outputs: Sequence[Any], most: int) -> list[Part]:
        """The backward of all calls."""
        numbers = [self._numbers[id(x)] for x in differentiable(outputs)]
        first_read: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            for place in call.sources:
                first_read.setdefault(place, index)
        enough = sum(self.sources[place].nbytes for place in first_read) / most
        parts: list[Part] = []
        calls: list[_Call] = []
        places: list[int] = []
        for index in reversed(range(len(self.calls))):
            calls.append(self.calls[index])
            places += [place for place, first in first_read.items() if first == index]
            full = bool(places) and sum(self.sources[place].nbytes for place in places) >= enough
            if full or (index == 0 and (places or not parts)):
                parts.append(Part(places, self._backward(calls, places, [] if parts else numbers)))
                calls, places = [], []
        self.calls.clear()
        unread = [place for place in range(len(self.sources)) if place not in first_read]
        parts[-1].places.extend(unread)
        return parts

    def _backward(
        self, calls: list[_Call], places: list[int], numbers: list[int]
    ) -> Callable[[Sequence[Tensor]], Gradients]:
        def run(of_outputs: Sequence[Tensor]) -> Gradients:
            for number, gradient in zip(numbers, of_outputs, strict=True):
                _add(self._found, number, gradient)
            while calls:
                self._differentiate(calls.pop(0))
            return [self._complete.get(place) for place in places]

        return run

    def _differentiate(self, call: _Call) -> None:
        given = {number: self._found.pop(number) for number in call.made if number in self._found}
        if not given:
            return
        wanted = [*(x for _, x in call.taken), *(self.sources[place] for place in call.sources)]
        made = [call.made[number] for number in given]
        found = iter(torch.autograd.grad(made, wanted, list(given.values()), allow_unused=True))
        for number, _ in call.taken:
            _add(self._found, number, next(found))
        for place in call.sources:
            _add(self._complete, place, next(found))


def _add(gradients: dict[int, Tensor], key: int, gradient: Tensor | None) -> None:
    """Adds a share of a gradient to those that came before."""
    if gradient is not None:
        gradients[key] = gradients[key] + gradient if key in gradients else gradient
