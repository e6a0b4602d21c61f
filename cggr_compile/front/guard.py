"""Hooks on a routed model that refuse training steps which would pass the routing by, unnoticed.

Trainers and wrappers patch `forward` after `optimize` did. Most call what they found, as Accelerate's autocast does.
Some compute the loss themselves and call only the model's backbone (TRL's trainers), and `torch.nn.DataParallel` runs
replicas whose patched forward is still bound to the first model. A model compiled with `backend="cggr"` runs as it is
where Dynamo does not ask the backend: beyond its limit of captures, under a stance, with suppressed errors. None of
these fails by itself; the step is only not routed, or not computed with the replica's parameters.

A `torch.compile` around the model may trace a call of it, hooks and all, or make the call itself, as it does with one
that it is asked for directly. Traced hooks do nothing: what a graph does was decided when it was captured.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cggr_compile.capture.causes import recognised
from cggr_compile.errors import CannotOptimize
from cggr_compile.run.runtime import Runtime
from cggr_compile.torch_internals.dynamo import is_compiled_by_others, untraced_hook


class Watched(Protocol):
    """What is guarded: a model's handle."""

    model: nn.Module

    def reached(self) -> bool:
        """Whether a training call with labels reached the routed forward since this was asked last."""

    def labels_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The labels of a call."""

    def refuse(self, error: CannotOptimize) -> None:
        """Raises the error, or warns and goes on."""


class Guard:
    """An optimised model's two hooks; copied and pickled with the model."""

    def __init__(self, handle: Watched) -> None:
        self.handle = handle

    @untraced_hook
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `CannotOptimize` in a replica."""
        self.handle.reached()  # forgets calls of the routed forward that came by another way
        if getattr(module, "_is_replica", False):
            raise CannotOptimize(
                "a replica of torch.nn.DataParallel would run the first device's model",
                hint="use DistributedDataParallel (accelerate launch, torchrun), or make one device visible",
            )
        if module is not self.handle.model:
            raise CannotOptimize(
                "a shallow copy of an optimized model shares its forward and would run the original",
                hint="copy it by copy.deepcopy",
            )

    @untraced_hook
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises `CannotOptimize` where a training call with labels came back without the routed forward's part."""
        if self.handle.reached():
            return
        if not module.training or not torch.is_grad_enabled() or self.handle.labels_of(args, kwargs) is None:
            return
        code = getattr(inspect.unwrap(module.forward, stop=_is_not_accelerates), "__code__", None)
        error = CannotOptimize(
            "the forward of the optimized model was patched by one that computes training steps without it",
            source=f"{code.co_filename}:{code.co_firstlineno}: {code.co_name}" if code else None,
            hint="let the trainer use the model's own loss: of TRL's SFTTrainer by cggr.route(trainer, …)",
        )
        self.handle.refuse(recognised(error))


def _is_not_accelerates(forward: Any) -> bool:
    """Whether it is a function, and not Accelerate's, whose mixed precision wraps a forward."""
    code = getattr(forward, "__code__", None)
    return code is not None and "/accelerate/" not in code.co_filename.replace(os.sep, "/")


def watch(handle: Watched) -> tuple[RemovableHandle, RemovableHandle]:
    """Installs both hooks on the handle's model; returns what removes them."""
    guard = Guard(handle)
    return (
        handle.model.register_forward_pre_hook(guard.before, with_kwargs=True),
        handle.model.register_forward_hook(guard.after, with_kwargs=True),
    )


class CompiledGuard:
    """The two hooks of a model that `torch.compile` compiled with `backend="cggr"`.

    They say nothing of a call that no `torch.compile` has part in: the model itself is not patched. Nor does a copy of
    the model, which is not compiled until its own runtimes are there.
    """

    def __init__(self, runtimes_of: Callable[[nn.Module], list[Runtime]]) -> None:
        self.runtimes_of = runtimes_of
        self.seen = 0

    def _runs(self, module: nn.Module) -> int:
        return sum(map(attrgetter("runs"), self.runtimes_of(module)))

    @partial(untraced_hook, where=is_compiled_by_others)
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = self._runs(module)

    @partial(untraced_hook, where=is_compiled_by_others)
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises `CannotOptimize` where a training call with labels came back and no plan had run."""
        if not module.training or not torch.is_grad_enabled():
            return
        runtimes = self.runtimes_of(module)
        if runtimes and self._runs(module) == self.seen and _labels_of(module, args, kwargs) is not None:
            runtimes[-1].refuse(_passed_over())


def _labels_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)).get("labels", kwargs.get("labels"))


def _passed_over() -> CannotOptimize:
    return CannotOptimize(
        "torch.compile ran a training step without asking backend='cggr'",
        hint="it does beyond torch._dynamo.config.recompile_limit captures, under a stance, and with suppress_errors; "
        "cggr.optimize(model) has no such cases",
    )


def watch_compiled(model: nn.Module, runtimes_of: Callable[[nn.Module], list[Runtime]]) -> None:
    """Installs both hooks on a model at its first capture by `backend="cggr"`."""
    guard = CompiledGuard(runtimes_of)
    model.register_forward_pre_hook(guard.before, with_kwargs=True)
    model.register_forward_hook(guard.after, with_kwargs=True)
