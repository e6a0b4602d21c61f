"""How much GPU memory a training step is predicted to take, and which batch fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.liveness import nbytes
from cggr_compile.ir.program import hint
from cggr_compile.run.held import held_by, largest_fraction
from cggr_compile.run.plan import Plan

GIBIBYTE = 2**30
WORKSPACE = 2**25
"""Bytes that cuBLAS takes on Hopper for each thread of the host and each stream that products run on."""
THREADS = 2
"""Of the host: one runs the forward, one the backward."""
PRECISION = 256
"""The largest batch is sought to one row in so many."""
FARTHEST = 64
"""How many times as many rows as fit are tried next: few rows say little of more where a fraction of them is kept."""
RECORDING_STREAMS = 3
"""With CUDA graphs: the loop's, that of the runs before a recording, and the recording's."""


@dataclass(frozen=True)
class Memory:
    """GiB of a step on `rows` sequences of `length` tokens at the moment when most is taken; `when` says which step it
    is, where others of the run take less.

    Attributes:
        parameters: parameters and buffers of the model.
        gradients: those that exist at that moment, under CUDA graphs besides those that a recording keeps.
        optimizer: AdamW's two moments of every parameter that trains, in its dtype, as `torch.optim.AdamW` makes them.
        activations: what the forward has left for the backward.
        transient: what is there for a moment: blocks of logits, values inside a layer, workspaces of cuBLAS.
    """

    rows: int
    length: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    when: str = ""

    @property
    def peak(self) -> float:
        """The sum of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient

    def __str__(self) -> str:
        batch = f"{self.rows} × {self.length}" + (f" {self.when}" if self.when else "")
        return (
            f"{self.peak:.3g} GiB at {batch}: parameters {self.parameters:.3g}, gradients {self.gradients:.3g}, AdamW "
            f"{self.optimizer:.3g}, activations {self.activations:.3g}, transient {self.transient:.3g}"
        )


def predict(plan: Plan, model: nn.Module, rows: int) -> Memory:
    """The memory of a step of a plan of the model, of all that its schedule comes to the largest.

    Raises:
        CannotOptimize: it cannot be predicted, or not for another number of rows than was captured.
        ValueError: `rows` is no whole number above 0.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows={rows!r} is no batch; pass a whole number, 1 or more")
    captured = hint(plan.captured.batch)
    if rows != captured and not isinstance(plan.captured.batch, torch.SymInt):
        raise CannotOptimize(
            f"the captured batch has one row, so the memory of {rows} is not known", hint="explain a batch of two rows"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {path: x for path, x in parameters.items() if x.requires_grad}
    held = held_by(plan, trained, rows)
    recorded = plan.owner.in_force.cuda_graphs
    activations, gradients, transient = held.activations, held.gradients, held.transient
    if activations + gradients + transient < held.gradients_of_parameters:  # most is taken in the optimizer's step
        activations, gradients, transient = 0, held.gradients_of_parameters, 0
    if recorded:
        gradients += held.gradients_of_parameters
    transient += WORKSPACE * THREADS * (RECORDING_STREAMS if recorded else 1)
    state = sum(map(nbytes, (*model.parameters(), *model.buffers())))
    moments = 2 * sum(nbytes(x) for x in set(trained.values()))
    when = f"once all {len(plan.analysed.stack)} layers train" if plan.stages else ""
    if plan.selects and (fraction := largest_fraction(plan)) > plan.owner.in_force.ratio:
        when = f"while {fraction:.0%} is kept" + (f", {when}" if when else "")
    return Memory(
        rows,
        hint(plan.captured.sequence),
        parameters=state / GIBIBYTE,
        gradients=gradients / GIBIBYTE,
        optimizer=moments / GIBIBYTE,
        activations=activations / GIBIBYTE,
        transient=transient / GIBIBYTE,
        when=when,
    )


def largest_that_fits(predicted: Callable[[int], Memory], rows: int, gibibytes: float) -> Memory:
    """The memory of the largest batch, of rows of the captured length, whose step is predicted to take at most so much;
    of more than `PRECISION` rows, nearly the largest.

    Memory grows evenly with the rows, for the most part, so that few batches have to be tried: one row, then `rows`,
    then what these say.

    Raises:
        CannotOptimize: a single row does not fit, or as `predicted`, which gives the memory of so many rows.
        ValueError: `gibibytes` is not a finite number above 0.
    """
    if not 0 < gibibytes < math.inf:
        raise ValueError(f"{gibibytes!r} GiB is no card's memory; pass a finite number above 0")
    one = best = left = predicted(1)
    if one.peak > gibibytes:
        size = f"{one.peak * GIBIBYTE:,.0f} bytes"
        raise CannotOptimize(
            f"one row of {one.length} tokens takes {size}, more than {gibibytes:g} GiB ({one})",
            hint="docs/inspecting.md says what takes less memory; or shorten the rows",
        )
    too_large: Memory | None = None
    between: float = math.inf  # rows of the largest that fits and the smallest that does not
    farther, rows = 1, max(2, rows)
    while too_large is None or too_large.rows - best.rows > max(1, best.rows // PRECISION):
        tried = predicted(rows)
        if tried.peak <= gibibytes:
            left, best = best, tried
        else:
            too_large = tried
        other = too_large or left
        of_row = (other.peak - best.peak) / (other.rows - best.rows)
        rows = best.rows + math.floor((gibibytes - best.peak) / of_row) if of_row > 0 else best.rows * FARTHEST
        if too_large is None:
            rows = min(max(rows, best.rows + max(farther, best.rows // PRECISION)), best.rows * FARTHEST)
            farther *= 2
            continue
        before, between = between, too_large.rows - best.rows
        rows = min(max(rows, best.rows + 1), too_large.rows - 1)
        if between > before / 2:  # memory grows in stairs
            rows = best.rows + max(1, between // 2)
    return best
