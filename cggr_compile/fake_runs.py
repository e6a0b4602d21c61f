"""Dynamo's fake runs of calls that are alike, done once.

Dynamo runs every call of the model on fake tensors to know what it gives. Where sizes are symbols that is most of the
time of a capture, and the layers of a stack call the same functions on values of the same description. A call that
computes a new tensor, and nothing else, gives a new one of the same description when it comes again: this module makes
that one, with memory of its own, without running the call. The graph is recorded by Dynamo as ever; views, mutations,
calls on numbers that the trace knows, that give anything but one tensor, or that read sizes from data run each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from cggr_compile import compat
from cggr_compile.alike import described, is_torchs, modes_of, pattern_of, values_of


@dataclass(frozen=True)
class _New:
    """The description of a tensor that a call computed."""

    shape: torch.Size
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class FakeRuns:
    """The fake runs of a trace; `saved` counts the calls that were not run."""

    def __init__(self) -> None:
        self.saved = 0
        self._known: WeakKeyDictionary[FakeTensorMode, dict[Any, _New | None]] = WeakKeyDictionary()

    def run(self, node: fx.Node, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """What `call()`, the call of a node with these arguments, gives."""
        values = values_of((args, kwargs)) if _is_plain(node) else None
        tensors = [x for x in values or [] if isinstance(x, FakeTensor)]
        if not tensors or any(x.constant is not None for x in tensors) or compat.transforms_are_active():
            return call()
        mode = tensors[0].fake_mode
        known = self._known.setdefault(mode, {})
        key = (node.target, modes_of(tensors), pattern_of(map(id, tensors)), described((args, kwargs)))
        new = known.get(key)
        if new is not None:
            self.saved += 1
            return compat.new_fake(mode, new.shape, new.stride, new.dtype, new.device, new.requires_grad)
        versions = [x._version for x in tensors]
        result = call()
        if key not in known:
            pure = versions == [x._version for x in tensors] and _is_new(result, tensors)
            known[key] = (
                _New(result.shape, result.stride(), result.dtype, result.device, result.requires_grad) if pure else None
            )
        return result


def _is_plain(node: fx.Node) -> bool:
    return node.op == "call_method" or (node.op == "call_function" and is_torchs(node.target))


def _is_new(result: Any, arguments: list[FakeTensor]) -> bool:
    """Whether a result is like any that is computed: no argument or view of one, no leaf, no size from data, and its
    numbers are not known."""
    if type(result) is not FakeTensor or result.layout != torch.strided or result.storage_offset() != 0:
        return False
    if result.constant is not None or result.is_conj() or result.is_neg() or result.is_inference():
        return False
    if result.requires_grad and (result.is_leaf or not torch.is_grad_enabled()):
        return False
    own = StorageWeakRef(result.untyped_storage())
    return own not in {StorageWeakRef(x.untyped_storage()) for x in arguments} and not compat.data_symbols(result)
