"""The router's mean confidence on its way to the host, for the dynamic threshold.

A step's k must be known on the host, and the confidence is computed on the device. So each step uses that of the step
before, copied while the host goes on: the same value whatever the timing, and a wait only for a host that is a whole
step ahead of the device.
"""

from __future__ import annotations

import torch


class Confidence:
    """The last mean confidence: None before the first, a float once it is asked for."""

    def __init__(self, last: float | None = None) -> None:
        self._last = last
        self._coming: torch.Tensor | None = None
        self._arrival: torch.cuda.Event | None = None

    def measured(self, mean: torch.Tensor) -> None:
        """Takes a step's confidence, 0-d float32. On CUDA starts its copy into pinned memory and returns."""
        self._coming, self._arrival = mean, None
        if mean.device.type == "cuda":
            self._coming = torch.empty((), dtype=mean.dtype, pin_memory=True).copy_(mean, non_blocking=True)
            self._arrival = torch.cuda.current_stream(mean.device).record_event()

    def last(self) -> float | None:
        """The confidence; waits for the step that computes it where that is not done yet."""
        if self._coming is not None:
            if self._arrival is not None:
                self._arrival.synchronize()
            self._last, self._coming, self._arrival = self._coming.item(), None, None
        return self._last
