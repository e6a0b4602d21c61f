"""Two processes that train together over gloo, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

RANKS = 2
IMPORTED = ("transformers.models.llama.modeling_llama", "torch._dynamo", "cggr_compile")
"""What a rank would wait for: the server that it is forked from has it."""


def on_two_ranks(worker: Callable[..., None], *args: Any) -> None:
    """`worker(rank, RANKS, *args)` in two processes; raises what one of them raised."""
    multiprocessing.set_forkserver_preload([*IMPORTED])
    torch.multiprocessing.start_processes(_run, (worker, args), nprocs=RANKS, start_method="forkserver")


def _run(rank: int, worker: Callable[..., None], args: tuple[Any, ...]) -> None:
    worker(rank, RANKS, *args)
    # Without destructors: that of a process group, called with the GIL, waits for a thread of gloo's, which needs the
    # GIL to let go of the tensors of its last collective.
    os._exit(0)
