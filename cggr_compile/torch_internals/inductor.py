"""Private corners of inductor and of AOTAutograd in front of it: their options, and the processes that compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch._inductor.config
from torch._guards import TracingContext, tracing

from cggr_compile.torch_internals.fake_tensors import FakeTensorMode


@contextmanager
def compiling(
    mode: FakeTensorMode, functions: Mapping[str, str], recompute: bool, in_order: bool = False
) -> Iterator[None]:
    """What an inner backend compiles in: with the fake tensors of `mode`.

    `functions` are those that the graph names, each with the fingerprint that stands for it in keys of inductor's
    cache. `recompute` is `RoutingConfig.recompute_elementwise`. `in_order` keeps inductor from ordering operators by
    the memory that it expects, by which it would gather all sharded parameters at the beginning.
    """
    cacheable = torch._inductor.config.patch(unsafe_marked_cacheable_functions=dict(functions))
    # torch forbids it by default, because it is slower, if little.
    partition = torch._functorch.config.patch(ban_recompute_materialized_backward=not recompute)
    order = torch._inductor.config.patch({"reorder_for_peak_memory": False} if in_order else {})
    with tracing(TracingContext(mode)), cacheable, partition, order:
        yield


def start_inductor_workers() -> None:
    """Starts the processes that compile inductor's kernels: inductor itself does when it is first called, which here is
    after the passes."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
