"""`grouped_mlp` by grouped products of torch: pairs sorted by expert, one product a layer with all experts' tables.

The steps and their order are those of transformers' `grouped_mm` experts, so that where torch's products are the same,
so are results and gradients, bit for bit.

On CUDA they are `torch.nn.functional.grouped_mm`'s where that is a kernel: in bfloat16, for widths that fill lines of
16 bytes. Elsewhere it is a loop over the groups, which reads their sizes on the host and can be traced in bfloat16
alone; `cggr::grouped_mm` is the same loop for every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference.experts import ExpertArguments, activated, dropped
from torch import Tensor

LINE = 8
"""Numbers in bfloat16 in a line of 16 bytes."""


def grouped_mlp(*args: Any) -> Tensor:
    """`reference.grouped_mlp`, weighed in the wider of the dtypes of hidden and weights and added up along K."""
    arguments = ExpertArguments(*args)
    hidden, gate_up, down, weights, experts = arguments[:5]
    count, (_, choices) = gate_up.shape[0], experts.shape
    # Not a stable sort, whose order within an expert, and so that of sums over its tokens, may be another.
    expert, place = experts.masked_fill(dropped(arguments), count).reshape(-1).sort()
    none = (expert == count).unsqueeze(-1)
    ends = torch.searchsorted(expert, torch.arange(1, count + 1, device=expert.device), out_int32=True)

    def linear(rows: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        products = product(rows, table.transpose(1, 2), ends)
        if bias is not None:
            products = products + bias[expert.clamp(max=count - 1)]
        # What stands behind the last group is not written, here and in the gradients.
        return products.masked_fill(none, 0)

    rows = hidden[place // choices].masked_fill(none, 0)
    products = linear(rows, gate_up, arguments.gate_up_bias)
    results = linear(activated(products, arguments), down, arguments.down_bias)
    weighed = results * weights.reshape(-1)[place].unsqueeze(-1).masked_fill(none, 0)
    inverse = torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))
    return weighed[inverse].view(*experts.shape, hidden.shape[1]).sum(1).to(hidden.dtype)


def product(rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    """Rows [S, K] of group e, those before ends[e] (int32 [E]) and behind the group before, times tables[e] of
    [E, K, N]: [S, N]. What is behind the last group is anything."""
    whole_lines = rows.shape[1] % LINE == 0 and tables.shape[2] % LINE == 0
    if rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and whole_lines:
        return F.grouped_mm(rows, tables, offs=ends)
    return torch.ops.cggr.grouped_mm(rows, tables, ends)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, end in enumerate(ends.tolist()):
        if start < end:
            yield group, slice(start, end)
        start = end


@operator("cggr::grouped_mm")
def grouped_mm(rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    """`product`, with zeros behind the last group; waits for `ends`."""
    out = rows.new_zeros(rows.shape[0], tables.shape[2])
    for group, of_group in _groups(ends):
        torch.mm(rows[of_group], tables[group], out=out[of_group])
    return out


@grouped_mm.register_fake
def _grouped_mm_fake(rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], tables.shape[2])


@operator("cggr::grouped_mm_backward")
def grouped_mm_backward(grad: Tensor, rows: Tensor, tables: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `grouped_mm` by rows and tables."""
    by_rows, by_tables = torch.zeros_like(rows), torch.zeros_like(tables)
    for group, of_group in _groups(ends):
        torch.mm(grad[of_group], tables[group].T, out=by_rows[of_group])
        torch.mm(rows[of_group].T, grad[of_group], out=by_tables[group])
    return by_rows, by_tables


@grouped_mm_backward.register_fake
def _grouped_mm_backward_fake(grad: Tensor, rows: Tensor, tables: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(tables)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.cggr.grouped_mm_backward(grad, *ctx.saved_tensors), None


grouped_mm.register_autograd(_autograd, setup_context=_context)
