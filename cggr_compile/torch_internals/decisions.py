"""Private corners of Dynamo: what it decides by sizes while it traces a model's own lines.

A guard does not say enough: a decision that Dynamo knows without one (`x.shape[0] == 1`, since a traced size is at
least 2) leaves none. Dynamo asks for all of them in one place, which is wrapped while a call is compiled; the wrapper
only writes down, in the trace's `ShapeEnv`, what it passes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.torch_internals.dynamo import module_path, modules_around, trace_again

_TAKEN = "_cggr_decisions"


class Decision(NamedTuple):
    """The expression over sizes that decided, the source line and the modules around it."""

    expression: Any
    line: str
    modules: tuple[str, ...]


@contextmanager
def written_down() -> Iterator[None]:
    """While a call is traced, what is decided is written down."""
    _wrap()
    try:
        yield
    finally:
        _unwrap()


def require_written_down() -> None:
    """Makes Dynamo trace the frame again where its decisions were not written down, asked from inside a backend: one
    that a trace of others called (`torch.compile(backend="cggr")`) hears of the trace when it is over."""
    if not _is_wrapped():
        write_down_until_compiled()
        trace_again("cggr needs what the model's own lines decide by sizes")


def write_down_until_compiled() -> None:
    """What is decided is written down until the compilation under way is over, however it ends."""
    if _unwrap not in torch._dynamo.callback_handler.end_callbacks:  # `torch._dynamo.reset` forgets them
        torch._dynamo.on_compile_end(_unwrap)
    _wrap()


def of(shape_env: ShapeEnv) -> dict[Decision, Any]:
    """The decisions of a finished trace that were written down, with what they were."""
    return vars(shape_env).get(_TAKEN, {})


def asserted(shape_env: ShapeEnv) -> list[tuple[Any, str]]:
    """The assertions on sizes of a finished trace, which Dynamo keeps as guards: the expressions and their lines."""
    return [
        (guard.expr, str(guard.sloc.maybe_user_loc))
        for guard in shape_env.guards
        if "_dynamo/symbolic_convert.py" in str(guard.sloc)
    ]


def _wrap() -> None:
    if not _is_wrapped():
        SymNodeVariable.evaluate_expr = _writing_down(SymNodeVariable.evaluate_expr)


def _unwrap(*_: Any) -> None:
    if _is_wrapped():
        SymNodeVariable.evaluate_expr = SymNodeVariable.evaluate_expr.__wrapped__


def _is_wrapped() -> bool:
    return getattr(SymNodeVariable.evaluate_expr, "__module__", None) == __name__


def _writing_down(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate_expr(self: SymNodeVariable, *args: Any, **kwargs: Any) -> Any:
        outcome = evaluate(self, *args, **kwargs)
        node = getattr(self.sym_num, "node", None)
        if node is not None and node._expr.free_symbols:
            frames = TracingContext.extract_stack()
            line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
            modules = tuple(map(module_path, modules_around()))
            vars(node.shape_env).setdefault(_TAKEN, {})[Decision(node._expr, line, modules)] = outcome
        return outcome

    return functools.update_wrapper(evaluate_expr, evaluate, assigned=("__name__", "__qualname__", "__doc__"))
