"""The time of the router by itself.

Router and main pass are one compiled graph, in which the inner backend orders and fuses kernels as it likes: no two
points of it enclose the router alone. So the router is run alone, on the batch of a step, when somebody asks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.run.plan import Plan

RUNS = 3

Mark: TypeAlias = float | torch.cuda.Event


class RouterTime:
    """Runs of the router alone, timed in the step after `ask`; nothing is read back until `seconds`."""

    def __init__(self) -> None:
        self._asked = False
        self._spans: list[tuple[Mark, Mark]] = []

    def ask(self) -> None:
        """Measure in the next training step."""
        self._asked = True

    def before_step(self, plan: Plan, inputs: Sequence[Any], config: RoutingConfig) -> None:
        """Measures if asked: compiles the router as a program of its own, runs it once, then RUNS times for the clock.

        Training does not notice: the router has no gradients and no dropout, and its noise is not the selection's.
        """
        if not self._asked:
            return
        self._asked = False
        route = plan.scoring("router scores", config)
        generator = torch.Generator(plan.device).manual_seed(0)
        spans = []
        for _ in range(1 + RUNS):
            added = list(route.added_inputs({}, {}, generator))
            start = mark(plan.device)
            route.variant(*inputs, *added)
            spans.append((start, mark(plan.device)))
        self._spans = spans[1:]

    @property
    def seconds(self) -> float | None:
        """The median of the runs, None before the first measurement; waits for them on CUDA."""
        if not self._spans:
            return None
        return statistics.median(seconds_between(*span) for span in self._spans)


def mark(device: torch.device) -> Mark:
    """A point in the work of a device, for `seconds_between`; nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two marks of one device; waits for the second on CUDA."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
