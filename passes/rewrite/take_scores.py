"""Scores of the rows from outside instead of from a router: computed ahead, or kept from earlier."""

from __future__ import annotations

from cggr_compile.passes.rewrite.build_router import quiet_region
from cggr_compile.passes.rewrite.score_rows import selectable

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import Builder, Program

GIVEN_SCORES = "given_scores"


def take_scores(program: Program, config: RoutingConfig) -> Program:
    """Adds the input `given_scores` [B] fp32 and sets `routing.scores`, `.valid` and `.counts` to go with it."""
    assert program.head is not None
    builder = Builder(program)
    builder.copy_inputs()
    scores = builder.tensor_input(GIVEN_SCORES, (program.batch,), program.head.target)
    builder.part, builder.region = "score", quiet_region(program)
    valid, counts = selectable(builder)
    builder.copy_rest()
    return builder.finish("take_scores", routing=builder.routing(scores=scores, valid=valid, counts=counts))
