"""Private corners of Dynamo's traces: a function compiled as a whole, what holds while one of its frames is traced, and
the runs of calls on fake tensors.

Dynamo's options and its runs of calls on fake tensors belong to the process. Dynamo holds one lock through every trace,
whichever thread asks for it: what is changed when a trace begins and put back when it ends is seen by no other trace,
and a step that traces nothing changes nothing.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from logging import DEBUG, Logger
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import fx
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import output_graph, symbolic_convert, utils
from torch._dynamo.convert_frame import CatchErrorsWrapper
from torch._dynamo.eval_frame import OptimizeContext
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.torch_internals.dynamo import one_at_a_time, replaced

# What writes a message; the last three are transformers' additions, there once it is imported.
_LOGGING = (
    *("debug", "info", "warning", "warn", "error", "exception", "critical", "log"),
    *("warning_advice", "warning_once", "info_once"),
)


_REQUIRES_GRAD = "_check_requires_grad_intermediate_outputs"

Context = Callable[[], AbstractContextManager[Any]]


def compiled_whole(forward: Callable[..., Any], backend: Callable[..., Any], traced_in: Context) -> Callable[..., Any]:
    """`torch.compile(forward, backend=backend, fullgraph=True)` of a function with a code object of its own, each of
    whose traces happens in `traced_in()`, inside of Dynamo's lock.

    What Dynamo keeps of it goes with it: compiled code and the code it was made of hold each other, through Dynamo's
    table and a cache that Python's collector does not see.
    """
    own = _Backend(backend)
    context = torch._dynamo.optimize(own, nopython=True)
    if isinstance(context, OptimizeContext):  # otherwise Dynamo is switched off in this process
        errors_caught: Any = context.callback
        errors_caught.__class__ = _BesideDDP
        errors_caught._torchdynamo_orig_backend = _Trace(errors_caught._torchdynamo_orig_backend, own, traced_in)
    compiled: Any = context(forward)
    compiled.backend = backend
    weakref.finalize(compiled, _forget, forward.__code__).atexit = False
    return compiled


def _forget(code: CodeType) -> None:
    reset_code(code)
    for method in vars(ShapeEnv).values():  # remember the environments they were asked in, sizes of tensors and all
        if hasattr(method, "cache_clear"):
            method.cache_clear()


class _Backend:
    """A backend as Dynamo gets it. Dynamo remembers every backend that it ever got, and with ours all plans of a model;
    so this one refers to it weakly, and it lives as long as the compiled function.

    Attributes:
        environments: those that the backend was called in during a trace.
    """

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.__name__ = backend.__name__
        self.environments: list[ShapeEnv] = []
        self._backend = weakref.ref(backend)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        backend = self._backend()
        assert backend is not None
        fake_mode = TracingContext.get().fake_mode
        assert fake_mode is not None
        assert fake_mode.shape_env is not None
        self.environments.append(fake_mode.shape_env)
        return backend(gm, example_inputs)


class _BesideDDP(CatchErrorsWrapper):
    """What Python calls with a frame that has no code: as Dynamo has it, without the DistributedDataParallel that calls
    the model, which would have graphs end at its buckets of gradients. A step is one graph. The option is the
    process's, so only the thread that holds Dynamo's lock may change it."""

    def __call__(self, *args: Any) -> Any:
        with one_at_a_time(), replaced(torch._dynamo.config, "optimize_ddp", False):
            return super().__call__(*args)


class _Trace:
    """What Dynamo calls, inside of its lock, with a frame that it has no code for."""

    def __init__(self, convert: Callable[..., Any], backend: _Backend, traced_in: Context) -> None:
        self._torchdynamo_orig_backend = convert
        self._backend = backend
        self._traced_in = traced_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._traced_in():
            try:
                return self._torchdynamo_orig_backend(*args, **kwargs)
            finally:
                # Plans keep an environment. Its list of inputs, which guards are made from, would be a cycle through
                # sizes of tensors that Python's collector does not see.
                while self._backend.environments:
                    self._backend.environments.pop().tracked_fakes = None


class _Functions(str):
    """Functions, as Dynamo's option takes them; a string to what logs the options as JSON (torch 2.11 sorts sets)."""

    functions: frozenset[Any]

    def __new__(cls, functions: frozenset[Any]) -> _Functions:
        self = super().__new__(cls, f"{len(functions)} functions")
        self.functions = functions
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(self.functions)

    def __contains__(self, function: object) -> bool:
        return function in self.functions


