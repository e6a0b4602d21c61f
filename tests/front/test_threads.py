"""Threads: what Dynamo is told for a routed trace is told to no other, and nothing of it stays."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo import utils
from torch._dynamo.exc import Unsupported
from torch.nn.parallel import DistributedDataParallel
from toys import Toy, toy_batch

import cggr_compile as cggr

log = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    def state() -> list[Any]:
        ddp = DistributedDataParallel._active_ddp_module
        return [torch._dynamo.config.get_config_copy(), utils.run_node, gc.isenabled(), ddp]

    before, interval = state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    assert state() == before


def optimized(seed: int = 0, inner: str = "eager") -> Toy:
    torch.manual_seed(seed)
    return cggr.optimize(Toy().train(), ratio=0.5, inner=inner)


def losses_of(model: Toy, seeds: range) -> list[float]:
    found = []
    for seed in seeds:
        loss = model(**toy_batch(8, seed=seed))[0]
        loss.backward()
        found.append(loss.item())
    return found


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    start = threading.Barrier(len(works))

    def at_once(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [each.result() for each in [pool.submit(at_once, work) for work in works]]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_two_threads_with_a_model_each(inner: str) -> None:
    models = [optimized(seed, inner) for seed in (0, 1)]
    alone = [losses_of(copy.deepcopy(model), range(20)) for model in models]
    assert in_threads([lambda model=model: losses_of(model, range(20)) for model in models]) == alone


def test_two_threads_on_one_model_take_turns() -> None:
    """From the first step on: one capture, and each call has the loss of its own batch."""
    model = optimized()
    alone = [losses_of(copy.deepcopy(model), seeds) for seeds in (range(15), range(15, 30))]
    assert in_threads([lambda seeds=seeds: losses_of(model, seeds) for seeds in (range(15), range(15, 30))]) == alone
    assert model.cggr.captures == 1


def test_what_another_thread_compiles_meanwhile_is_compiled_as_ever() -> None:
    """Its logger still breaks the graph, and its calls run on fake tensors by torch's own function."""
    original = utils.run_node
    seen: list[bool] = []

    def looks(gm: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        seen.append(utils.run_node is original and gc.isenabled())
        return gm.forward

    def talks(x: torch.Tensor) -> torch.Tensor:
        log.info("broken here")
        return x + 1

    def compiles() -> None:
        for number in range(12):
            torch.compile(eval(f"lambda x: x.sin() + {number}"), backend=looks)(torch.ones(3))
            with pytest.raises(Unsupported):
                torch.compile(lambda x: talks(x), backend="eager", fullgraph=True)(torch.ones(3))

    def captures() -> None:
        for seed in range(4):
            optimized(seed)(**toy_batch(8))

    in_threads([compiles, captures])
    assert len(seen) == 12
    assert all(seen)
