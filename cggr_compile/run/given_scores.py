"""Scores from outside the step: computed ahead of it, on a CUDA stream beside the step before, or kept from earlier.

The router scores a batch before the batch trains, and nothing of the step before is needed for that but the weights:
so the next batch can be scored while this one trains. Scores are then those of the weights before this step's update.
The step waits for the router between its forward and its backward, so no optimizer writes what the router reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ir.program import Region, callers_region


class ScoresReady(Exception):
    """Ends a call of the compiled forward that was for the scores only."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


def check_scores(scores: Any) -> None:
    """Raises TypeError for what is no tensor, and ValueError where a score is NaN; on CUDA an assertion fails on the
    device instead, and nothing is read back."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"use_scores: got {scores!r}; give a tensor of one score a row, torch.as_tensor(scores)")
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

    def give(self, scores: Tensor) -> Tensor:
        """For the next training step, and for no other; the copy that it will take."""
        self._given = scores.detach().clone()
        return self._given

    def withdraw(self, given: Tensor | None) -> None:
        """Takes back what `give` returned, unless a step has taken it or others were given since."""
        if self._given is given:
            self._given = None

    @contextmanager
    def for_one_step(self) -> Iterator[None]:
        """A training step; one that is refused or fails leaves its scores to no other."""
        try:
            yield
        except BaseException:
            self._given = None
            raise

    @property
    def waiting(self) -> int:
        """How many scores are given for the next step; -1 where none are."""
        return -1 if self._given is None else self._given.numel()

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
