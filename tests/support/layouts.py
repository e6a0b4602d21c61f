"""Tensors of the same values in layouts that kernels must take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.dim() == 2 else x


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def misaligned(x: Tensor) -> Tensor:
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def rows_apart(x: Tensor) -> Tensor:
    return F.pad(x, (0, 3))[..., : x.shape[-1]]


LAYOUTS = (transposed, every_other, misaligned, rows_apart)
