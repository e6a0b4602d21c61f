"""Gathering over ranks: the parameters of an FSDP2 unit, whose gradients are scattered, and the rows of a batch.

A rank holds of each parameter [rows, ...] the rows that `torch.chunk` would give it, so the first ranks hold
ceil(rows / ranks) and the last may hold fewer, or none; on its way each shard is padded to that many. The gradient is
the sum over ranks, divided by `divisor`, in `reduce_dtype`, and each rank gets that of its rows: what FSDP2 computes.

All functions are plain torch and functional collectives, which compilers see through. What is written between a
`start_gather` and its `finish_gather` runs while the parameters arrive, and its backward while their gradients do: the
backward of `finish_gather` sends them, that of `start_gather`, which comes when the backward has come so far, waits.
Rows (`start_rows`, `finish_rows`) have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed.tensor  # registers what functional collectives give on fake tensors
import torch.nn.functional as F
from torch import Tensor

_collectives = torch.ops._c10d_functional


class Gathering(NamedTuple):
    """How the parameters of a unit are gathered: `rows[i]` is how many the i-th has on all ranks together, `trained[i]`
    whether it can have a gradient; they arrive in `dtype`. `group` is the name of the ranks' process group."""

    rows: tuple[int, ...]
    trained: tuple[bool, ...]
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    divisor: float
    ranks: int
    group: str

    def chunk(self, place: int) -> int:
        """Rows of a parameter that travel to or from each rank."""
        return -(-self.rows[place] // self.ranks)

    def with_gradients(self, shards: Sequence[Tensor]) -> list[int]:
        """The places of the parameters that have gradients."""
        return [place for place, shard in enumerate(shards) if shard.requires_grad and self.trained[place]]

    def sizes(self, shards: Sequence[Tensor], places: Sequence[int]) -> list[int]:
        """Elements of parameters that travel to or from each rank."""
        return [self.chunk(place) * shards[place].shape[1:].numel() for place in places]


def start_gather(shards: Sequence[Tensor], how: Gathering) -> tuple[Tensor, Tensor]:
    """The flat buffer [ranks · n] in `how.dtype` that the shards of all ranks arrive in, and a stand-in [m] for the
    shards' gradients in `how.reduce_dtype`: what `finish_gather` is given."""
    return _Start.apply(how, *shards)


def finish_gather(started: tuple[Tensor, Tensor], shards: Sequence[Tensor], how: Gathering) -> tuple[Tensor, ...]:
    """The parameters [rows, ...] once they have arrived. Their gradients become the shards', in the shards' dtype;
    shards that require none take no part in that."""
    return _Finish.apply(*started, tuple(shards), how)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Gathering, *shards: Tensor) -> tuple[Tensor, Tensor]:
        places = how.with_gradients(shards)
        ctx.sizes, ctx.count = how.sizes(shards, places), len(shards)
        ctx.trained = [(place, shards[place].shape, shards[place].dtype) for place in places]
        own = [_padded(shard.to(how.dtype), how.chunk(place)) for place, shard in enumerate(shards)]
        gathered = _collectives.all_gather_into_tensor(torch.cat(own), how.ranks, how.group)
        ctx.mark_non_differentiable(gathered)
        return gathered, torch.zeros((), dtype=how.reduce_dtype, device=gathered.device).expand(sum(ctx.sizes))

    @staticmethod
    def backward(ctx: Any, _: None, reduced: Tensor) -> tuple[Any, ...]:
        found: list[Tensor | None] = [None] * ctx.count
        parts = _collectives.wait_tensor(reduced).split(ctx.sizes)
        for (place, shape, dtype), part in zip(ctx.trained, parts, strict=True):
            found[place] = part[: math.prod(shape)].view(shape).to(dtype)
        return None, *found


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gathered: Tensor, stand_in: Tensor, shards: tuple[Tensor, ...], how: Gathering
    ) -> tuple[Tensor, ...]:
        ctx.how, ctx.places = how, how.with_gradients(shards)
        arrived = _collectives.wait_tensor(gathered).view(how.ranks, -1)
        # A copy each: what several ranks hold lies apart, and what one holds is the buffer itself.
        parts = arrived.split(how.sizes(shards, range(len(shards))), dim=1)
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        shapes = zip(copies, shards, how.rows, strict=True)
        parameters = tuple(copy.view(-1, *shard.shape[1:])[:size] for copy, shard, size in shapes)
        ctx.mark_non_differentiable(*(x for place, x in enumerate(parameters) if place not in ctx.places))
        return parameters

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        how = ctx.how
        flat = [
            _padded(gradients[place].to(how.reduce_dtype), how.ranks * how.chunk(place)).view(how.ranks, -1)
            for place in ctx.places
        ]
        sent = (torch.cat(flat, dim=1) / how.divisor).view(-1)
        return None, _collectives.reduce_scatter_tensor(sent, "sum", how.ranks, how.group), None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    """The rows of `x` and as many rows of zeros as are missing, flat."""
    flat = x.reshape(-1)
    missing = (rows - x.shape[0]) * x.shape[1:].numel()
    return F.pad(flat, (0, missing)) if missing else flat


class Rows(NamedTuple):
    """How the rows of all ranks are gathered: `dims[i]` is the dimension of the i-th tensor that they lie along, of one
    size on every rank; `group` is the name of the process group of the `ranks`."""

    dims: tuple[int, ...]
    ranks: int
    group: str


def start_rows(tensors: Sequence[Tensor], how: Rows) -> tuple[Tensor, ...]:
    """For each dtype a buffer [ranks · B, n] that the tensors of all ranks arrive in, a row of the batch in a row, rank
    behind rank: what `finish_rows` is given. None of them may require a gradient."""
    flat = (torch.cat([rows for _, rows in group], 1) for group in _by_dtype(tensors, how))
    return tuple(_collectives.all_gather_into_tensor(rows, how.ranks, how.group) for rows in flat)


def finish_rows(started: Sequence[Tensor], tensors: Sequence[Tensor], how: Rows) -> tuple[Tensor, ...]:
    """The tensors with the rows of all ranks along their dimension, ranks · B."""
    found = list(tensors)
    for buffer, group in zip(started, _by_dtype(tensors, how), strict=True):
        parts = _collectives.wait_tensor(buffer).split([rows.shape[1] for _, rows in group], dim=1)
        for (place, _), part in zip(group, parts, strict=True):
            dim, own = how.dims[place], tensors[place]
            whole = part.reshape(part.shape[0], *own.movedim(dim, 0).shape[1:]).movedim(0, dim)
            found[place] = whole.to(own.dtype)
    return tuple(found)


def _by_dtype(tensors: Sequence[Tensor], how: Rows) -> list[list[tuple[int, Tensor]]]:
    """The tensors as rows [B, n], each with its place, those of a dtype together; booleans are sent as bytes."""
    found: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for place, (tensor, dim) in enumerate(zip(tensors, how.dims, strict=True)):
        rows = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
        rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        found.setdefault(rows.dtype, []).append((place, rows))
    return list(found.values())
