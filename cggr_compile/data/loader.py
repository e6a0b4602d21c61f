"""A loader that lets only the hard rows of another through, in batches of one size.

It chooses before anything reaches the training device. A row's place, (batch, row) in the loader below, is all that a
state keeps of it: that loader is read again to resume, and gives the row again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cggr_compile.data.prefetch import prefetched
from cggr_compile.kernels.reference import selection

Place = tuple[int, int]
Row = tuple[Place, dict[str, Tensor]]
_START: dict[str, Any] = {"batches": 0, "rows": 0, "easy": 0, "waiting": [], "deferred": []}


class FilteredLoader:
    """The hard rows of a loader's batches, filled up to batches of `batch_size`.

    Iterating it reads `loader` once, in a thread. `score(batch)` says in that thread, without gradient, how hard each
    row of a batch is: real numbers [rows], on any device, none NaN. Hard rows keep their order, and a batch takes
    rows of as many batches as it needs. Every batch has `batch_size` rows; the last one has what is left, or is dropped
    with `drop_last`.

    A batch is a mapping of names to tensors [rows, ...], a dict or a BatchEncoding. What comes out has its type, and
    holds new tensors where the loader's are, in ordinary memory. All batches agree in names and in shapes but for the
    first dimension.

    Args:
        loader: any iterable of batches, a DataLoader for instance.
        score: a small scoring model. Put it into evaluation mode, and let it share no parameter with the model that
            trains meanwhile.
        batch_size: rows of a batch that comes out, at least 1.
        ratio: the hardest max(1, floor(ratio · rows)) rows of each batch of `loader` are hard, in (0, 1]; ties go to
            the earlier row.
        threshold: rows with a score of at least this are hard. Give this or `ratio`.
        defer: None drops easy rows. A number, at least 1, keeps that many of them waiting in host memory: the one that
            has waited longest joins the hard rows where there are more, all of them do at the end.
        drop_last: leave out a last batch of fewer rows.
        prefetch: how many batches are made ahead, at least 1.

    `state_dict()` and `load_state_dict` continue an epoch behind the batch that was handed out last; `stats()` counts.
    Use one iterator at a time; `break` waits for the batch in the making and leaves no thread behind.

    Raises ValueError here for options out of range. While iterating, it raises what `loader` or `score` raise, and
    ValueError for a batch of another form, for scores that are no numbers [rows], and for a loader that gives less than
    it gave when the state was saved.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Tensor]],
        score: Callable[[Any], Tensor],
        batch_size: int,
        *,
        ratio: float | None = None,
        threshold: float | None = None,
        defer: int | None = None,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        if (ratio is None) == (threshold is None):
            raise ValueError("FilteredLoader needs ratio or threshold, one of them")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}, expected in (0, 1]")
        for name, number in (("batch_size", batch_size), ("defer", defer), ("prefetch", prefetch)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")
        self.loader = loader
        self.score = score
        self.batch_size = batch_size
        self.ratio = ratio
        self.threshold = threshold
        self.defer = defer
        self.drop_last = drop_last
        self.prefetch = prefetch
        self._resume = self._state = self._counted = _START

    def __iter__(self) -> Iterator[Any]:
        self._state = self._counted = self._resume
        self._resume = _START
        # DataLoader starts its workers here, in the consumer's thread.
        source = iter(self.loader)
        for batch, state in prefetched(self._filtered(source, self._state), self.prefetch):
            self._state = self._counted = state
            if batch is not None:
                yield batch
        self._state = _START

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands behind the batch that was handed out last; once the loop has ended, an epoch's start.

        Keys: batches, rows, easy (ints), waiting, deferred (places, (batch, row), of rows that have not come out).
        """
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration continue from a `state_dict()`.

        It reads what `loader` gave before once more, without scoring it, so `loader` has to give the same batches in
        the same order. Raises ValueError for what is no such state.
        """
        if set(state) != set(_START):
            raise ValueError(f"the state has the keys {sorted(state)}, expected {sorted(_START)}")
        places = {key: [(batch, row) for batch, row in state[key]] for key in ("waiting", "deferred")}
        self._resume = self._state = self._counted = {**state, **places}

    def stats(self) -> dict[str, int]:
        """Rows of the epoch that were read, and how many of them were easy, when the last batch was made."""
        return {"rows": self._counted["rows"], "easy": self._counted["easy"]}

    def _filtered(self, source: Iterator[Any], state: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each batch with the state behind it, at last None with the state at the end."""
        rows, easy = state["rows"], state["easy"]
        read, kind, found = _read_again(source, state)
        waiting, deferred = (deque((place, found[place]) for place in state[key]) for key in ("waiting", "deferred"))

        def made(size: int) -> tuple[Any, dict[str, Any]]:
            batch = _joined(kind, [waiting.popleft() for _ in range(size)])
            return batch, standing()

        def standing() -> dict[str, Any]:
            places = {"waiting": [place for place, _ in waiting], "deferred": [place for place, _ in deferred]}
            return {"batches": read, "rows": rows, "easy": easy, **places}

        for batch in source:
            hard = self._hard(batch)
            waiting.extend(_rows(batch, read, hard))
            if self.defer is not None:
                deferred.extend(_rows(batch, read, ~hard))
                while len(deferred) > self.defer:
                    waiting.append(deferred.popleft())
            read, kind, rows, easy = read + 1, type(batch), rows + len(hard), easy + int((~hard).sum())
            while len(waiting) >= self.batch_size:
                yield made(self.batch_size)
        waiting.extend(deferred)
        deferred.clear()
        while len(waiting) >= self.batch_size:
            yield made(self.batch_size)
        if waiting and not self.drop_last:
            yield made(len(waiting))
        yield None, standing()

    def _hard(self, batch: Any) -> Tensor:
        """bool [rows] on the CPU."""
        rows = _length(batch)
        with torch.no_grad():
            scores = self.score(batch)
        if not isinstance(scores, Tensor) or scores.shape != (rows,):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score returned {got} for a batch of {rows} rows, expected a tensor [{rows}]")
        scores = scores.detach().cpu().double()
        if scores.isnan().any():
            raise ValueError(f"score returned NaN for row {int(scores.isnan().nonzero()[0])} of a batch")
        if self.threshold is not None:
            return scores >= self.threshold
        assert self.ratio is not None
        kept = selection.fraction_of(self.ratio, torch.tensor(rows)).clamp(min=1)
        return selection.topk_places(scores, torch.ones(rows, dtype=torch.bool)) < kept


def _read_again(source: Iterator[Any], state: Mapping[str, Any]) -> tuple[int, type, dict[Place, dict[str, Tensor]]]:
    """Reads what was read before: how many batches, their type, and the rows that have not come out."""
    read, kind = 0, dict
    wanted = {*state["waiting"], *state["deferred"]}
    found: dict[Place, dict[str, Tensor]] = {}
    for batch in islice(source, state["batches"]):
        mask = torch.tensor([(read, row) in wanted for row in range(_length(batch))], dtype=torch.bool)
        found.update(_rows(batch, read, mask))
        read, kind = read + 1, type(batch)
    if read < state["batches"] or wanted - set(found):
        raise ValueError(
            f"the state was saved behind batch {state['batches']} of the loader, which now gives {read} batches or "
            "smaller ones; give it the data and the order that it had"
        )
    return read, kind, found


def _length(batch: Any) -> int:
    """The rows of a batch; ValueError for what is none."""
    if not isinstance(batch, Mapping) or not batch:
        raise ValueError(
            f"the loader gave a batch of type {type(batch).__name__}, expected a mapping of names to tensors, not empty"
        )
    lengths = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ValueError(f"{name!r} of a batch is {type(value).__name__}, expected a tensor [rows, ...]")
        lengths[name] = len(value)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the tensors of a batch have different numbers of rows: {lengths}")
    return next(iter(lengths.values()))


def _rows(batch: Mapping[str, Tensor], number: int, mask: Tensor) -> list[Row]:
    """The rows where the mask [rows] is true, with their places; they hold no memory of the others."""
    indices: Sequence[int] = mask.nonzero().squeeze(1).tolist()
    columns = {name: value[indices].unbind() for name, value in batch.items()}
    return [((number, row), {name: values[i] for name, values in columns.items()}) for i, row in enumerate(indices)]


def _joined(kind: type, rows: Sequence[Row]) -> Any:
    """One batch of the rows."""
    first = rows[0][1]
    for place, row in rows:
        for name in {**first, **row}:
            shapes = [tuple(each[name].shape) if name in each else None for each in (first, row)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{name!r} of a row has shape {shapes[1]} in batch {place[0]} of the loader, {shapes[0]} in batch "
                    f"{rows[0][0][0]}; rows of different batches are joined: pad all to one length, with the same names"
                )
    return kind({name: torch.stack([row[name] for _, row in rows]) for name in first})
