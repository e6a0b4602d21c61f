"""The instance attribute `forward` of an optimised model, to wrappers and to `inspect` the original's bound method."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Routed(Protocol):
    """What the forward belongs to: a model's handle."""

    model: nn.Module

    def original(self) -> Callable[..., Any]:
        """The forward that was there before, bound to the model."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model's forward."""


class RoutedForward:
    """The instance attribute `forward` of an optimised model: to `inspect` and to wrappers the original's bound method.

    Wrappers take a method's function, wrap it, and bind the result; one that is taken off (Accelerate's
    `unwrap_model`) leaves the function bound, or this itself, which is the same.
    """

    def __init__(self, handle: Routed) -> None:
        self.handle = handle

    @property
    def __self__(self) -> nn.Module:
        return self.handle.model

    @property
    def __func__(self) -> Callable[..., Any]:
        return _RoutedFunction(self.handle)

    @property
    def __code__(self) -> types.CodeType:
        return inspect.unwrap(self.handle.original()).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.handle.original())

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.handle.original().__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            return _call_bound(*args, **kwargs)
        return self.handle.call(*args, **kwargs)


class _RoutedFunction:
    """`RoutedForward`, with the model as its first argument."""

    def __init__(self, handle: Routed) -> None:
        self.handle = handle

    @property
    def __signature__(self) -> inspect.Signature:
        bound = inspect.signature(self.handle.original())
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        return bound.replace(parameters=[itself, *bound.parameters.values()])

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.handle.original().__doc__

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call_bound(model, *args, **kwargs)


def _call_bound(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = vars(model)["cggr"]
    if is_routed(vars(model).get("forward")):  # a wrapper was taken off; a bound method cannot be copied or pickled
        vars(model)["forward"] = RoutedForward(handle)
    return handle.call(*args, **kwargs)


def is_routed(forward: Any) -> bool:
    """Whether a model's `forward` is the routed one, bound anew or not."""
    bound = getattr(forward, "__func__", None)
    return isinstance(forward, RoutedForward) or isinstance(bound, (_RoutedFunction, RoutedForward))
