"""Compiles the kernels of this package's operators before they are needed, side by side.

A kernel is compiled for the dtypes, the constants and the divisibilities of its arguments. The operators that launch it
know them from shapes alone, so each is run on fake tensors: it allocates nothing, and its launches compile
(`launch.launch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from cggr_compile.kernels.triton import ops
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import AsyncCompileMode

MOST_THREADS = 8

_NAMESPACE = ops.score._namespace
_IMPLEMENTATIONS = {op._opoverload: op._init_fn for op in OPDEFS.values() if op._namespace == _NAMESPACE}


class _LaunchingOperators(TorchDispatchMode):
    """Runs implementations of this package's operators where a fake tensor would run their fakes."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IMPLEMENTATIONS:
            with self:  # a mode is off while it handles an operator, and implementations call others
                return _IMPLEMENTATIONS[func](*args, **kwargs)
        # An `out` is the result already, and torch's fakes would write there.
        return kwargs["out"] if "out" in kwargs else func(*args, **kwargs)


def compile_kernels(calls: Iterable[Callable[[], Any]], device: torch.device) -> None:
    """Compiles every kernel that the calls launch. A call makes its tensors on `device` itself; it runs under a
    `FakeTensorMode`, so that they are fake.

    Kernels are not loaded here: two threads that load launchers can get each other's (Triton gives all of them one
    module's name), and would call kernels with arguments of others.
    """
    index = -1 if device.index is None else device.index
    with (
        ThreadPoolExecutor(MOST_THREADS, "cggr-kernels") as threads,
        torch.cuda.device(index),
        AsyncCompileMode(threads),
        FakeTensorMode(),
        _LaunchingOperators(),
    ):
        for call in calls:
            call()
