"""Dynamo over a routed forward: what it does differently, it does only while it traces one.

Dynamo's options, its runs of calls on fake tensors and Python's garbage collector belong to the process; they are
changed inside of Dynamo's lock (`torch_internals/dynamo_traces.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cggr_compile.capture import collector
from cggr_compile.capture.fake_runs import FakeRuns
from cggr_compile.torch_internals import decisions, dynamo_traces
from cggr_compile.torch_internals.autograd import beside_saved_tensor_hooks
from cggr_compile.torch_internals.dynamo import step_options


def compiled_whole(forward: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with a code object of its own, compiled as one graph and traced as a routed step is."""
    return dynamo_traces.compiled_whole(forward, backend, _as_a_routed_step)


@contextmanager
def _as_a_routed_step() -> Iterator[None]:
    with (
        dynamo_traces.tracing_options(),
        dynamo_traces.places_written_once(),
        step_options(),
        dynamo_traces.fake_runs_by(FakeRuns().run),
        decisions.written_down(),
        collector.paused(),
        beside_saved_tensor_hooks(),
    ):
        yield
