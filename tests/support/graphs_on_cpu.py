"""CUDA graphs on the CPU: what is recorded are calls of operators, and a replay runs them on the same memory again.

A graph may write to all memory of its pool that nobody used when it was recorded, for the allocator gives such memory
away. A replay here spoils all of it, whatever it is used for by then, so a step that relies on more than CUDA graphs
promise gives NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_compile.run import graph_memory
from cggr_compile.run.runtime import Runtime


class Block:
    """Memory of a pool for one dtype. It is in use while the storage of its owner's tensor is."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self.array = np.zeros(max(elements, 1) * dtype.itemsize, dtype=np.uint8)
        self.dtype = dtype
        self._owner: StorageWeakRef | None = None

    def give_out(self, elements: int) -> Tensor:
        """The owner's tensor, all of it."""
        whole = self.alias((elements,), (1,), 0)
        self._owner = StorageWeakRef(whole.untyped_storage())
        return whole

    def alias(self, size: Any, stride: Any, offset: int) -> Tensor:
        """A tensor in this memory, by a storage of its own."""
        return torch.from_numpy(self.array).view(self.dtype).as_strided(size, stride, offset)

    @property
    def in_use(self) -> bool:
        return self._owner is not None and not self._owner.expired()


@dataclass(frozen=True)
class Place:
    """Where in its pool a tensor is."""

    block: Block
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.block.alias(self.size, self.stride, self.offset)


class Pool:
    """Graphs that share memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}

    def place(self, x: Tensor) -> Place | Tensor:
        """Where the tensor is, itself if it is not in this pool."""
        block = self.blocks.get(x.untyped_storage().data_ptr())
        return x.detach() if block is None else Place(block, x.shape, x.stride(), x.storage_offset())


class Graph:
    """A stand-in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []
        self.blocks: list[Block] = []
        self.spared: set[Block] = set()

    def replay(self) -> None:
        for block in self.pool.blocks.values():
            if block not in self.spared and block not in self.blocks and block.dtype.is_floating_point:
                block.array[:] = 0xFF  # NaN in every floating dtype
        for function, given, places in self.calls:
            args, kwargs = pytree.tree_map_only(Place, Place.tensor, given)
            results = pytree.tree_leaves(function(*args, **kwargs))
            for place, result in zip(places, results, strict=True):
                if isinstance(place, Place):
                    place.tensor().copy_(result)


class Stream:
    """A stand-in for `torch.cuda.Stream`."""

    def wait_stream(self, other: Stream) -> None:
        pass


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        pool = self.graph.pool
        given = pytree.tree_map_only(Tensor, pool.place, (args, kwargs or {}))
        results, structure = pytree.tree_flatten(function(*args, **(kwargs or {})))
        theirs = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        places: list[Any] = [None] * len(results)
        for index, result in enumerate(results):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in theirs:
                results[index] = self._allocated(result)
                places[index] = pool.place(results[index])
        self.graph.calls.append((function, given, places))
        return pytree.tree_unflatten(results, structure)

    def _allocated(self, x: Tensor) -> Tensor:
        elements = x.untyped_storage().nbytes() // x.itemsize
        block = Block(elements, x.dtype)
        whole = block.give_out(elements)
        self.graph.pool.blocks[whole.untyped_storage().data_ptr()] = block
        self.graph.blocks.append(block)
        whole.copy_(x.as_strided(whole.shape, (1,), 0))
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `put_graphs_on_cpu`, while a test runs."""
    put_graphs_on_cpu(monkeypatch)


def put_graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.cuda that `cuda_graphs` and `graph_memory` use, on the CPU; models there are recorded."""
    with torch.device("cpu"):
        torch.zeros(0)  # torch notes once, under a device, which functions make tensors: not the one put in below
    pools: list[Pool] = []

    def handle() -> Pool:
        pools.append(Pool())
        return pools[-1]

    @contextlib.contextmanager
    def record(graph: Graph, pool: Pool) -> Iterator[None]:
        graph.pool = pool
        graph.spared = {block for block in pool.blocks.values() if block.in_use}
        with _Recorder(graph):
            yield

    stream, zeros = Stream(), torch.zeros
    for name, stand_in in {
        "graph_pool_handle": handle,
        "CUDAGraph": Graph,
        "graph": record,
        "Stream": Stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "mem_get_info": lambda: (2**34, 2**34),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    monkeypatch.setattr("cggr_compile.run.cuda_graphs._unrecordable", lambda inputs: None)

    def graphs_on(runtime: Runtime, device: torch.device) -> graph_memory.Pool | None:
        if runtime.config.cuda_graphs and runtime.pool is None:
            runtime.pool = graph_memory.Pool()
        return runtime.pool

    monkeypatch.setattr(Runtime, "graphs_on", graphs_on)
