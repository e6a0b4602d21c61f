"""The router's mean confidence on its way to the host, for the dynamic threshold.

A step's k must be known on the host, and the confidence is computed on the device. So each step uses that of the step
before, copied while the host goes on: the same value whatever the timing, and a wait only for a host that is a whole
step ahead of the device.
"""

from __future__ import annotations

import torch

from cggr_compile.run.arriving import Arriving


class Confidence:
    """The last mean confidence: None before the first, a float once it is asked for."""

    def __init__(self, last: float | None = None) -> None:
        self._last = last
        self._coming: Arriving | None = None

    def measured(self, mean: torch.Tensor) -> None:
        """Takes a step's confidence, 0-d float32."""
        self._coming = Arriving(mean)

    def last(self) -> float | None:
        """The confidence; waits for the step that computes it where that is not done yet."""
        if self._coming is not None:
            self._last, self._coming = self._coming.there().item(), None
        return self._last
