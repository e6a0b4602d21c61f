"""Gathering the parameters of an FSDP2 unit, and scattering their gradients: one collective each way.

A rank holds of each parameter [rows, ...] the rows that `torch.chunk` would give it, so the first ranks hold
ceil(rows / ranks) and the last may hold fewer, or none; on its way each shard is padded to that many. The gradient is
the sum over ranks, divided by `divisor`, in `reduce_dtype`, and each rank gets that of its rows: what FSDP2 computes.
Both functions are plain torch and functional collectives, which compilers see through: what is written between a
`start_gather` and its `finish_gather` runs while the parameters arrive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.tensor  # registers what functional collectives give on fake tensors
import torch.nn.functional as F
from torch import Tensor

_collectives = torch.ops._c10d_functional


def start_gather(shards: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype, ranks: int, group: str) -> Tensor:
    """The flat buffer [ranks · n] in `dtype` that the shards of all ranks arrive in; only `finish_gather` may read it.

    `rows[i]` is how many the i-th parameter has on all ranks together. Nothing is differentiated.
    """
    own = [_padded(shard.to(dtype), _chunk(size, ranks)) for shard, size in zip(shards, rows, strict=True)]
    return _collectives.all_gather_into_tensor(torch.cat(own), ranks, group)


def finish_gather(
    gathered: Tensor,
    shards: Sequence[Tensor],
    rows: Sequence[int],
    ranks: int,
    group: str,
    reduce_dtype: torch.dtype,
    divisor: float,
) -> tuple[Tensor, ...]:
    """The parameters [rows, ...] once they have arrived. Their gradients become the shards', in the shards' dtype;
    shards that require none take no part in that."""
    return _Gathered.apply(gathered, rows, ranks, group, reduce_dtype, divisor, *shards)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gathered: Tensor,
        rows: Sequence[int],
        ranks: int,
        group: str,
        reduce_dtype: torch.dtype,
        divisor: float,
        *shards: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a parameter that nothing reads has no gradient
        ctx.how = ranks, group, reduce_dtype, divisor
        ctx.shards = [(shard.shape, shard.dtype, size) for shard, size in zip(shards, rows, strict=True)]
        arrived = _collectives.wait_tensor(gathered).view(ranks, -1)
        sizes = [_chunk(size, ranks) * shard.shape[1:].numel() for shard, size in zip(shards, rows, strict=True)]
        # A copy each: what several ranks hold lies apart, and what one holds is the buffer itself.
        parts = [part.clone(memory_format=torch.contiguous_format) for part in arrived.split(sizes, dim=1)]
        parameters = tuple(
            part.view(-1, *shard.shape[1:])[:size] for part, shard, size in zip(parts, shards, rows, strict=True)
        )
        frozen = [each for each, shard in zip(parameters, shards, strict=True) if not shard.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return parameters

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ranks, group, reduce_dtype, divisor = ctx.how
        wanted = ctx.needs_input_grad[-len(ctx.shards) :]
        trained = [i for i, gradient in enumerate(gradients) if gradient is not None and wanted[i]]
        found: list[Tensor | None] = [None] * len(gradients)
        if trained:
            flat = []
            for i in trained:
                gradient, size = gradients[i], ctx.shards[i][2]
                assert gradient is not None
                flat.append(_padded(gradient.to(reduce_dtype), ranks * _chunk(size, ranks)).view(ranks, -1))
            sent = (torch.cat(flat, dim=1) / divisor).view(-1)
            reduced = _collectives.reduce_scatter_tensor(sent, "sum", ranks, group)
            parts = _collectives.wait_tensor(reduced).split([part.shape[1] for part in flat])
            for i, part in zip(trained, parts, strict=True):
                shape, dtype, _ = ctx.shards[i]
                found[i] = part[: math.prod(shape)].view(shape).to(dtype)
        return (None,) * 6 + tuple(found)


def _chunk(rows: int, ranks: int) -> int:
    return -(-rows // ranks)


def _padded(x: Tensor, rows: int) -> Tensor:
    """The rows of `x` and as many rows of zeros as are missing, flat."""
    flat = x.reshape(-1)
    missing = (rows - x.shape[0]) * x.shape[1:].numel()
    return F.pad(flat, (0, missing)) if missing else flat
