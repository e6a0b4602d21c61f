"""The time of the router by itself.

Router and main pass are one compiled graph, in which the inner backend orders and fuses kernels as it likes: no two
points of it enclose the router alone. So the router is run alone, on the batch of a step, when somebody asks.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cggr_compile.config import RoutingConfig
    from cggr_compile.runtime import Plan

RUNS = 3


class RouterTime:
    """Runs of the router alone, timed in the step after `ask`; nothing is read back until `seconds`."""

    def __init__(self) -> None:
        self._asked = False
        self._spans: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

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
        basis = copy.deepcopy(plan.runtime.basis)
        spans = []
        for _ in range(1 + RUNS):
            added = list(route.added_inputs({}, {}, basis, generator))
            start = _now(plan.device)
            route.variant(*inputs, *added)
            spans.append(_since(start))
        self._spans = spans[1:]

    @property
    def seconds(self) -> float | None:
        """The median of the runs, None before the first measurement; waits for them on CUDA."""
        if not self._spans:
            return None
        return statistics.median(span if isinstance(span, float) else _elapsed(*span) for span in self._spans)


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _since(start: float | torch.cuda.Event) -> float | tuple[torch.cuda.Event, torch.cuda.Event]:
    if isinstance(start, float):
        return time.perf_counter() - start
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    return start, end


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000
