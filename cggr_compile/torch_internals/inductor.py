"""Private corners of inductor and of AOTAutograd in front of it: their options, and the processes that compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from inspect import getsource
from typing import Any

import torch
import torch._inductor.config
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass

from cggr_compile.torch_internals.fake_tensors import FakeTensorMode


class _Last(CustomGraphPass):
    """A pass over ATen's graphs, forward and backward, behind inductor's own and behind the one that was set."""

    def __init__(self, last: Callable[[fx.Graph], None]) -> None:
        given = torch._inductor.config.post_grad_custom_post_pass
        self._passes = [*(given if isinstance(given, (list, tuple)) else [given] if given else []), last]

    def __call__(self, graph: fx.Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any | None:
        *given, last = self._passes
        own = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in given]
        return None if None in own else (*own, getsource(last))


@contextmanager
def compiling(mode: FakeTensorMode, options: Mapping[str, Any], recompute: bool) -> Iterator[None]:
    """What an inner backend compiles in: with the fake tensors of `mode` and these `options` of inductor.

    `recompute` is `RoutingConfig.recompute_elementwise`.
    """
    # torch forbids it by default, because it is slower, if little.
    partition = torch._functorch.config.patch(ban_recompute_materialized_backward=not recompute)
    with tracing(TracingContext(mode)), partition, torch._inductor.config.patch(dict(options)):
        yield


def options(functions: Mapping[str, str], in_order: Callable[[fx.Graph], None] | None) -> dict[str, Any]:
    """Options of inductor. Given with what it compiles they hold for the backward too, which is compiled when it first
    runs.

    `functions` are those that the graph names, each with the fingerprint that stands for it in keys of inductor's
    cache. `in_order` is a pass that puts ATen's operators in order; they stay so: inductor would order them by the
    memory that it expects, and gather all sharded parameters at the beginning.
    """
    found: dict[str, Any] = {"unsafe_marked_cacheable_functions": dict(functions)}
    if in_order is not None:
        found |= {"reorder_for_peak_memory": False, "post_grad_custom_post_pass": _Last(in_order)}
    return found


def attention_kernels() -> str:
    """Which of torch's kernels of attention may run (`torch.nn.attention.sdpa_kernel`), in order of priority: tracing
    chooses by it, and torch's key of what it compiled does not hold it."""
    return str(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))


WHOLE_ROW = 8192
"""Elements of the longest rows that were measured (docs/performance.md)."""


def compile_holding_rows(*args: Any, **kwargs: Any) -> Any:
    """inductor's compiler of one graph, whose reductions over rows of up to WHOLE_ROW elements hold the row: by itself
    it reads rows of more than 1024 a second time where their values are needed behind the sum. It is an argument of the
    backend, which calls it for the backward too; `ROWS_HELD` is to be among `options`, as its cache asks for these."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    choices = copy(V.choices)
    by_itself = choices.should_use_persistent_reduction

    def holds(features: Any, cooperative: bool) -> bool:
        rows = features.get_reduction_hint() == ReductionHint.INNER and _in_any_order(features)
        short = rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, WHOLE_ROW)
        return short or by_itself(features, cooperative)

    choices.should_use_persistent_reduction = holds
    with V.set_choices_handler(choices):
        return compile_fx_inner(*args, **kwargs)


ROWS_HELD = {f"{__name__}.{compile_holding_rows.__name__}": str(WHOLE_ROW)}


def _in_any_order(features: Any) -> bool:
    """Whether no option asks for sums in a certain order (torch 2.14: `numerics="strict"`)."""
    return not hasattr(features, "strict_sum_rblock") or features.strict_sum_rblock() is None


def start_inductor_workers() -> None:
    """Starts the processes that compile inductor's kernels: inductor itself does when it is first called, which here is
    after the passes."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
