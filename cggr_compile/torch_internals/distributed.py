"""The key-value store that the ranks of a distributed run share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def shared_store() -> tuple[Any, int] | None:
    """The store of the default process group and how many ranks there are, where there are several."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store(), dist.get_world_size()
