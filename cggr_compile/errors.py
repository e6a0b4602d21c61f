"""Errors whose first line stands alone: what is wrong, where, and what to do.

Dynamo wraps whatever a backend raises and users see the first line of the message in a log, so nothing essential
may sit on the second.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from types import FrameType

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>[^\n]+)')

_BETWEEN = {"cggr_compile", "torch", "transformers", "accelerate", "trl", "peft", *sys.stdlib_module_names}


def source_of(node: fx.Node | None) -> str | None:
    """`file:line` and the code of the innermost model line that produced `node`, where the graph knows it."""
    trace = node.meta.get("stack_trace") if node is not None else None
    frames = _FRAME.findall(trace or "")
    if not frames:
        return None
    file, line, code = frames[-1]
    return f"{file}:{line}: {code.strip()}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def warn(message: str) -> None:
    """A `RuntimeWarning` at the user's line: the innermost that is not of this package or of one that calls it for
    them."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


class CannotOptimize(RuntimeError):
    """The model, batch or graph cannot be routed; nothing was changed.

    Attributes: `reason` (what), `node` (name of the graph node, or None), `source` (model line, or None) and
    `hint` (what to do).
    """

    def __init__(
        self, reason: str, *, node: fx.Node | None = None, source: str | None = None, hint: str | None = None
    ) -> None:
        self.reason = reason
        self.node = node.name if node is not None else None
        self.source = source or source_of(node)
        self.hint = hint
        where = ", ".join(
            part
            for part in (f"node %{self.node}" if self.node else "", f"at {self.source}" if self.source else "")
            if part
        )
        message = f"cannot optimize: {reason}"
        if where:
            message += f" ({where})"
        if hint:
            message += f"; {hint}"
        super().__init__(message)

    def __reduce__(self) -> tuple:
        return (_rebuild, (self.reason, self.node, self.source, self.hint, str(self)))


def _rebuild(reason: str, node: str | None, source: str | None, hint: str | None, message: str) -> CannotOptimize:
    error = CannotOptimize(reason, source=source, hint=hint)
    error.node = node
    error.args = (message,)
    return error


@dataclass(frozen=True)
class Refusal:
    """No, as a value: what an analysis returns in place of what it looked for, where somebody is told why.

    Attributes: `reason` (what), `node` (the one to blame, or None) and `hint` (what to do).
    """

    reason: str
    node: fx.Node | None = None
    hint: str | None = None

    def error(self) -> CannotOptimize:
        """The refusal, for those who cannot go on."""
        return CannotOptimize(self.reason, node=self.node, hint=self.hint)


class PlanComplete(Exception):
    """Ends a capture whose plan was asked for and whose execution was not."""


class NotCompiled(Exception):
    """Raised by a frame that Dynamo was to compile and runs as it is instead."""


class VerificationError(AssertionError):
    """A pass broke an invariant of the rewritten graph: a defect of cggr-compile, not of the model."""

    def __init__(self, pass_name: str, problem: str, node: fx.Node | None = None) -> None:
        self.pass_name = pass_name
        self.problem = problem
        at = f" (node %{node.name})" if node is not None else ""
        super().__init__(f"pass '{pass_name}' broke the graph: {problem}{at}; please report this with `cggr.explain`")
