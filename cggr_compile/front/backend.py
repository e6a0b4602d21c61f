"""The torch.compile backend that both front ends share.

`torch.compile(model, backend="cggr", options={...})` reaches `cggr` through the `torch_dynamo_backends` entry point,
also in a process that never imported the package; `cggr.optimize` compiles with a `Backend` of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cggr_compile.capture.capture import capture, token_ids_of
from cggr_compile.capture.same_step import same_step
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.front.guard import watch_compiled
from cggr_compile.ir.program import Program, callers_region
from cggr_compile.run.inner import resolve_inner
from cggr_compile.run.plan import Plan
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.step import Step
from cggr_compile.torch_internals import dynamo, inductor
from cggr_compile.torch_internals.fsdp import is_sharded

aten = torch.ops.aten

_RUNTIMES: WeakKeyDictionary[nn.Module, dict[RoutingConfig, Runtime]] = WeakKeyDictionary()


class Backend:
    """Turns each training graph that Dynamo captures into a `Plan` of its runtime.

    Graphs that do not train (gradients disabled, `eval()`, no labels) go to the inner backend as they are; why is kept
    in `runtime.passive`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.__name__ = "cggr"

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if resolve_inner(self.runtime.config.inner, _device_of(example_inputs)) == "inductor":
            inductor.start_inductor_workers()
        reason = _passive_reason()
        if reason is None:
            _refuse_subclasses(gm, example_inputs)
            program = capture(gm, example_inputs)
            if self.runtime.sharded is not None:
                shards = self.runtime.sharded.described(example_inputs, program.inputs)
                program = dataclasses.replace(program, shards=shards)
            reason = _no_loss_wanted(program)
        if reason is not None:
            self.runtime.passive.append(reason)
            return _unchanged(gm, example_inputs, self.runtime.config.inner)
        if not isinstance(program.batch, torch.SymInt) and program.batch != 1:
            raise CannotOptimize(
                f"the model fixes the batch size to {program.batch} while it is traced",
                hint="remove the branch on the batch size from the model's forward",
            )
        return Step(self._plan(program), self.runtime)

    def _plan(self, program: Program) -> Plan:
        """The plan of an earlier capture that was the same step under the same autocast, or a new one."""
        for plan in self.runtime.plans:
            same_modes = plan.autocast == callers_region(plan.device.type)
            if same_modes and not plan.guarded and same_step(plan.captured, program):
                return plan
        self.runtime.plans.append(Plan(program, self.runtime))
        return self.runtime.plans[-1]


def cggr(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The registered backend `"cggr"`.

    Args:
        gm: Dynamo's graph.
        example_inputs: its real inputs.
        options: fields of `RoutingConfig`, given as `torch.compile(..., options=...)`.
        mode: must be None; modes belong to the inner backend, named by the option `inner`.

    Raises:
        ConfigError: an option is unknown or has a bad value.

    A graph that cannot be routed raises `CannotOptimize` when it is called, unless `fallback="eager"`.
    """
    if mode is not None:
        raise CannotOptimize(
            f"mode={mode!r} is not an option of the backend", hint="choose a backend with options={'inner': …}"
        )
    model = dynamo.captured_module()
    dynamo.keep_to_modes()
    runtime = _runtime(model, RoutingConfig.from_options(options or {}))
    try:
        if model is None or not is_sharded(model):
            return Backend(runtime)(gm, example_inputs)
        refusal = CannotOptimize(
            "FSDP2 (fully_shard) gathers parameters in hooks, at which Dynamo's graph ends",
            hint="use cggr.optimize(model), before fully_shard or after it",
        )
    except CannotOptimize as error:
        refusal = _of_a_part(error) if token_ids_of(dict(enumerate(_tensors(example_inputs)))) is None else error
    if runtime.config.fallback == "raise":
        return _Refusal(refusal)
    runtime.refuse(refusal)
    return _unchanged(gm, example_inputs, runtime.config.inner)


def _of_a_part(error: CannotOptimize) -> CannotOptimize:
    """The refusal of a graph without token ids: where Dynamo gave up the model's forward as a whole, it captures the
    functions that the forward calls."""
    broken = dynamo.last_graph_break()
    if broken is None:
        also = "if they were, Dynamo captured a part of the model, as under gradient checkpointing: use cggr.optimize"
        return CannotOptimize(error.reason, hint=f"{error.hint}; {also}")
    return CannotOptimize(
        f"Dynamo captured a part of the model only; its last graph break was: {broken}",
        hint="use cggr.optimize(model), which removes the known causes and names the line of others",
    )


class _Refusal:
    """Stands for a graph that cannot be routed, and raises why at each call.

    An error of the backend itself would reach the user wrapped by Dynamo, or, with suppressed errors, not at all; and
    where the graph ends at a graph break, Dynamo would trace on and fail by itself.
    """

    def __init__(self, error: CannotOptimize) -> None:
        self.error = error

    def __call__(self, *inputs: Any) -> Any:
        raise copy.copy(self.error)


def _runtime(model: nn.Module | None, config: RoutingConfig) -> Runtime:
    """One runtime for each (model, config), whatever the number of captures."""
    if model is None:
        return Runtime(config)
    if model not in _RUNTIMES:
        watch_compiled(model, runtimes_of)
    runtime = _RUNTIMES.setdefault(model, {}).setdefault(config, Runtime(config))
    runtime.belongs_to(model)
    return runtime


def runtimes_of(model: nn.Module) -> list[Runtime]:
    """The runtimes of a model that was compiled with `backend="cggr"`, oldest first."""
    return list(_RUNTIMES.get(getattr(model, "_orig_mod", model), {}).values())


def _passive_reason() -> str | None:
    if not torch.is_grad_enabled():
        return "gradients are disabled"
    return "the model is in eval mode" if dynamo.is_in_eval_mode() else None


def _no_loss_wanted(program: Program) -> str | None:
    if program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        return None
    if any(entry.path == "labels" for entry in program.inputs):
        return None
    return "no labels were passed"


def _refuse_subclasses(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
    """Raises `CannotOptimize` for tensors that are made of others (quantised weights, shards): what computes with them
    is not in Dynamo's graph."""
    for node, example in zip(gm.graph.find_nodes(op="placeholder", sort=True), example_inputs, strict=True):
        if is_traceable_wrapper_subclass(example):
            source = dynamo.source_name(node._dynamo_source)
            members = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
            raise CannotOptimize(
                f"{'.'.join(members) or 'an input'} is a {type(example).__name__}, a tensor made of others",
                hint="train on plain weights (bitsandbytes' are), or pass fallback='eager' to train without routing",
            )


def _unchanged(gm: fx.GraphModule, example_inputs: list[Any], inner: str) -> Callable[..., Any]:
    return torch._dynamo.lookup_backend(resolve_inner(inner, _device_of(example_inputs)))(gm, example_inputs)


def _device_of(example_inputs: list[Any]) -> torch.device:
    return next((x.device for x in _tensors(example_inputs)), torch.device("cpu"))


def _tensors(example_inputs: list[Any]) -> list[torch.Tensor]:
    return [x for x in example_inputs if isinstance(x, torch.Tensor)]
