"""Batches that are scored while the one before trains: the loop around `Handle.score` and `use_scores`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cggr_compile.errors import CannotOptimize
from cggr_compile.run.runtime import Runtime


class Scorer(Protocol):
    """What scores: a model's handle."""

    model: nn.Module
    runtime: Runtime

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        """The scores of a batch's rows."""


def scored_ahead(handle: Scorer, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches, each scored while the one before it trains."""
    remaining, given = iter(batches), handle.runtime.given
    current = next(remaining, None)
    scores: Tensor | None = None
    own: Tensor | None = None
    try:
        while current is not None:
            following = next(remaining, None)
            given.join()  # for a batch that no step was made of
            given.withdraw(own)
            own = None if scores is None else given.give(scores)
            scores = None if following is None else _score(handle, following)
            yield current
            current = following
    finally:
        given.withdraw(own)


def _score(handle: Scorer, batch: Mapping[str, Any]) -> Tensor | None:
    """The scores; None where the model does not train now, where no step has shown under which autocast it does, where
    `"auto"` keeps every row, and where the model cannot be routed and may train all the same."""
    given, auto = handle.runtime.given, handle.runtime.auto
    if not handle.model.training or handle.runtime.last is None or (auto is not None and not auto.selects):
        return None
    try:
        with given.as_in_the_step():
            if not any(isinstance(each, Tensor) and each.is_cuda for each in batch.values()):
                return handle.score(batch)
            training = torch.cuda.current_stream()
            with torch.cuda.stream(given.beside()):
                scores = handle.score(batch)
    except CannotOptimize as error:
        handle.runtime.refuse(error)
        return None
    scores.record_stream(training)
    return scores
