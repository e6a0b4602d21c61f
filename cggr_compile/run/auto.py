"""`selection="auto"`: every row trains until the scores show rows that spoil the data, then the rule `trimmed`.

Where a share of the rows is noise, selecting may pay (docs/auto.md has what was measured). Noise is hard for a model of
any depth and stays so, which stretches the upper tail of the scores (`tail_of`), as they lie about the median of their
batch: of the last WINDOW scored rows, the distance from the median to the 95th percentile over that from the 5th
percentile to the median. It is about 1 for clean text. Tails shorter than LEAST nats are not of noise: a model that has
learnt its data has scores near 0, of any shape.

Scores cost nothing: steps that keep every row put out the rows' losses, steps that select the router's scores of all
rows. They stay on the device for EVERY optimiser steps, then travel to the host by themselves, and are read at the end
of as many steps more.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import StepOutputs
from cggr_compile.run.agreement import Agreement
from cggr_compile.run.arriving import Arriving

WINDOW = 512
EVERY = 50
"""Optimiser steps between two decisions. The first such interval decides nothing: a new model scores all rows alike."""
LEAST = 0.5
PAYS, PAYS_NO_MORE = 1.45, 1.25
"""Tails at which rows are selected, and at which every row trains again."""
TAU = 0.125
"""Share of the hardest rows that are left out as noise: the tail tells noise that more than a twentieth of them is."""

_log = logging.getLogger("cggr_compile")


class Auto:
    """When to decide, what was found so far, and which program is in force.

    Attributes:
        due: the optimiser step before which the next decision falls.
        selects: whether rows are selected.
        tail: of the last WINDOW scores, None before there are as many; of several ranks, the mean of theirs.
        agreement: how several ranks find that mean, None for one.
    """

    agreement: Agreement | None = None

    def __init__(self, config: RoutingConfig) -> None:
        self.choices = (everything(config), by_score(config))
        self.due = 2 * EVERY
        self.selects = False
        self.tail: float | None = None
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._seen: deque[Tensor] = deque()
        self._coming: Arriving | None = None
        self._sizes: list[int] = []  # of the batches that come

    @property
    def in_force(self) -> RoutingConfig:
        """The options that steps run under."""
        return self.choices[self.selects]

    def see(self, found: StepOutputs, steps: int) -> None:
        """Takes what a step scored."""
        if steps < EVERY:
            return
        # NaN counts for nothing; a tensor of its own, as a replay writes its outputs again.
        self._seen.append(torch.where(found.counts > 0, found.scores, math.nan))
        if sum(map(len, self._seen)) - len(self._seen[0]) >= WINDOW:
            self._seen.popleft()

    def decide(self, steps: int) -> None:
        """Decides, if it is time, which program runs from this step on."""
        if steps < self.due:
            return
        self.due = steps + EVERY
        self._take(self._arrived(), steps)
        self._sizes, self._coming = list(map(len, self._seen)), None
        if self._seen:
            device = self._seen[-1].device
            self._coming = Arriving(torch.cat([scores.to(device) for scores in self._seen]))
            self._seen.clear()

    def _arrived(self) -> list[list[float]]:
        """The scores of each batch that was sent by the decision before."""
        if self._coming is None:
            return []
        return [batch.tolist() for batch in self._coming.there().split(self._sizes)]

    def _take(self, batches: Iterable[Sequence[float]], steps: int) -> None:
        for batch in batches:
            found = [score for score in batch if math.isfinite(score)]
            self._scores.extend(score - median(found) for score in found)
        found_tail = tail_of(self._scores) if len(self._scores) == WINDOW else None
        self.tail = found_tail if self.agreement is None else self._agreed(self.agreement, found_tail)
        if self.tail is None:
            return
        before = self.selects
        self.selects = self.tail > (PAYS_NO_MORE if before else PAYS)
        if self.selects != before:
            _log.warning("step %d: %s%s", steps, self, "; ratio=1 keeps every row" if self.selects else "")

    def _agreed(self, agreement: Agreement, tail: float | None) -> float | None:
        """The mean tail of the ranks, of the decision before this one; so all of them switch in the same step."""
        everybody, mean = agreement.found()
        if everybody:
            agreement.tell(tail)
        return self.tail if mean is None else mean

    def metrics(self, device: torch.device) -> dict[str, Tensor]:
        """`auto_selects`, and `auto_tail` once it is known."""
        found = {"auto_selects": float(self.selects), **({} if self.tail is None else {"auto_tail": self.tail})}
        return {name: torch.full((), number, device=device) for name, number in found.items()}

    def __str__(self) -> str:
        kept = "trimmed rows train" if self.selects else "every row trains"
        if self.tail is None:
            return f"{kept}; {len(self._scores)} of the {WINDOW} rows that are needed have been scored"
        against = f"at most {PAYS_NO_MORE} ends it" if self.selects else f"more than {PAYS} is needed to select"
        return f"{kept}; the tail of the scores is {self.tail:.2f}, and {against}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on and metrics show; numbers and lists of them."""
        found = {"due": self.due, "selects": self.selects, "tail": self.tail, "scores": list(self._scores)}
        return {**found, "coming": self._arrived(), "seen": [scores.tolist() for scores in self._seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.due, self.selects, self.tail = state["due"], state["selects"], state["tail"]
        self._scores = deque(state["scores"], WINDOW)
        self._sizes = list(map(len, state["coming"]))
        self._coming = Arriving(torch.tensor(list(chain.from_iterable(state["coming"])))) if self._sizes else None
        self._seen = deque(map(torch.tensor, state["seen"]))


def everything(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that keeps every row."""
    return replace(config, ratio=1.0)


def by_score(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that selects: the noise goes, and, below WITHOUT_NOISE, the easiest rows."""
    return replace(config, selection="trimmed", selection_options={"tau": TAU, **(config.selection_options or {})})


def tail_of(scores: Iterable[float]) -> float:
    """(q95 - q50) / (q50 - q05) of some numbers; 1 where the upper tail is shorter than LEAST."""
    low, middle, high = torch.tensor(list(scores)).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return (high - middle) / max(middle - low, 1e-9) if high - middle >= LEAST else 1.0
