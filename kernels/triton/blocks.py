"""Blocks of exponentials and what reads them: the launches of `exponentials` and the matrix products in fp32."""

from __future__ import annotations

import torch
import triton
from cggr_compile.kernels.triton import exponentials
from cggr_compile.kernels.triton.launch import launch
from cggr_compile.kernels.triton.rows import Rows, padded
from cggr_compile.kernels.triton.score import Head
from cggr_compile.kernels.triton.tiles import GROUP, Tile, descriptor, precision, processors, tile_for
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

OVERFLOW = 1e26
"""A row whose exponentials sum to more is shifted by its maximum instead of its target's logit (a loss above 59)."""


class Exponentials:
    """The launches of `exponentials.exponentials_kernel` for one head and one set of rows."""

    def __init__(self, rows: Rows, linear: Head, shift: Tensor) -> None:
        self.rows, self.linear, self.shift = rows, linear, shift
        self.classes = linear.weight.shape[0]
        self.tile: Tile = tile_for(linear.weight.dtype, linear.weight.device)
        self.weight = descriptor(padded(linear.weight), self.tile.columns, self.tile)
        self.bias = None if linear.bias is None else linear.bias.contiguous()

    def normalized(self, out: Tensor, gain: Tensor, at_target: Tensor, first_column: int) -> None:
        """The gradient by the head's outputs of the classes from `first_column` on, out [M, columns]."""
        self._launch(out, slice(0, out.shape[0]), first_column, (gain, at_target), None, None, None, None)

    def unnormalized(
        self,
        out: Tensor,
        own: Tensor,
        loss_factor: Tensor,
        losses: Tensor,
        scale: Tensor,
        figures: tuple[Tensor, Tensor] | None,
        part: slice,
    ) -> None:
        """Exponentials of the rows in `part`, out [R, V]; fills their `losses`, the `scale` that makes gradients, and,
        where they are wanted, their entropies and hits."""
        size, softcap = out.shape[0], self.linear.softcap
        column_tiles = triton.cdiv(self.classes, self.tile.columns)
        total, most, *more = out.new_empty((2 if figures is None else 3, column_tiles, size), dtype=torch.float32)
        moment = more[0] if more else None
        entropy, hit = (None, None) if figures is None else (x[part] for x in figures)
        rows, tiles = 16, 64
        blocks = triton.cdiv(size, rows)
        flagged = torch.zeros(triton.next_power_of_2(blocks), dtype=torch.int32, device=out.device)
        self._launch(out, part, 0, None, None, total, most, moment)
        launch(
            exponentials.survey_kernel,
            blocks,
            total,
            most,
            self.shift[part],
            flagged,
            self.rows.count,
            size,
            column_tiles,
            part.start,
            LIMIT=OVERFLOW,
            BLOCK_M=rows,
            BLOCK_T=tiles,
        )
        self._launch(out, part, 0, None, flagged, total, most, moment)
        launch(
            exponentials.settle_kernel,
            blocks,
            out,
            total,
            most,
            moment,
            self.shift[part],
            self.rows.target[part],
            own[part],
            loss_factor[part],
            losses[part],
            scale[part],
            entropy,
            hit,
            self.rows.count,
            size,
            column_tiles,
            part.start,
            out.stride(0),
            softcap,
            SOFTCAP=softcap > 0,
            MEASURED=figures is not None,
            BLOCK_M=rows,
            BLOCK_T=tiles,
        )

    def _launch(
        self,
        out: Tensor,
        part: slice,
        first_column: int,
        per_row: tuple[Tensor, Tensor] | None,
        flagged: Tensor | None,
        total: Tensor | None,
        most: Tensor | None,
        moment: Tensor | None,
    ) -> None:
        linear, tile, columns = self.linear, self.tile, out.shape[1]
        size = part.stop - part.start
        tiles = triton.cdiv(size, tile.rows) * triton.cdiv(columns, tile.columns)
        programs = min(tiles, processors(out.device))
        launch(
            exponentials.exponentials_kernel,
            programs,
            descriptor(self.rows.hidden[part], tile.rows, tile),
            self.weight,
            TensorDescriptor.from_tensor(out, [tile.rows, tile.columns]),
            self.bias,
            self.rows.target[part],
            self.shift[part],
            *(per_row or (None, None)),
            self.rows.count,
            flagged,
            total,
            most,
            moment,
            size,
            self.classes,
            self.rows.hidden.shape[1],
            linear.factor,
            linear.softcap,
            part.start,
            first_column,
            columns,
            HAS_BIAS=self.bias is not None,
            SOFTCAP=linear.softcap > 0,
            NORMALIZED=per_row is not None,
            MEASURED=moment is not None,
            FLAGS=0 if flagged is None else flagged.shape[0],
            PROGRAMS=programs,
            GROUP=GROUP,
            PRECISION=precision(out.dtype),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def scale_rows(x: Tensor, row_scale: Tensor, out: Tensor, row_of: Tensor | None) -> None:
    """out[row_of[n]] (or out[n]) = row_scale[n] x[n], in the dtype of `out`."""
    block = 4
    launch(
        exponentials.scale_rows_kernel,
        triton.cdiv(x.shape[0], block),
        x,
        row_scale,
        row_of,
        out,
        x.shape[0],
        x.shape[1],
        x.stride(0),
        out.stride(0),
        HAS_ROW_OF=row_of is not None,
        BLOCK_M=block,
        BLOCK_K=512,
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, accumulated in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(to: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """to + a @ b in fp32, in place where `to` exists."""
    if to is None:
        return product(a, b)
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    return to.addmm_(a.float(), b.float())


def add_column_sums(to: Tensor, x: Tensor, row_scale: Tensor) -> None:
    block = 64
    launch(
        exponentials.column_sums_kernel,
        triton.cdiv(x.shape[1], block),
        x,
        row_scale,
        to,
        x.shape[0],
        x.shape[1],
        x.stride(0),
        BLOCK_M=64,
        BLOCK_N=block,
    )


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor (0-d) times contiguous x, multiplied in fp32 and rounded once to `dtype`."""
    out = torch.empty_like(x, dtype=dtype)
    block = 4096
    if x.numel():
        launch(exponentials.scale_kernel, triton.cdiv(x.numel(), block), x, factor, out, x.numel(), BLOCK=block)
    return out


def aligned(columns: int, x: Tensor) -> int:
    """A row stride for `columns` elements that keeps rows 16-byte aligned, as fast matrix products need."""
    per_line = 16 // x.element_size()
    return triton.cdiv(columns, per_line) * per_line
