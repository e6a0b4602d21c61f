"""One lowered program and the code that the inner backend makes of it.

Steps differ in their sizes: the batch, the sequence, what is kept of them. The first sizes are compiled as numbers,
which is the best code there is, and all that a loop over batches of one shape needs. When others come the program is
compiled once more, with symbols (`symbolic`), and that code serves all further sizes: a loop must not wait for the
compiler again. Symbols cost some speed, so sizes that come without others for as long as PATIENCE compilations take, of
steps that no schedule changes, get code of numbers after all. Where the assumptions of symbolic code do not hold (a
single row, a sequence shorter than a window), such sizes get code of that kind of their own.

Which inputs require a gradient decides what a backward computes, so code is of that too.
"""

from __future__ import annotations

from functools import cached_property, partial
from operator import eq
from time import monotonic
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import first_line, warn
from cggr_compile.ir.amounts import Sizes, Symbols
from cggr_compile.ir.program import Analysed
from cggr_compile.passes.lower.lower_regions import lower_regions
from cggr_compile.passes.lower.outline_layers import outline_layers
from cggr_compile.run.cuda_graphs import Replays, obstacle_of
from cggr_compile.run.graph_memory import Pool
from cggr_compile.run.inner import Shared, compile_static
from cggr_compile.run.kernels_ahead import KernelsAhead
from cggr_compile.run.symbolic import Code, SharedForMany, compile_symbolic

PATIENCE = 3
"""Waiting for the compiler is then at most a third of the time that symbolic code was good enough for."""


class Variant:
    """One lowered program and its compiled code."""

    def __init__(
        self,
        program: Analysed,
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
        self._codes: dict[tuple[bool, ...], list[Code]] = {}  # by which inputs require a gradient
        self.replays = None if pool is None else Replays(pool, obstacle_of(program.graph))
        self.settled = True  # whether no schedule changes the sizes of the steps that come
        self._symbols = Symbols(program)
        self._symbolic = True
        self._seconds = 0.0  # that a compilation takes
        self._kind: tuple[Any, ...] = ()  # of the last step
        self._since = 0.0  # when such steps began
        self._run = self.module if inner == "eager" and pool is None else self._compiled

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._run(*inputs)

    @cached_property
    def module(self) -> fx.GraphModule:
        """All of the program as one module: what runs, or is compiled, where it is not in pieces."""
        return lower_regions(self.program, checkpoints=self.inner == "eager")

    @property
    def codes(self) -> list[Code]:
        """All code that was compiled, in order for each set of inputs that require a gradient."""
        return [code for codes in self._codes.values() for code in codes]

    @property
    def compilations(self) -> int:
        """How often the inner backend compiled the program."""
        return len(self.codes)

    @property
    def _shared(self) -> list[Shared]:
        return [code.run for code in self.codes if isinstance(code.run, Shared)]

    @property
    def pieces(self) -> int:
        """Pieces that the program was divided into, for each time that it was compiled."""
        return sum(shared.pieces for shared in self._shared)

    @property
    def bodies(self) -> int:
        """How many of those were compiled: the others are like them."""
        return sum(len(shared.compiled) for shared in self._shared)

    def _compiled(self, *inputs: Any) -> tuple[Any, ...]:
        sizes, started = self._symbols.of(inputs), monotonic()
        trained = tuple(x.requires_grad for x in inputs if isinstance(x, torch.Tensor))
        kind = (trained, *sizes.values())
        if kind != self._kind:
            self._kind, self._since = kind, started
        codes = self._codes.setdefault(trained, [])
        before = len(codes)
        code = next((code for code in codes if code.serves(sizes)), None)
        if code is None:
            code = self._code(inputs, sizes, in_numbers=not codes)
            codes.append(code)
        elif code.symbolic and self.settled and started - self._since > PATIENCE * self._seconds:
            code = self._code(inputs, sizes, in_numbers=True)
            codes.insert(0, code)
        if self.replays is None:
            outputs = tuple(code.run(*inputs))
        else:
            outputs = self.replays.run((code.symbolic, *kind), code.run, inputs)
        if len(codes) > before:  # code in pieces is compiled by its first run
            self._seconds = max(self._seconds, monotonic() - started)
        return outputs

    def _code(self, inputs: tuple[Any, ...], sizes: Sizes, in_numbers: bool) -> Code:
        kernels = KernelsAhead(self.program, inputs, sizes)
        if isinstance(self.outline, tuple):
            kind = Shared if in_numbers else SharedForMany
            run = kind(self.program, self.outline, sizes, self.inner, self.recompute, kernels.wait)
            return Code(run, run.serves, symbolic=not in_numbers)
        code = self._compile_whole(inputs, sizes, in_numbers)
        kernels.wait()
        return code

    def _compile_whole(self, inputs: tuple[Any, ...], sizes: Sizes, in_numbers: bool) -> Code:
        if self._symbolic and not in_numbers:
            try:
                return compile_symbolic(self.module, self.program, inputs, sizes, self.inner, self.recompute)
            except RuntimeError as error:
                self._symbolic = False
                warn(
                    f"compiling every batch shape by itself: {self.inner} cannot compile this step for many: "
                    f"{first_line(error)}"
                )
        return Code(compile_static(self.module, inputs, self.inner, self.recompute), partial(eq, sizes))