@contextmanager
def tracing_options() -> Iterator[None]:
    """Options of Dynamo.

    Calls of `logging` loggers, which it cannot trace otherwise, are passed over: a compiled step would not log either.
    Not for traces of others, which may rely on the graph break. Fake tensors are computed, not cached: an entry costs
    more than it saves where sizes are symbols. Garbage is left to Python's collector, which looks for it anyway.

    Torch 2.14 refuses what depends on an intermediate tensor's `requires_grad_()`, which its own functionalization
    loses; what is made of Dynamo's graph here (`capture/retrace.py`) does not.
    """
    config = torch._dynamo.config
    # Its name in older versions is the second.
    ignored = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    silent = {getattr(Logger, name) for name in _LOGGING if hasattr(Logger, name)}
    functions = _Functions(frozenset(getattr(config, ignored)) | silent)
    with ExitStack() as stack:
        stack.enter_context(replaced(config, ignored, functions))
        stack.enter_context(replaced(config, "fake_tensor_cache_enabled", False))
        stack.enter_context(replaced(config, "run_gc_after_compile", False))
        if hasattr(output_graph.OutputGraph, _REQUIRES_GRAD):
            stack.enter_context(replaced(output_graph.OutputGraph, _REQUIRES_GRAD, lambda *_: None))
        yield


def _stacks() -> type[traceback.StackSummary]:
    """Stacks that have the lines of earlier ones, where those have been at the same place."""
    lines: dict[tuple[Any, ...], list[str]] = {}

    class Stack(traceback.StackSummary):
        @classmethod
        def from_list(cls, a_list: Iterable[Any]) -> Stack:
            return cls(traceback.StackSummary.from_list(list(a_list)))

        def format(self) -> list[str]:
            places = [_place(frame) for frame in self]
            if any(place[:3] == following[:3] for place, following in pairwise(places)):
                return super().format()  # which counts lines that are repeated
            for place, frame in zip(places, self, strict=True):
                if place not in lines:
                    lines[place] = traceback.format_list([frame])
            return [line for place in places for line in lines[place]]

    return Stack


def _place(frame: traceback.FrameSummary) -> tuple[Any, ...]:
    columns = (getattr(frame, name, None) for name in ("end_lineno", "colno", "end_colno"))
    return (frame.filename, frame.lineno, frame.name, *columns)


@contextmanager
def places_written_once() -> Iterator[None]:
    """A node's place in the source, a line of text for each call around it, is put together of lines that other nodes
    have. The names of functions, which a log alone has, are looked up where there is one."""
    known = ModuleType(traceback.__name__)
    vars(known).update(vars(traceback), StackSummary=_stacks())
    logs = (symbolic_convert.trace_call_log, symbolic_convert.trace_source_log)
    logged = any(log.isEnabledFor(DEBUG) for log in logs)
    with ExitStack() as stack:
        stack.enter_context(replaced(output_graph, "traceback", known))
        if not logged:
            stack.enter_context(replaced(symbolic_convert, "get_funcname", lambda filename, line: None))
        yield


@contextmanager
def fake_runs_by(run: Callable[[fx.Node, Any, Any, Callable[[], Any]], Any]) -> Iterator[None]:
    """Dynamo's runs of graph nodes on fake tensors go through `run(node, args, kwargs, call)`."""
    original = utils.run_node

    def run_node(tracer: Any, node: fx.Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
        return run(node, args, kwargs, lambda: original(tracer, node, args, kwargs, nnmodule))

    with replaced(utils, "run_node", run_node):
        yield
