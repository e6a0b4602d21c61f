"""`grouped_mlp` on pairs sorted by expert: the launches of `grouped`, forward and backward.

Everything keeps its shape, so that nothing is read back to the host: the sort puts dropped pairs behind the others,
and kernels get the number of tiles as a tensor. The forward keeps the first products [S, 2F] for the backward, which
computes the activations of them again; the second products are not kept, since with h the activations, g the result's
gradient and W the table, the gradient by a pair's weight is <g, W h> = <Wᵀ g, h>, as in SonicMoE (arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from cggr_compile.kernels.reference.experts import DIFFERENTIABLE, ExpertArguments, dropped
from cggr_compile.kernels.triton import grouped, tiles
from cggr_compile.kernels.triton.blocks import product
from cggr_compile.kernels.triton.launch import launch
from cggr_compile.kernels.triton.rows import padded
from cggr_compile.kernels.triton.tiles import Tile, precision, tile_for
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP = 8  # row tiles that read the same columns at about the same time


class Order(NamedTuple):
    """The pairs sorted by expert: place int64 [S], where row r comes from; bound int32 [E + 1], where experts begin."""

    place: Tensor
    bound: Tensor


class Tables(NamedTuple):
    """Tables [E, N, K] as rows of a matrix: [E · N, K'], or [E · K, N'] with `rows_last`; padded (`rows.padded`)."""

    matrix: Tensor
    rows_last: bool

    @staticmethod
    def of(tables: Tensor) -> Tables:
        """Copies what lies neither way, and what cannot be read in lines of 16 bytes, from the middle row on too."""
        rows_last = not tables.is_contiguous() and tables.transpose(1, 2).is_contiguous()
        rows_last = rows_last and tables.shape[1] // 2 * tables.element_size() % 16 == 0
        lying = tables.transpose(1, 2) if rows_last else tables
        return Tables(padded(lying.reshape(-1, lying.shape[2])), rows_last)

    @property
    def transposed(self) -> Tables:
        """The same tables, read as [E, K, N]."""
        return self._replace(rows_last=not self.rows_last)

    def descriptor(self, rows: int, depth: int) -> TensorDescriptor:
        """Loads blocks of `rows` by `depth`."""
        return TensorDescriptor.from_tensor(self.matrix, [depth, rows] if self.rows_last else [rows, depth])


def sort_pairs(arguments: ExpertArguments) -> Order:
    """The order of the pairs; those of one expert stay in the order of the tokens."""
    count = arguments.gate_up.shape[0]
    small = torch.int16 if count < torch.iinfo(torch.int16).max else torch.int32
    expert, place = _expert_or_none(arguments).reshape(-1).to(small).sort(stable=True)
    wanted = torch.arange(count + 1, dtype=small, device=expert.device)
    return Order(place, torch.searchsorted(expert, wanted, out_int32=True))


def _expert_or_none(arguments: ExpertArguments) -> Tensor:
    """The expert of each pair [T, K], E of a dropped one."""
    return arguments.experts.masked_fill(dropped(arguments), arguments.gate_up.shape[0])


class _Launches:
    """What the launches of one call share."""

    def __init__(self, arguments: ExpertArguments, order: Order) -> None:
        self.arguments, self.order = arguments, order
        self.count, self.width, self.features = arguments.down.shape
        self.tokens, self.choices = arguments.experts.shape
        self.pairs = self.tokens * self.choices
        dtype, self.device = arguments.hidden.dtype, arguments.hidden.device
        few = self.pairs < self.count * 64
        self.tile: Tile = tiles.HALF[-1] if few and dtype.itemsize == 2 else tile_for(dtype, self.device)
        # Two accumulators, or an epilogue that takes as many registers.
        self.half = self.tile._replace(columns=max(16, self.tile.columns // 2), stages=self.tile.stages + 1)
        self.precision = precision(dtype)
        self.weights = arguments.weights.contiguous()
        self.gated = arguments.activation != "silu"
        self.rows = (2 if self.gated else 1) * self.features
        limit = triton.cdiv(self.pairs, self.tile.rows) + self.count
        self.schedule = (*order.bound.new_empty((2, limit)).unbind(0), order.bound.new_empty(1))
        launch(
            grouped.schedule_kernel,
            triton.cdiv(limit, 32),
            order.bound,
            *self.schedule,
            self.count,
            BLOCK_M=self.tile.rows,
            BLOCK_E=triton.next_power_of_2(self.count),
            BLOCK_T=32,
        )

    def sorted_rows(self, columns: int, dtype: torch.dtype) -> Tensor:
        """An empty [S, columns], rows 16-byte aligned."""
        per_line = 16 // dtype.itemsize
        stride = triton.cdiv(columns, per_line) * per_line
        return torch.empty(self.pairs, stride, dtype=dtype, device=self.device)[:, :columns]

    def rows_of_pairs(self, x: Tensor) -> Tensor:
        """The tokens' rows of x [T, columns] in the order of the pairs, [S, columns]; those of dropped pairs are not
        written."""
        x = x if x.stride(1) == 1 else x.contiguous()
        out = self.sorted_rows(x.shape[1], x.dtype)
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        launch(
            grouped.rows_kernel,
            triton.cdiv(self.pairs, 4) * triton.cdiv(x.shape[1], block),
            x,
            *self.order,
            out,
            self.count,
            self.choices,
            x.shape[1],
            x.stride(0),
            out.stride(0),
            BLOCK_M=4,
            BLOCK_N=block,
        )
        return out

    def programs(self, tile: Tile, columns: int) -> int:
        """One program a processor, unless there are fewer tiles."""
        most = self.schedule[0].shape[0] * triton.cdiv(columns, tile.columns)
        return min(most, tiles.processors(self.device))

    def up(self, products: Tensor | None) -> Tensor:
        """The activations [S, F]; fills the first products where they are wanted."""
        a, tile = self.arguments, self.half
        tables, x = Tables.of(a.gate_up), self.rows_of_pairs(a.hidden)
        activations = self.sorted_rows(self.features, x.dtype)
        programs = self.programs(tile, self.features)
        launch(
            grouped.up_kernel,
            programs,
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            tables.descriptor((2 if a.interleaved and self.gated else 1) * tile.columns, tile.depth),
            _contiguous(a.gate_up_bias),
            self.order.bound,
            *self.schedule,
            products,
            activations,
            self.features,
            self.width,
            0 if products is None else products.stride(0),
            activations.stride(0),
            a.alpha,
            a.limit,
            **self.activating(tables, tile, programs),
        )
        return activations

    def down(self, x: Tensor, tables: Tables, bias: Tensor | None, weights: Tensor | None, columns: int) -> Tensor:
        """Σ_k of each token's pairs: tables [E, columns, ...] times sorted rows x, plus bias, weighed: [T, columns]."""
        tile = self.tile
        of_pairs = x.new_empty(self.pairs, columns)
        programs = self.programs(tile, columns)
        launch(
            grouped.down_kernel,
            programs,
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            tables.descriptor(tile.columns, tile.depth),
            _contiguous(bias),
            weights,
            *self.order,
            *self.schedule,
            of_pairs,
            columns,
            x.shape[1],
            ROWS_LAST=tables.rows_last,
            **self.options(tile, programs),
        )
        out = x.new_empty(self.tokens, columns)
        rows, block = 8, min(256, triton.next_power_of_2(columns))
        launch(
            grouped.add_pairs_kernel,
            triton.cdiv(self.tokens, rows) * triton.cdiv(columns, block),
            of_pairs,
            _expert_or_none(self.arguments),
            out,
            self.tokens,
            self.count,
            columns,
            self.choices,
            BLOCK_M=rows,
            BLOCK_N=block,
        )
        return out

    def down_backward(
        self, grad: Tensor, products: Tensor, by_products: Tensor | None, weighed: Tensor | None, by_weight: bool
    ) -> Tensor | None:
        """From sorted rows of the result's gradient fills those that are wanted, and gives the gradient by the weights
        but for the bias, fp32 [T, K]."""
        a, tile = self.arguments, self.half
        # The depths are the tables' rows: they are read the other way.
        tables = Tables.of(a.down).transposed
        parts = None
        if by_weight:  # zeros of the dropped pairs
            parts = grad.new_zeros(triton.cdiv(self.features, tile.columns), self.pairs, dtype=torch.float32)
        programs = self.programs(tile, self.features)
        launch(
            grouped.down_backward_kernel,
            programs,
            TensorDescriptor.from_tensor(grad, [tile.rows, tile.depth]),
            tables.descriptor(tile.columns, tile.depth),
            products,
            self.weights,
            *self.order,
            *self.schedule,
            by_products,
            weighed,
            parts,
            self.pairs,
            self.features,
            self.width,
            products.stride(0),
            0 if weighed is None else weighed.stride(0),
            a.alpha,
            a.limit,
            **self.activating(tables, tile, programs),
        )
        return None if parts is None else parts.sum(0).view(self.tokens, self.choices)

    def by_tables(self, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """Fills out [E, rows, columns] with each expert's Σ x[r] ⊗ y[r] of sorted rows [S, rows] and [S, columns]."""
        tile = self.tile
        _, rows, columns = out.shape
        all_tiles = self.count * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        programs = min(all_tiles, tiles.processors(self.device))
        options = self.options(tile, programs)
        del options["GROUP"]
        launch(
            grouped.tables_kernel,
            programs,
            TensorDescriptor.from_tensor(x, [tile.depth, tile.rows]),
            TensorDescriptor.from_tensor(y, [tile.depth, tile.columns]),
            self.order.bound,
            out,
            self.count,
            rows,
            columns,
            *out.stride(),
            **options,
        )
        return out

    def sums(self, x: Tensor, gathered: bool) -> Tensor:
        """Each expert's sum of sorted rows x, or of its tokens' x by weight, [E, columns]."""
        columns, block = x.shape[1], 64
        out = x.new_empty(self.count, columns)
        launch(
            grouped.column_sums_kernel,
            self.count * triton.cdiv(columns, block),
            x,
            self.weights,
            *self.order,
            out,
            self.choices,
            columns,
            x.stride(0),
            GATHERED=gathered,
            BLOCK_M=64,
            BLOCK_N=block,
        )
        return out

    def activating(self, tables: Tables, tile: Tile, programs: int) -> dict[str, int | str | bool]:
        """`options`, with those of kernels that activate."""
        return {
            "ACTIVATION": self.arguments.activation,
            "INTERLEAVED": self.arguments.interleaved and self.gated,
            "ROWS_LAST": tables.rows_last,
            **self.options(tile, programs),
        }

    def options(self, tile: Tile, programs: int) -> dict[str, int | str]:
        return {
            "PROGRAMS": programs,
            "GROUP": GROUP,
            "PRECISION": self.precision,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.columns,
            "BLOCK_K": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def forward(arguments: ExpertArguments, saving: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result [T, D], and for `backward`, if `saving`: the first products [S, ...] as they are stored, and the
    `Order`."""
    hidden = arguments.hidden
    order = sort_pairs(arguments)
    kept = hidden.new_empty(0, 0)
    if hidden.numel() == 0 or arguments.experts.numel() == 0:
        return torch.zeros_like(hidden, memory_format=torch.contiguous_format), kept, *order
    launches = _Launches(arguments, order)
    products = launches.sorted_rows(launches.rows, hidden.dtype) if saving else None
    activations = launches.up(products)
    tables = Tables.of(arguments.down)
    result = launches.down(activations, tables, arguments.down_bias, launches.weights, launches.width)
    return result, kept if products is None else _whole(products), *order


def backward(
    grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments, products: Tensor, order: Order
) -> list[Tensor]:
    """The gradients of the wanted of DIFFERENTIABLE, in order; those of the tables lie as the tables do."""
    asked = {
        name: want and getattr(arguments, name) is not None for name, want in zip(DIFFERENTIABLE, wanted, strict=True)
    }
    if grad.numel() == 0 or arguments.experts.numel() == 0:
        return [torch.zeros_like(getattr(arguments, name)) for name, want in asked.items() if want]
    launches = _Launches(arguments, order)
    grad = grad.contiguous()
    products = products[:, : launches.rows]
    of_products = asked["hidden"] or asked["gate_up"] or asked["gate_up_bias"]
    by_products = launches.sorted_rows(launches.rows, grad.dtype) if of_products else None
    weighed = launches.sorted_rows(launches.features, grad.dtype) if asked["down"] else None
    by_weight = None
    if of_products or asked["down"] or asked["weights"]:
        rows = launches.rows_of_pairs(grad)
        by_weight = launches.down_backward(rows, products, by_products, weighed, asked["weights"])
    found: dict[str, Tensor] = {}
    if by_products is not None and asked["hidden"]:
        tables = Tables.of(arguments.gate_up).transposed
        found["hidden"] = launches.down(by_products, tables, None, None, launches.width)
    if weighed is not None:
        by_down = torch.empty_like(arguments.down)
        launches.by_tables(weighed, rows, by_down.transpose(1, 2))
        found["down"] = by_down
    if by_products is not None and asked["gate_up"]:
        rows = launches.rows_of_pairs(arguments.hidden)
        found["gate_up"] = launches.by_tables(by_products, rows, torch.empty_like(arguments.gate_up))
    if by_weight is not None:
        if arguments.down_bias is not None:
            of_experts = F.pad(product(grad, arguments.down_bias.T), (0, 1))
            by_weight = by_weight + of_experts.gather(1, _expert_or_none(arguments))
        found["weights"] = by_weight.to(arguments.weights.dtype)
    if by_products is not None and asked["gate_up_bias"]:
        found["gate_up_bias"] = launches.sums(by_products, False)
    if asked["down_bias"]:
        found["down_bias"] = launches.sums(grad, True)
    return [found[name] for name, want in asked.items() if want]


def _whole(x: Tensor) -> Tensor:
    """A `sorted_rows` with what fills up its lines."""
    return x.as_strided((x.shape[0], x.stride(0)), x.stride())


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
