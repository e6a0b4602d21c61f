"""Dynamo's fake runs of calls that are alike, done once.

Dynamo runs every call of the model on fake tensors to know what it gives. Where sizes are symbols that is most of the
time of a capture, and the layers of a stack call the same functions on values of the same description. A call that
computes a new tensor, or a view of one argument, and does nothing else, gives one of the same description when it comes
again: this module makes that one, with memory of its own or the argument's, without running the call. The graph is
recorded by Dynamo as ever; mutations, calls on numbers that the trace knows, that give anything but one tensor, or that
read sizes from data run each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from cggr_compile.capture.alike import described, is_torchs, modes_of, pattern_of, values_of
from cggr_compile.capture.memory import memory_of
from cggr_compile.torch_internals import autograd, fake_tensors, symbols
from cggr_compile.torch_internals.fake_tensors import FakeTensor, FakeTensorMode, NewFakes


@dataclass(frozen=True)
class _New:
    """A tensor that a call computed."""

    alike: NewFakes

    def again(self, mode: FakeTensorMode, _: list[FakeTensor]) -> torch.Tensor:
        return self.alike.another(mode)


@dataclass(frozen=True)
class _View:
    """A view of a call's argument, the tensor at `place`."""

    place: int
    shape: torch.Size
    stride: tuple[Any, ...]
    offset: Any

    def again(self, _: FakeTensorMode, arguments: list[FakeTensor]) -> torch.Tensor:
        return fake_tensors.view_of_fake(arguments[self.place], self.shape, self.stride, self.offset)


class FakeRuns:
    """The fake runs of a trace; `saved` counts the calls that were not run."""

    def __init__(self) -> None:
        self.saved = 0
        self._known: WeakKeyDictionary[FakeTensorMode, dict[Any, _New | _View | None]] = WeakKeyDictionary()

    def run(self, node: fx.Node, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """What `call()`, the call of a node with these arguments, gives."""
        values = values_of((args, kwargs)) if _is_plain(node) else None
        tensors = [x for x in values or [] if isinstance(x, FakeTensor)]
        if not tensors or any(x.constant is not None for x in tensors) or autograd.transforms_are_active():
            return call()
        mode = tensors[0].fake_mode
        known = self._known.setdefault(mode, {})
        key = (node.target, modes_of(tensors), pattern_of(map(id, tensors)), described((args, kwargs)))
        alike = known.get(key)
        if alike is not None:
            self.saved += 1
            return alike.again(mode, tensors)
        versions = [x._version for x in tensors]
        result = call()
        if key not in known:
            unchanged = versions == [x._version for x in tensors]
            known[key] = _outcome(result, tensors) if unchanged else None
        return result


def _is_plain(node: fx.Node) -> bool:
    return node.op == "call_method" or (node.op == "call_function" and is_torchs(node.target))


def _outcome(result: Any, arguments: list[FakeTensor]) -> _New | _View | None:
    """How to make a tensor like the result of a call; None where it is more than a computed tensor or a view: an
    argument itself, a leaf, of sizes from data, or of numbers that are known."""
    if type(result) is not FakeTensor or result.layout != torch.strided or result.constant is not None:
        return None
    if result.is_conj() or result.is_neg() or result.is_inference() or symbols.data_symbols(result):
        return None
    if result.requires_grad and (result.is_leaf or not torch.is_grad_enabled()):
        return None
    storage = memory_of(result)
    sources = [place for place, x in enumerate(arguments) if memory_of(x) == storage]
    if not sources and result.storage_offset() == 0:
        elements = result.untyped_storage().nbytes() // result.itemsize
        description = (result.shape, result.stride(), result.dtype, result.device, result.requires_grad)
        return _New(NewFakes(elements, *description))
    if len(sources) == 1 and _is_view_of(result, arguments[sources[0]]):
        return _View(sources[0], result.shape, result.stride(), result.storage_offset())
    return None


def _is_view_of(result: FakeTensor, source: FakeTensor) -> bool:
    """Whether the result is to autograd what a view of the source by strides would be."""
    base = source._base if source._is_view() else source
    followed = source.requires_grad and torch.is_grad_enabled()
    alike = (result.dtype, result.device, result.requires_grad) == (source.dtype, source.device, followed)
    return alike and result is not source and result._is_view() and result._base is base
