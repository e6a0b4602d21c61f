"""Inspection: `Report` (facts, predicted cost), `Diff` (the rewrite) and `Explanation` (both, from `cggr.explain`)."""

from __future__ import annotations

import dataclasses

from torch import nn

from cggr_compile.errors import CannotOptimize
from cggr_compile.inspection.diff import Diff
from cggr_compile.inspection.memory import Memory, largest_that_fits, predict
from cggr_compile.inspection.report import Report, latest_plan
from cggr_compile.ir.program import Analysed, Program, hint
from cggr_compile.run.runtime import Runtime

__all__ = ["Diff", "Explanation", "Memory", "Report"]


class Explanation:
    """What `cggr.explain` returns: the plan of a training step that was captured and rewritten, but not run."""

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        self.runtime = runtime
        self.model = model
        self._predicted: dict[int, Memory] = {}

    @property
    def program(self) -> Analysed:
        """The rewritten program.

        Raises:
            CannotOptimize: the call was not captured as a training step.
        """
        return latest_plan(self.runtime).program

    @property
    def captured(self) -> Program:
        """The program as captured; raises as `program`."""
        return latest_plan(self.runtime).captured

    def report(self) -> Report:
        """What was found, inserted and chosen, and the predicted cost and memory; raises as `program`."""
        report = Report.of(self.runtime)
        try:
            return dataclasses.replace(report, memory=self.memory())
        except CannotOptimize as error:
            return dataclasses.replace(report, memory=f"not predicted: {error.reason}")

    def memory(self, rows: int | None = None) -> Memory:
        """The GPU memory that a step is predicted to take, of the captured length and of so many rows, the captured
        ones where None; for a CUDA device, whichever the model is on. Where a schedule changes steps, of the one that
        takes most: with all layers, or at the largest fraction that is kept.

        Raises:
            CannotOptimize: it cannot be predicted; as `program`.
            ValueError: `rows` is no whole number above 0.
        """
        rows = hint(latest_plan(self.runtime).captured.batch) if rows is None else rows
        if rows not in self._predicted:
            self._predicted[rows] = predict(self.runtime.plans[-1], self.model, rows)
        return self._predicted[rows]

    def batch_that_fits(self, gibibytes: float) -> Memory:
        """The largest batch of rows of the captured length whose step is predicted to take at most so much memory:
        `rows` of what is returned, with its `peak`; to one row in 256.

        A card has less than its name says: CUDA itself takes about half a GiB, and memory comes in pieces.

        Raises:
            CannotOptimize: a single row takes more, or as `memory`.
            ValueError: `gibibytes` is not a finite number above 0.
        """
        return largest_that_fits(self.memory, hint(latest_plan(self.runtime).captured.batch), gibibytes)

    def diff(self) -> Diff:
        """The rewrite; raises as `program`."""
        return Diff.of(self.runtime)

    def __repr__(self) -> str:
        return f"<cggr explanation of {type(self.model).__name__}: {self.runtime.config}; print it>"

    def __str__(self) -> str:
        return f"{self.diff().summary()}\n\n{self.report()}"
