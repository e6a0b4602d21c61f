"""Scores from outside the step: computed ahead of it, on a CUDA stream beside the step before, or kept from earlier.

The router scores a batch before the batch trains, and nothing of the step before is needed for that but the weights:
so the next batch can be scored while this one trains. Scores are then those of the weights before this step's update.
The step waits for the router between its forward and its backward, so no optimizer writes what the router reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.program import Region, callers_region
from cggr_compile.run.router_time import Mark, mark, seconds_between

if TYPE_CHECKING:
    from cggr_compile.front.handle import Handle

SETTLING = 3
"""Steps of a trial that are not timed: they compile and record."""


class ScoresReady(Exception):
    """Ends a call of the compiled forward that was for the scores only."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


def refuse_nan(scores: Tensor) -> None:
    """Raises ValueError where a score is NaN; on CUDA an assertion fails on the device, and nothing is read back."""
    nan = scores.isnan()
    if nan.is_cuda:
        torch._assert_async(~nan.any(), "use_scores: a score is NaN")
    elif nan.any():
        rows = nan.nonzero().flatten().tolist()
        raise ValueError(f"use_scores: the scores of rows {rows} are NaN; give every row a score, -inf for the least")


class GivenScores:
    """The scores that the next step takes, and the router that runs beside a step."""

    def __init__(self) -> None:
        self.wanted = False
        self._given: Tensor | None = None
        self._beside: torch.cuda.Stream | None = None
        self._running = False
        self._region = Region()

    def give(self, scores: Tensor) -> None:
        """For the next training step."""
        self._given = scores

    def take(self, rows: int, device: torch.device) -> Tensor | None:
        """The scores given for this step, [rows] fp32 on the device; None where none were.

        Raises:
            ValueError: they are for another number of rows.
        """
        scores, self._given = self._given, None
        if scores is None:
            return None
        if scores.shape != (rows,):
            given = tuple(scores.shape)
            raise ValueError(f"use_scores: scores of shape {given} for a batch of {rows} rows; give one score a row")
        return scores.to(device, torch.float32)

    def after_forward(self, device_type: str) -> None:
        """What a step's forward leaves for the next scores: the stream waits, and how the step computed is known."""
        self.join()
        self._region = callers_region(device_type)

    def as_in_the_step(self) -> AbstractContextManager[None]:
        """The autocast that the last step ran under: batches are fetched outside of it."""
        return self._region.active()

    def beside(self) -> torch.cuda.Stream:
        """The stream for the router, behind what the current one has been given so far."""
        if self._beside is None:
            self._beside = torch.cuda.Stream()
        self._beside.wait_stream(torch.cuda.current_stream())
        self._running = True
        return self._beside

    def join(self) -> None:
        """Lets the current stream wait for a router that runs beside it."""
        if self._running and self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
        self._running = False


class ScoredAhead:
    """Batches of an iterable, each scored while the one before it trains.

    Attributes:
        seconds: mean time of a step, by what was tried: `"inside"` (the router in the step) and `"ahead"`; empty
            without a trial and before its end.
        ahead: whether batches are scored ahead now.
    """

    def __init__(self, handle: Handle, batches: Iterable[Mapping[str, Any]], trial: int) -> None:
        self.handle = handle
        self.batches = batches
        self.trial = trial
        self.seconds: dict[str, float] = {}
        self.ahead = trial == 0
        self._device = next(handle.model.parameters()).device

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        remaining = iter(self.batches)
        current = next(remaining, None)
        scores: Tensor | None = None
        step, begin = 0, mark(self._device)
        while current is not None:
            begin = self._try(step, begin)
            following = next(remaining, None)
            if scores is not None:
                self.handle.runtime.given.join()  # for a batch that no step was made of
                self.handle.runtime.given.give(scores)
            scores = self._score(following) if self.ahead and following is not None else None
            yield current
            current = following
            step += 1

    def _try(self, step: int, begin: Mark) -> Mark:
        """Moves the trial on in front of a step; when what is being timed began."""
        each = SETTLING + self.trial
        if not self.trial or step > 2 * each:
            return begin
        if step in (SETTLING, each + SETTLING):
            return mark(self._device)
        if step in (each, 2 * each):
            self.seconds["ahead" if self.ahead else "inside"] = seconds_between(begin, mark(self._device)) / self.trial
            self.ahead = step == each or self.seconds["ahead"] < self.seconds["inside"]
        return begin

    def _score(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The scores; None where the model does not train now, where no step has shown under which autocast it does,
        and where it cannot be routed and may train all the same."""
        given = self.handle.runtime.given
        if not self.handle.model.training or not self.handle.runtime.last:
            return None
        try:
            with given.as_in_the_step():
                if not any(isinstance(each, Tensor) and each.is_cuda for each in batch.values()):
                    return self.handle.score(batch)
                training = torch.cuda.current_stream()
                with torch.cuda.stream(given.beside()):
                    scores = self.handle.score(batch)
        except CannotOptimize as error:
            self.handle.refuse(error)
            return None
        scores.record_stream(training)
        return scores
