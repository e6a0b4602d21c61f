"""When two calls are alike: what the outcome of a call on fake tensors depends on."""

from __future__ import annotations

from typing import Any

import torch

from cggr_compile.ir.program import callers_region, describe
from cggr_compile.torch_internals.fake_tensors import FakeTensor

_CONSTANTS = (
    *(int, float, bool, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def is_torchs(target: Any) -> bool:
    """Whether a function has no state that two calls of it could differ by."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    module = getattr(target, "__module__", None) or ("torch" if hasattr(torch, getattr(target, "__name__", "")) else "")
    return module.partition(".")[0] in ("torch", "_operator")


def values_of(item: Any) -> list[Any] | None:
    """The tensors and symbolic numbers among arguments, in order; None where there is something that has no description
    or may differ without it."""
    if isinstance(item, FakeTensor):
        return [item]
    if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return [item]
    if isinstance(item, _CONSTANTS):
        return []
    if isinstance(item, slice):
        item = (item.start, item.stop, item.step)
    if isinstance(item, dict):
        item = tuple(item.values())
    if not isinstance(item, (tuple, list)):
        return None
    found: list[Any] = []
    for part in item:
        values = values_of(part)
        if values is None:
            return None
        found += values
    return found


def described(item: Any) -> Any:
    """`describe`, telling apart all that may end up in a node or its value."""
    if isinstance(item, torch.Tensor):
        more = (item.layout, item.is_conj(), item.is_neg(), item.is_inference())
        return (describe(item), describe(item.storage_offset()), more)
    if isinstance(item, slice):
        return (slice, described(item.start), described(item.stop), described(item.step))
    if isinstance(item, (tuple, list)):
        return (type(item), *map(described, item))
    if isinstance(item, dict):
        return tuple((name, described(part)) for name, part in item.items())
    if isinstance(item, (float, complex)):
        return (type(item), repr(item))  # the zeros of either sign are equal
    return describe(item)


def modes_of(values: list[Any]) -> Any:
    """The modes that decide what a call gives."""
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return (torch.is_grad_enabled(), *map(callers_region, sorted(devices)))


def pattern_of(items: Any) -> tuple[int, ...]:
    """Which items are the same, whatever they are."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(item, place) for place, item in enumerate(items))
