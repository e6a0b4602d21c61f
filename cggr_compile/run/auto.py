"""`selection="auto"`: every row trains until their losses show that a share of them is noise, then the rule `trimmed`.

Noise cannot be learnt: the losses of other rows fall, and those of noise stay where they are. So the *progress* of the
hard rows tells: from the first WINDOW rows to the last WINDOW, the fall of the losses' 95th percentile over that of
their median (docs/auto.md has what was measured). Where the median has not fallen by LEAST nats nothing can be told.

Losses cost nothing: steps that keep every row put them out. They stay on the device for EVERY optimiser steps, then
travel to the host by themselves, and are read at the end of as many steps more. Once rows are selected, one in PROBE
optimiser steps keeps every row.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import StepOutputs
from cggr_compile.run.agreement import Agreement
from cggr_compile.run.arriving import Arriving
from cggr_compile.run.notices import notice

WINDOW = 512
EVERY = 50
"""Optimiser steps between two decisions. The first such interval decides nothing: a new model scores all rows alike."""
PROBE = 200
"""Once rows are selected, every such optimiser step keeps all of them."""
LEAST = 1.0
"""Nats."""
PAYS, PAYS_NO_MORE = 0.3, 0.5
"""Progress below which rows are selected, and above which every row trains again."""
TAU = 0.125
"""Share of the hardest rows that are left out as noise: progress tells noise that more than a twentieth of them is."""


class Auto:
    """When to decide, what was found so far, and which program is in force.

    Attributes:
        due: the optimiser step before which the next decision falls.
        selects: whether rows are selected.
        probes: whether the step under way keeps every row all the same.
        progress: of the hard rows, None before it can be told; of several ranks, the mean of theirs.
        agreement: how several ranks find that mean, None for one.
    """

    agreement: Agreement | None = None

    def __init__(self, config: RoutingConfig) -> None:
        self.choices = (everything(config), by_score(config))
        self.due = 2 * EVERY
        self.selects = self.probes = False
        self.progress: float | None = None
        self._first: tuple[float, float] | None = None  # quantiles
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._told: list[float | None] = []  # to the other ranks, last, once there was something to tell
        self._seen: deque[Tensor] = deque()
        self._coming: Arriving | None = None
        self._sizes: list[int] = []  # of the batches that come

    @property
    def in_force(self) -> RoutingConfig:
        """The options that steps run under."""
        return self.choices[self.selects and not self.probes]

    @property
    def _may(self) -> bool:
        return self.choices[True].ratio < 1

    def see(self, found: StepOutputs, steps: int) -> None:
        """Takes what a step left: its rows' losses, if it kept every row."""
        whole, self.probes = self.in_force is self.choices[False], False
        if steps < EVERY or not whole:
            return
        # NaN counts for nothing; a tensor of its own, as a replay writes its outputs again.
        self._seen.append(torch.where(found.counts > 0, found.scores, math.nan))
        if sum(map(len, self._seen)) - len(self._seen[0]) >= WINDOW:
            self._seen.popleft()

    def decide(self, steps: int) -> None:
        """Decides, if it is time, which program runs from this step on."""
        if steps >= self.due:
            self.due = steps + EVERY
            self._take(self._arrived(), steps)
            self._sizes, self._coming = list(map(len, self._seen)), None
            if self._seen:
                device = self._seen[-1].device
                self._coming = Arriving(torch.cat([losses.to(device) for losses in self._seen]))
                self._seen.clear()
        self.probes = self.selects and steps % PROBE == 0

    def _arrived(self) -> list[list[float]]:
        """The losses of each batch that was sent by the decision before."""
        if self._coming is None:
            return []
        return [batch.tolist() for batch in self._coming.there().split(self._sizes)]

    def _take(self, batches: Iterable[Sequence[float]], steps: int) -> None:
        self._losses.extend(filter(math.isfinite, chain.from_iterable(batches)))
        found = self._found()
        self.progress = found if self.agreement is None else self._agreed(self.agreement, found)
        before = self.selects
        below = PAYS_NO_MORE if before else PAYS
        self.selects = self._may and self.progress is not None and self.progress < below
        if self.selects != before:
            notice(f"step {steps}: {self}" + ("; ratio=1 keeps every row" if self.selects else ""))

    def _found(self) -> float | None:
        """This rank's progress so far."""
        if len(self._losses) < WINDOW:
            return None
        last = quantiles(self._losses)
        if self._first is None:
            self._first = last
        return progress(self._first, last)

    def _agreed(self, agreement: Agreement, found: float | None) -> float | None:
        """The mean progress of the ranks, of the decision before this one; so all of them switch in the same step."""
        if agreement.is_new and self._told:  # before this run was resumed
            agreement.tell(self._told[0])
        everybody, mean = agreement.found()
        if everybody:
            agreement.tell(found)
            self._told = [found]
        return mean if everybody else self.progress

    def metrics(self, device: torch.device) -> dict[str, Tensor]:
        """`auto_selects`, and `auto_progress` once it is known."""
        known = {} if self.progress is None else {"auto_progress": self.progress}
        found = {"auto_selects": float(self.selects), **known}
        return {name: torch.full((), number, device=device) for name, number in found.items()}

    def __str__(self) -> str:
        if not self._may:
            return "every row trains: ratio=1"
        kept = "trimmed rows train" if self.selects else "every row trains"
        if self.progress is not None:
            against = f"more than {PAYS_NO_MORE} ends it" if self.selects else f"less than {PAYS} is needed to select"
            return f"{kept}; losses of hard rows fell {self.progress:.2f} times as much as the median, and {against}"
        if self._first is None:
            return f"{kept}; {len(self._losses)} of the {WINDOW} rows that are needed have been seen"
        fell = self._first[0] - quantiles(self._losses)[0]
        return f"{kept}; the median loss fell {fell:.2f} nats since the first {WINDOW} rows, and {LEAST} are needed"

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on and metrics show; numbers and lists of them."""
        first = None if self._first is None else list(self._first)
        found = {"due": self.due, "selects": self.selects, "progress": self.progress, "first": first}
        waiting = {"coming": self._arrived(), "seen": [losses.tolist() for losses in self._seen]}
        return {**found, "losses": list(self._losses), "told": list(self._told), **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.due, self.progress = state["due"], state["progress"]
        self.selects = self._may and state["selects"]
        self._first = None if state["first"] is None else tuple(state["first"])
        self._losses, self._told = deque(state["losses"], WINDOW), list(state["told"])
        self._sizes = list(map(len, state["coming"]))
        self._coming = Arriving(torch.tensor(list(chain.from_iterable(state["coming"])))) if self._sizes else None
        self._seen = deque(map(torch.tensor, state["seen"]))


def everything(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that keeps every row."""
    return replace(config, ratio=1.0)


def by_score(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that selects: the noise goes, and the easiest rows."""
    return replace(config, selection="trimmed", selection_options={"tau": TAU, **(config.selection_options or {})})


def quantiles(losses: Iterable[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    middle, high = torch.tensor(list(losses)).quantile(torch.tensor([0.5, 0.95])).tolist()
    return middle, high


def progress(first: tuple[float, float], last: tuple[float, float]) -> float | None:
    """The fall of the 95th percentile over that of the median; None where the latter is less than LEAST."""
    fell, hard = (before - after for before, after in zip(first, last, strict=True))
    return hard / fell if fell >= LEAST else None
