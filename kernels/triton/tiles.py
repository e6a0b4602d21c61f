"""Tile sizes of the head kernels, by dtype and shared memory, and how their programs are laid out."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Rows, columns and depth of a tile of products, warps of its program, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory that the pipeline's operands and a tile on its way out take."""
        operands = self.stages * (self.rows + self.columns) * self.depth
        return (operands + self.rows * self.columns) * dtype.itemsize


# In order of preference. On an H100 the first runs at the rate of the library's bf16 matrix product
# (benchmarks/results/kernels-h100.md); the others fit GPUs with less shared memory.
HALF = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2))
# One byte a number: twice the depth for the same bytes.
QUARTER = (Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 2), Tile(64, 64, 128, 4, 2))
# Products of fp32 without TF32 run on the vector units, where registers bound the tile.
FULL = (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2))
GROUP = 32  # row tiles that read the same columns at about the same time
MOST_EXTRA_SPLITS = 8


def tile_for(dtype: torch.dtype, device: torch.device) -> Tile:
    """The first tile that fits the device's shared memory."""
    tiles = {1: QUARTER, 2: HALF, 4: FULL}[dtype.itemsize]
    limit = _shared_memory(device)
    return next((tile for tile in tiles if tile.shared_bytes(dtype) + 1024 <= limit), tiles[-1])


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits_for(rows: int, classes: int, tile: Tile, device: torch.device) -> int:
    """Slices of the vocabulary so that the programs, one a processor, leave few processors idle in the last wave."""
    row_tiles, columns, slots = triton.cdiv(rows, tile.rows), triton.cdiv(classes, tile.columns), processors(device)

    def used(splits: int) -> float:
        waves = row_tiles * splits / slots
        return waves / math.ceil(waves)

    enough = min(columns, max(1, slots // min(row_tiles, GROUP)))
    return max(range(enough, min(columns, enough + MOST_EXTRA_SPLITS) + 1), key=used)


def descriptor(x: Tensor, rows: int, tile: Tile) -> TensorDescriptor:
    """A descriptor of `x` [R, D] (see `rows.padded`) that loads blocks of `rows` by the tile's depth."""
    return TensorDescriptor.from_tensor(x, [rows, tile.depth])


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: as torch's own matrix products are set to."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
