"""Where the documents of packed sequences begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ir.documents import POSITIONS
from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import token_argument
from cggr_compile.run.arriving import Arriving

FEWEST = 8
MOST = 2**16 - 1
"""Documents of one launch of a kernel, which are a dimension of its grid."""


class Packing:
    """Reads the `position_ids` [B, S] among the inputs of an analysed program.

    How many documents there are decides a size of the step, so the host waits for that number. It is rounded up to one
    of four sizes to each doubling, so that code and CUDA graphs serve many batches.
    """

    def __init__(self, program: Analysed) -> None:
        positions = token_argument(program, POSITIONS)
        assert positions is not None
        self._positions = program.placeholders.index(positions)
        self._last = "no step yet"

    def added(self, inputs: Sequence[Any]) -> Tensor | None:
        """The input of `attend_documents`, int32 [N + 1]; None where there are too many documents."""
        positions = inputs[self._positions]
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff(dim=1) != 1
        begins = begins.flatten()
        count = int(Arriving(begins.sum()).there())
        step = max(FEWEST, 2 ** (count.bit_length() - 3))
        size = min(-(-count // step) * step, begins.numel())
        if size > MOST:
            self._last = f"attention under a mask in the last step, of more than {MOST} documents"
            return None
        self._last = f"attention within {count} documents in the last step"
        ends = torch.full((size + 1,), begins.numel(), dtype=torch.int32, device=positions.device)
        ends[:count] = torch.argsort(begins.logical_not(), stable=True)[:count]
        return ends

    def __str__(self) -> str:
        return self._last
