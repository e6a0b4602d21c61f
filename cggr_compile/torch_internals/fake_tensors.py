"""Private corners of fake tensors: copies, new ones and views of given sizes, with their autograd state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import snapshot_fake
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensor", "FakeTensorMode", "NewFakes", "copy_of_fake", "view_of_fake"]


class _Computed(torch.autograd.Function):
    """What `make()` gives, as a result that requires grad."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a trace has no backward")


_LEAF = torch.empty(0, requires_grad=True)


def copy_of_fake(value: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A fake tensor like `value`, with its storage; where it requires grad, not a leaf, as results are (gradients must
    be enabled then: to enable them would be traced)."""
    return _Computed.apply(_LEAF, partial(snapshot_fake, value)) if requires_grad else snapshot_fake(value)


class NewFakes:
    """Fake tensors of one description, the storage of each, of so many elements, its own; where they require grad, they
    are no leaves, as results are."""

    def __init__(
        self,
        elements: Any,
        shape: Sequence[Any],
        stride: Sequence[Any],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
    ) -> None:
        with (
            no_dispatch()
        ):  # from shape and strides alone, torch would work out how long a storage is, symbol by symbol
            self._meta = torch.empty((elements,), dtype=dtype, device="meta").as_strided(shape, stride)
        self._device = device
        self._requires_grad = requires_grad

    def another(self, mode: FakeTensorMode) -> torch.Tensor:
        """One more of them."""
        make = partial(self._make, mode)
        return _Computed.apply(_LEAF, make) if self._requires_grad else make()

    def _make(self, mode: FakeTensorMode) -> torch.Tensor:
        with no_dispatch():  # a lazy clone takes over the sizes as they are; others compute with the symbols
            return FakeTensor(mode, torch._lazy_clone(self._meta), self._device)


class _ByStrides(TorchDispatchMode):
    """Makes a view of a fake tensor on its meta tensor. What runs in Python for a fake one otherwise checks sizes that
    are known to fit, and takes ten times as long."""

    def __init__(self, *geometry: Any) -> None:
        super().__init__()
        self.geometry = geometry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.alias.default:
            return func(*args, **(kwargs or {}))
        source = args[0]
        with in_kernel_invocation_manager(source.fake_mode):
            view = source.as_strided(*self.geometry)
        return FakeTensor(source.fake_mode, view, source.fake_device)


def view_of_fake(source: torch.Tensor, shape: Sequence[Any], stride: Sequence[Any], offset: Any) -> torch.Tensor:
    """The view of a fake tensor with these sizes, which must fit its memory."""
    with _ByStrides(shape, stride, offset):
        return torch.ops.aten.alias(source)  # to autograd any view is alike; this one's backward keeps no sizes
