"""A number that the ranks of a distributed run agree on.

They add theirs up in the key-value store that they met by, in integers, so all of them read the same mean. No process
group takes part: nothing is ordered against the collectives of training, and a rank that never comes stops no other.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from cggr_compile.torch_internals.distributed import shared_store

PATIENCE = 1.0
"""Seconds that a rank waits for those that have not told their number yet."""
_UNIT, _LARGEST = 1e-6, 1e6
_made = count()


class Agreement:
    """The mean over all ranks of what each of them measured, round by round; made on every rank, in one order."""

    def __init__(self, store: Any, ranks: int) -> None:
        self._store, self._ranks = store, ranks
        self._name, self._round = f"cggr/agreement/{next(_made)}", 0

    @property
    def is_new(self) -> bool:
        """Whether nothing was told yet."""
        return self._round == 0

    def tell(self, number: float | None) -> None:
        """Adds this rank's number, of at most 1e6 either way, to the next round; None where it has measured nothing so
        far."""
        self._round += 1
        self._add("sum", round(max(-_LARGEST, min(number or 0.0, _LARGEST)) / _UNIT))
        self._add("known", int(number is not None))
        self._add("told", 1)

    def found(self) -> tuple[bool, float | None]:
        """Whether every rank told its number in the last round, and their mean, None where no rank had one."""
        if self.is_new:
            return True, None
        end = time.monotonic() + PATIENCE
        while self._add("told", 0) < self._ranks:
            if time.monotonic() > end:
                return False, None
            time.sleep(1e-3)
        known = self._add("known", 0)
        return True, self._add("sum", 0) * _UNIT / known if known else None

    def _add(self, what: str, amount: int) -> int:
        return self._store.add(f"{self._name}/{self._round}/{what}", amount)


def of_all_ranks() -> Agreement | None:
    """An agreement, where this process is one of several ranks."""
    shared = shared_store()
    return None if shared is None else Agreement(*shared)
