"""One lowered program and the code that the inner backend makes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from cggr_compile.cuda_graphs import Replayed, obstacle_of
from cggr_compile.graph_memory import Pool
from cggr_compile.inner import Shared, compile_static
from cggr_compile.kernels_ahead import KernelsAhead
from cggr_compile.passes.lower_regions import lower_regions
from cggr_compile.passes.outline_layers import outline_layers
from cggr_compile.program import Program
from cggr_compile.sizes import symbols_of

# Distinct (batch, sequence, k) for which the inner backend keeps compiled code; the oldest is dropped beyond.
MAX_SPECIALIZATIONS = 64


class Variant:
    """One lowered program and its compiled code for each concrete (batch, sequence, k)."""

    def __init__(
        self,
        program: Program,
        inner: str,
        pool: Pool | None = None,
        outlined: bool = False,
        recompute: bool = False,
    ) -> None:
        self.inner = inner
        self.recompute = recompute
        self.pool = pool
        self.program = program
        self.outline = outline_layers(program) if outlined and inner != "eager" else None
        self.specialized: OrderedDict[tuple[int, ...], Callable[..., Any]] = OrderedDict()
        self.compilations = 0
        self._run = self.module if inner == "eager" and pool is None else self._specialized

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._run(*inputs)

    @cached_property
    def module(self) -> fx.GraphModule:
        """All of the program as one module: what runs, or is compiled, where it is not in pieces."""
        return lower_regions(self.program, checkpoints=self.inner == "eager")

    @property
    def _replayed(self) -> list[Replayed]:
        return [compiled for compiled in self.specialized.values() if isinstance(compiled, Replayed)]

    @property
    def _shared(self) -> list[Shared]:
        runs = (each.run if isinstance(each, Replayed) else each for each in self.specialized.values())
        return [run for run in runs if isinstance(run, Shared)]

    @property
    def pieces(self) -> int:
        """Pieces that outlined specialisations were divided into, for those that are kept."""
        return sum(shared.pieces for shared in self._shared)

    @property
    def bodies(self) -> int:
        """How many of those were compiled: the others are like them."""
        return sum(len(shared.compiled) for shared in self._shared)

    @property
    def recordings(self) -> int:
        """CUDA graphs recorded, for the specialisations that are kept."""
        return sum(compiled.recordings for compiled in self._replayed)

    @property
    def obstacles(self) -> list[str]:
        """Why specialisations could not be recorded."""
        return [compiled.obstacle for compiled in self._replayed if compiled.obstacle is not None]

    def _specialized(self, *inputs: Any) -> tuple[Any, ...]:
        key = (*(size for size in inputs if isinstance(size, int)), *_shapes(inputs))
        if key not in self.specialized:
            self.compilations += 1
            compiled = self._compile(inputs)
            if self.pool is not None:
                compiled = Replayed(compiled, self.pool, obstacle_of(self.program.graph))
            self.specialized[key] = compiled
            if len(self.specialized) > MAX_SPECIALIZATIONS:
                self.specialized.popitem(last=False)
        self.specialized.move_to_end(key)
        return tuple(self.specialized[key](*inputs))

    def _compile(self, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        kernels = KernelsAhead(self.program, inputs)
        if self.outline is None or self.outline.reason:
            compiled = compile_static(self.module, list(inputs), self.inner, self.recompute)
            kernels.wait()
            return compiled
        sizes = symbols_of(self.program, inputs)
        return Shared(self.program, self.outline.pieces, sizes, self.inner, self.recompute, kernels.wait)


def _shapes(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes of the inputs that are not parameters: those of the model cannot change."""
    return tuple(
        size
        for tensor in inputs
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter)
        for size in tensor.shape
    )
