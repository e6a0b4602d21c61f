"""Scores of the rows from outside instead of from a router: computed ahead, or kept from earlier.

Before::

    a program without a router

After::

    %scores: [B] = an input
"""

from __future__ import annotations

from cggr_compile.passes.rewrite.shared import selectable

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import quiet_region

GIVEN_SCORES = "given_scores"


def take_scores(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the input `given_scores` [B] fp32 and sets `routing.scores`, `.valid` and `.counts` to go with it."""
    builder = Builder(program)
    builder.copy_inputs()
    scores = builder.tensor_input(GIVEN_SCORES, (program.batch,), program.head.target)
    builder.part, builder.region = "score", quiet_region(program)
    valid, counts = selectable(builder)
    builder.copy_rest()
    return builder.finish("take_scores", routing=builder.routing(scores=scores, valid=valid, counts=counts))
