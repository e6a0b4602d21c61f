"""The short names by which torch prints dtypes in graphs."""

from __future__ import annotations

import torch
from torch.utils._dtype_abbrs import dtype_abbrs


def dtype_name(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`; the name itself where there is no shorter one."""
    return dtype_abbrs.get(dtype, str(dtype).removeprefix("torch."))
