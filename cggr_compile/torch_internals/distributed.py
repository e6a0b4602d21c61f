"""The ranks of a distributed run, the key-value store that they share, and numbers that their hosts compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The ranks of the default process group: this one's number, how many there are, and the group's name."""

    rank: int
    count: int
    group: str


def all_ranks() -> Ranks | None:
    """The ranks, where there are several."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name)


def shared_store() -> tuple[Any, int] | None:
    """The store of the default process group and how many ranks there are, where there are several."""
    ranks = all_ranks()
    return None if ranks is None else (dist.distributed_c10d._get_default_store(), ranks.count)


class Hosts:
    """All ranks in a gloo group of their own, for numbers that never see a device; every rank makes it in one order."""

    def __init__(self) -> None:
        self._world, self._group = dist.group.WORLD, dist.new_group(backend="gloo")

    @property
    def are_current(self) -> bool:
        """Whether the default process group is the one that they were made in."""
        return self._world is dist.group.WORLD

    def extremes(self, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """The least and the largest of each number over the ranks; RuntimeError where one of them never comes."""
        extremes = torch.tensor([[-number for number in numbers], [*numbers]])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        return (-extremes[0]).tolist(), extremes[1].tolist()
