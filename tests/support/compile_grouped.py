"""Compiles the kernels of `grouped` for compute capability 9.0, which needs no GPU, with tiles as on an H100; prints
their names. Raises where a kernel does not compile, or spills registers to memory, `up_kernel` more than four."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from cggr_compile.kernels.triton import grouped, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TILE = tiles.HALF[0]
M, N, K = TILE.rows, TILE.columns, TILE.depth
INTEGERS = ("experts", "pairs", "choices", "features", "width", "columns", "rows")
POINTERS = {"place": "*i64", "bound": "*i32", "tile_expert": "*i32", "tile_row": "*i32", "tile_count": "*i32"}
POINTERS |= {"by_weight": "*fp32"}
CONSTANTS = {"PROGRAMS": 132, "GROUP": 8, "PRECISION": "ieee", "BLOCK_M": M, "BLOCK_N": N // 2, "BLOCK_K": K}
GATED = {"ACTIVATION": "silu_gated", "INTERLEAVED": False, "ROWS_LAST": False}


def compile_kernel(kernel: Any, blocks: dict[str, list[int]], stages: int = TILE.stages, **constants: Any) -> None:
    """Compiles a kernel for bfloat16, with descriptors of these blocks."""
    constants = {name: value for name, value in (CONSTANTS | constants).items() if name in kernel.arg_names}
    signature, fixed, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(place,)] = "constexpr", constants[name]
            continue
        if name in blocks:
            signature[name] = f"tensordesc<bf16{blocks[name]}>".replace(" ", "")
        elif name in ("alpha", "limit"):
            signature[name] = "fp32"
        else:
            integer = name in INTEGERS or name.startswith("stride")
            signature[name] = "i32" if integer else POINTERS.get(name, "*bf16")
        if name not in ("alpha", "limit", "experts", "choices", *blocks):
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, divisible)
    options = {"num_warps": TILE.warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder) / "kernel"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "wgmma" in compiled.asm["ptx"], kernel.__name__
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    # `up_kernel` with a stage less spills none and took longer on an H200.
    assert int(spilled[1]) <= (16 if kernel is grouped.up_kernel else 0), f"{kernel.__name__}: {said}"
    print(kernel.__name__)


HALF = TILE.stages + 1
compile_kernel(grouped.up_kernel, {"x": [M, K], "table": [N // 2, K]}, HALF, **GATED)
compile_kernel(grouped.down_kernel, {"x": [M, K], "table": [N, K]}, ROWS_LAST=False, BLOCK_N=N)
compile_kernel(
    grouped.down_backward_kernel, {"grad": [M, K], "table": [K, N // 2]}, HALF, **(GATED | {"ROWS_LAST": True})
)
compile_kernel(grouped.tables_kernel, {"x": [K, M], "y": [K, N]}, BLOCK_N=N, stride_column=1)
