"""The router's head: one operator, and what it needs beside hidden states and parameters.

`column_noise` (sampled) is an input of the rewritten graph, supplied by the runtime as `kept` and `noise` are, so the
graph stays a pure function. Targets are read in front of the row selection: the frequent columns of a sample are those
of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.router_head import effective_head


class HeadCall(NamedTuple):
    """The operands of a head (hidden rows, weight, bias, target) and its options (scale, …, ignore_index)."""

    operands: tuple[fx.Node | None, ...]
    quantities: Sequence[str]
    options: tuple[float, ...]

    def of(self, builder: Builder[Analysed], operator: torch._ops.OpOverload, *between: Any) -> fx.Node:
        """Calls `operator` with what it takes `between` operands and quantities."""
        return builder.call(operator, *self.operands, *between, list(self.quantities), *self.options)


def score_head(builder: Builder[Analysed], config: RoutingConfig, call: HeadCall) -> fx.Node:
    """The statistics [Q, N] by the configured head."""
    return _HEADS[effective_head(config, value(call.operands[1]).shape[0])](builder, config, call)


def _exact(builder: Builder[Analysed], config: RoutingConfig, call: HeadCall) -> fx.Node:
    return call.of(builder, torch.ops.cggr.score.default)


def _fp8(builder: Builder[Analysed], config: RoutingConfig, call: HeadCall) -> fx.Node:
    return call.of(builder, torch.ops.cggr.fp8_score.default)


def _sampled(builder: Builder[Analysed], config: RoutingConfig, call: HeadCall) -> fx.Node:
    _, weight, _, target = call.operands
    noise = builder.tensor_input("column_noise", (1,), weight)
    sizes = (value(weight).shape[0], config.router_head_frequent, config.router_head_sampled)
    drawn = builder.call(torch.ops.cggr.sample_columns.default, target, noise, *sizes, call.options[-1])
    columns, weights = (builder.call(getitem, drawn, index) for index in (0, 1))
    return call.of(builder, torch.ops.cggr.sampled_score.default, columns, weights)


_HEADS: dict[str, Callable[[Builder, RoutingConfig, HeadCall], fx.Node]] = {
    "exact": _exact,
    "sampled": _sampled,
    "fp8": _fp8,
}
