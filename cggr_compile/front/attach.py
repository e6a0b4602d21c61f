"""Plain training loops: counting optimiser steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cggr_compile.errors import CannotOptimize, warn
from cggr_compile.front.api import handle
from cggr_compile.values import ConfigError

_ATTACHED: WeakKeyDictionary[nn.Module, Callable[[], torch.optim.Optimizer | None]] = WeakKeyDictionary()
"""The optimiser that each model was attached to last."""


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int | None = None) -> RemovableHandle:
    """Counts every `optimizer.step()` as a step of the routed model; returns what removes the hook again.

    `total_steps` is how many there will be, which a share of all steps (`depth_until=0.5`) is of.

    A model that is optimised anew goes on being counted, one that is restored does not; a second call with the same
    model and optimiser, or with one that steps a parameter of the first's (for a second phase), takes the place of the
    first. Steps that a gradient scaler skips do not count, since the optimiser does not step. `optimizer` may be
    Accelerate's wrapper; of several optimisers attach one. `CGGRCallback` counts by itself and does not need this.

    Raises:
        ConfigError: another optimiser, of other parameters, is attached: both would count a step of the loop.
        CannotOptimize: the model is not optimised (call `cggr.optimize` first).
        TypeError: `optimizer` is not a torch optimiser.
        ValueError: `total_steps` is no positive int.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    found = handle(model)
    routed = found.model
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise ValueError(f"total_steps={total_steps!r} is not a positive integer; give how many steps there will be")
    own = optimizer
    # Accelerate's wrapper is an optimiser in name; the one inside takes the steps and runs the hooks.
    while isinstance(getattr(own, "optimizer", None), torch.optim.Optimizer):
        own = own.optimizer
    _warn_of_others(model, own)
    before = _ATTACHED.get(routed, lambda: None)()
    if before is not None:
        if _counts(before, routed) and not _parameters(before) & _parameters(own):
            raise ConfigError(
                f"{_named(before)} counts the steps of {type(model).__name__} already, and {_named(own)} beside it "
                "would count each step of a loop twice; attach one of several optimizers, or, where one follows "
                "the other, first call remove() on what attach returned"
            )
        for key in _counts(before, routed):
            del before._optimizer_step_post_hooks[key]
    if total_steps is not None:
        found.runtime.tell_total(total_steps)
    found.runtime.attach()
    _ATTACHED[routed] = found.runtime.optimizer = weakref.ref(own)
    return own.register_step_post_hook(_Count(routed))


def _counts(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[int]:
    """The keys of an optimiser's hooks that count for a model."""
    hooks = optimizer._optimizer_step_post_hooks
    return [key for key, hook in hooks.items() if isinstance(hook, _Count) and hook.model is model]


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _named(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__name__} (of {len(_parameters(optimizer))} parameters)"


def _warn_of_others(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimiser may step copies of the parameters (ZeRO, master weights), so that it has none is no error."""
    if not _parameters(optimizer) & set(map(id, model.parameters())):
        warn(
            f"the optimizer has no parameter of {type(model).__name__}: if it is another model's, schedules of this "
            "one follow the wrong steps; attach the optimizer that steps this model"
        )


class _Count:
    """The hook; it finds the model's handle at each step, because `optimize` gives it another one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            found = handle(self.model)
        except CannotOptimize:  # restored since
            return
        found.step()
        if not (found.calls or found.runtime.runs):
            mode = "" if found.model.training else ": it is in eval mode, so call train() first"
            found.runtime.warn_once(
                "never called",
                f"the optimizer has stepped, and no training call with labels has reached "
                f"{type(found.model).__name__}{mode}; what does not is not routed",
            )
