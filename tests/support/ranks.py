"""Two processes that train together over gloo, on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

RANKS = 2
IMPORTED = ("transformers.models.llama.modeling_llama", "torch._dynamo", "cggr_compile")
"""What a rank would wait for: the server that it is forked from has it."""


def on_two_ranks(worker: Callable[..., None], *args: Any) -> None:
    """`worker(rank, RANKS, *args)` in two processes; raises what one of them raised."""
    multiprocessing.set_forkserver_preload([*IMPORTED])
    torch.multiprocessing.start_processes(_run, (worker, args), nprocs=RANKS, start_method="forkserver")


_ended: list[dist.ProcessGroup] = []
"""Groups that are not destructed: a destructor, called with the GIL, waits for a thread of gloo's, which needs the GIL
to let go of the tensors of its last collective."""


@contextmanager
def process_group(rank: int, ranks: int, store: Path | str) -> Iterator[None]:
    """The ranks meet by a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    try:
        yield
    finally:
        _ended.extend(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()


def outcomes_of(run: Callable[..., None], checks: Sequence[str], folder: Path) -> dict[str, str]:
    """What came of checks that two processes make, one after the other: `run(rank, ranks, folder, checks)` writes what
    each found wrong to `outcomes.json` there."""
    on_two_ranks(run, str(folder), list(checks))
    return json.loads(Path(folder, "outcomes.json").read_text(encoding="utf-8"))


def found_wrong(check: Callable[[], None]) -> str:
    """What a check that every rank of the process group makes found wrong on rank 0, or else on the next."""
    try:
        check()
        own = ""
    except (AssertionError, RuntimeError) as error:
        own = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return next(filter(None, found), "")


def make_checks(rank: int, ranks: int, folder: Path, checks: Mapping[str, Callable[[], None]]) -> None:
    """Checks in one process group, one after the other; by each one's name what it found wrong is written, on rank 0 or
    else on the next."""
    torch.set_num_threads(1)
    with process_group(rank, ranks, folder / "store"):
        outcomes = {name: found_wrong(check) for name, check in checks.items()}
    if rank == 0:
        write_outcomes(folder, outcomes)


def write_outcomes(folder: Path, outcomes: Mapping[str, str]) -> None:
    """Where `outcomes_of` reads them."""
    Path(folder, "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


def _run(rank: int, worker: Callable[..., None], args: tuple[Any, ...]) -> None:
    worker(rank, RANKS, *args)
    os._exit(0)  # `_ended` has no end
