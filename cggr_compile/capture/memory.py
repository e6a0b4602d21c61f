"""The memory that tensors of a trace lie in, to tell which of them are views of each other."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Memory: TypeAlias = StorageWeakRef | None


def memory_of(x: torch.Tensor) -> Memory:
    """A tensor's storage; None where its layout has none of its own, as a sparse one has."""
    return StorageWeakRef(x.untyped_storage()) if x.layout == torch.strided else None
