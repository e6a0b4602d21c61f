"""Launches of kernels, or on fake tensors only their compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """`kernel[(programs,)](*args, **options)` on the device of the first argument, a tensor or a descriptor of one.

    On a fake tensor the kernel is compiled for these arguments and not launched; addresses count as aligned.
    """
    first = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
    with torch.cuda.device_of(first):
        if isinstance(first, FakeTensor):
            kernel.warmup(*map(_without_memory, args), grid=(programs,), **options)
        else:
            kernel[(programs,)](*args, **options)


def is_aligned(x: Tensor) -> bool:
    """Whether `x` starts at a multiple of 16 bytes, as descriptors need; a fake tensor counts as if it did."""
    return isinstance(x, FakeTensor) or x.data_ptr() % 16 == 0


def _without_memory(x: Any) -> Any:
    return MockTensor(x.dtype, x.shape) if isinstance(x, Tensor) else x
