"""Reduces a program to its rows' scores: what `Handle.score` runs beside the training step.

Everything that the scores do not need goes, the main pass with its dropout included. What is left records no gradients
and draws nothing from torch's generators (`build_router` saw to both), so running it leaves training as it was.

Before::

    router, score, main, loss

After::

    router, score
    return %scores, %counts
"""

from __future__ import annotations

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed


def keep_scores(program: Analysed, config: RoutingConfig) -> Analysed:
    """The program whose outputs are `routing.scores` [B] fp32 and `.counts` [B] int64."""
    routing = program.routing
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router", "score")
    outputs = (routing.scores, routing.counts)
    builder.output(tuple(None if node is None else builder.env[node] for node in outputs))
    return builder.finish("keep_scores", loss_output=-1)
