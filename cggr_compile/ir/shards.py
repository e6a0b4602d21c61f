"""What a rank has of the parameters that FSDP2 shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers at once, those of one module that was given to `fully_shard`.

    `group` is the ranks' process group, by the name that functional collectives know it by; parameters arrive in
    `dtype`, gradients are summed in `reduce_dtype` and divided by `divisor`. Where the unit `reshards`, its parameters
    are not kept for the backward.
    """

    name: str
    group: str
    ranks: int
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    divisor: float
    reshards: bool


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a parameter: `rows` of those that the captured value has, in `dtype`."""

    unit: Unit
    rows: int
    dtype: torch.dtype
