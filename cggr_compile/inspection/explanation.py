"""Inspection: `Report` (facts, predicted cost), `Diff` (the rewrite) and `Explanation` (both, from `cggr.explain`)."""

from __future__ import annotations

from cggr_compile.inspection.diff import Diff
from cggr_compile.inspection.report import Report, latest_plan
from cggr_compile.ir.program import Analysed, Program
from cggr_compile.run.runtime import Runtime

__all__ = ["Diff", "Explanation", "Report"]


class Explanation:
    """What `cggr.explain` returns: the plan of a training step that was captured and rewritten, but not run."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

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
        """What was found, inserted and chosen, and the predicted cost; raises as `program`."""
        return Report.of(self.runtime)

    def diff(self) -> Diff:
        """The rewrite; raises as `program`."""
        return Diff.of(self.runtime)

    def __str__(self) -> str:
        return f"{self.diff().summary()}\n\n{self.report()}"
