"""`selection="auto"`: every row trains until the scores show rows that spoil the data, then the rule `trimmed`.

Where a share of the rows is noise, selecting may pay (docs/auto.md has what was measured). Noise is hard for a model of
any depth and stays so, which stretches the upper tail of the scores (`tail_of`), as they lie about the median of their
batch: of the last WINDOW scored rows, the distance from the median to the 95th percentile over that from the 5th
percentile to the median. It is about 1 for clean text. Tails shorter than LEAST nats are not of noise: a model that has
learnt its data has scores near 0, of any shape.

A probe scores the rows of one batch by the router alone: a forward of a few layers, and nothing that trains. Its scores
travel to the host by themselves and are read by the next probe.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cggr_compile.config import RoutingConfig
from cggr_compile.run.agreement import Agreement
from cggr_compile.run.arriving import Arriving
from cggr_compile.run.plan import Plan
from cggr_compile.run.prepare import undisturbed

WINDOW = 512
LEAST = 0.5
PAYS, PAYS_NO_MORE = 1.45, 1.25
"""Tails at which rows are selected, and at which every row trains again."""

_log = logging.getLogger("cggr_compile")


class Auto:
    """When to probe, what was found so far, and which program is in force.

    Attributes:
        selects: whether rows are selected.
        tail: of the last WINDOW scores, None before there are as many; of several ranks, the mean of theirs.
        agreement: how several ranks find that mean, None for one.
    """

    agreement: Agreement | None = None

    def __init__(self, config: RoutingConfig) -> None:
        self.choices = (everything(config), by_score(config))
        self.every = config.probe_every
        self.due = config.probe_every
        self.selects = False
        self.tail: float | None = None
        self._scores: deque[float] = deque(maxlen=WINDOW)
        self._coming: Arriving | None = None

    @property
    def in_force(self) -> RoutingConfig:
        """The options that steps run under."""
        return self.choices[self.selects]

    def probe(self, plan: Plan, inputs: Sequence[Any], steps: int, seed: int) -> None:
        """Decides by the probes before which program runs from this step on, and scores the rows."""
        if not plan.can_select(self.choices[1]):
            return
        self.due = steps + self.every
        if self._coming is not None:
            self._take(self._coming.there().tolist(), steps)
        generator = torch.Generator(plan.device).manual_seed((seed + steps) % 2**63)
        with undisturbed(plan.device, inputs):
            scores, counts = plan.row_scores(inputs, self.choices[1], generator)
        self._coming = Arriving(scores.masked_fill(counts == 0, math.nan))

    def _take(self, scores: Iterable[float], steps: int) -> None:
        found = [score for score in scores if math.isfinite(score)]
        middle = median(found) if found else 0.0
        self._scores.extend(score - middle for score in found)
        found_tail = tail_of(self._scores) if len(self._scores) == WINDOW else None
        self.tail = found_tail if self.agreement is None else self._agreed(self.agreement, found_tail)
        if self.tail is None:
            return
        before = self.selects
        self.selects = self.tail > (PAYS_NO_MORE if before else PAYS)
        if self.selects != before:
            _log.warning("step %d: %s%s", steps, self, "; ratio=1 keeps every row" if self.selects else "")

    def _agreed(self, agreement: Agreement, tail: float | None) -> float | None:
        """The mean tail of the ranks, of the probe before this one; so all of them switch in the same step."""
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
        coming = None if self._coming is None else self._coming.there().tolist()
        found = {"due": self.due, "selects": self.selects, "tail": self.tail}
        return {**found, "scores": list(self._scores), "coming": coming}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.due, self.selects, self.tail = state["due"], state["selects"], state["tail"]
        self._scores = deque(state["scores"], WINDOW)
        self._coming = None if state["coming"] is None else Arriving(torch.tensor(state["coming"]))


def everything(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that keeps every row."""
    return replace(config, selection="trimmed", ratio=1.0)


def by_score(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that selects."""
    return replace(config, selection="trimmed")


def tail_of(scores: Iterable[float]) -> float:
    """(q95 - q50) / (q50 - q05) of some numbers; 1 where the upper tail is shorter than LEAST."""
    low, middle, high = torch.tensor(list(scores)).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return (high - middle) / max(middle - low, 1e-9) if high - middle >= LEAST else 1.0
