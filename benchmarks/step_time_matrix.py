"""The step times that this project reports: every model, batch, ratio and arm, a file each.

    python benchmarks/step_time_matrix.py results
    python benchmarks/step_time_matrix.py results --budget 580 --part 0 --parts 2

A file that an earlier call began is gone on with; one of another commit or machine is refused. With `--parts`, each of
several GPUs takes its share (say which by CUDA_VISIBLE_DEVICES). Each file has compile caches of its own, in a folder
`caches` beside it, so that `cold` is cold.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

ROUTES = "token_random+graphs loss_random+graphs"

# The targets' models come first; as many processes compile side by side as 80 GB hold.
MATRIX = {
    "llama-1b": (
        "--model Llama-3.2-1B --side-by-side 3",
        "compile sampled+fp8+graphs floor+graphs random_compile all+graphs sampled+graphs all+outlined+recompute+small "
        "original_compile",
    ),
    "smollm": (
        "--side-by-side 5",
        "compile sampled+graphs floor+graphs random_compile all+graphs original_compile sampled+fp8+graphs "
        "all+outlined+recompute sampled+layers=2+graphs routed+graphs random+graphs sampled@0.5+graphs "
        "floor@0.5+graphs ahead+graphs",
    ),
    "qwen": (
        "--model Qwen2.5-0.5B --side-by-side 3",
        "compile sampled+fp8+graphs floor+graphs random_compile all+graphs sampled+graphs all+outlined+recompute+small "
        "original_compile",
    ),
    "smollm-peers": (
        "--side-by-side 4",
        "compile eager random_eager liger liger_compile original loss+graphs token+graphs sampled+graphs",
    ),
    "smollm-360m": (
        "--model SmolLM-360M --side-by-side 2",
        "compile sampled+graphs floor+graphs all+graphs all+outlined+recompute+small random_compile sampled+fp8+graphs "
        "all+outlined+recompute+small+budget=0.9",
    ),
    "smollm-adamw": ("--optimizer --side-by-side 4", "compile sampled+graphs floor+graphs all+graphs"),
    "smollm-4096": (
        "--batch 8 --sequence 4096 --side-by-side 4",
        "compile sampled+graphs floor+graphs all+graphs sampled@0.5+graphs",
    ),
    # As users train.
    **{
        f"{name}-trained": (
            f"--model {model} --optimizer --autocast --side-by-side {processes}",
            f"compile sampled+graphs floor+graphs all+graphs {routes} compile+checkpoint all+graphs+checkpoint liger",
        )
        for name, model, processes, routes in (
            ("smollm", "SmolLM-135M", 5, ROUTES),
            ("qwen", "Qwen2.5-0.5B", 3, ROUTES),
            ("llama-1b", "Llama-3.2-1B", 3, ROUTES),
            ("llama-3b", "Llama-3.2-3B", 1, ""),
        )
    },
    # How long first steps take: one process at a time, and no other part on the host.
    "smollm-start": ("--side-by-side 1 --rounds 3", "compile sampled+graphs"),
}


def main(
    folder: Annotated[Path, typer.Argument(help="for the JSON files and their tables")],
    only: Annotated[list[str] | None, typer.Option(help="repeatable: " + ", ".join(MATRIX))] = None,
    budget: Annotated[float, typer.Option(help="seconds for all of it")] = 3600.0,
    part: Annotated[int, typer.Option(help="which share, from 0")] = 0,
    parts: Annotated[int, typer.Option(help="how many there are")] = 1,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
) -> None:
    """Runs the benchmark for every file of this part."""
    if unknown := set(only or ()) - set(MATRIX):
        raise typer.BadParameter(f"only: got {', '.join(sorted(unknown))}, expected some of {', '.join(MATRIX)}")
    end = time.monotonic() + budget
    device = torch.cuda.get_device_name().split()[1].lower()  # "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (options, arms) in [(name, MATRIX[name]) for name in only or MATRIX][part::parts]:
        command = [sys.executable, str(Path(__file__).with_name("step_time.py")), "--device", "cuda", "--rounds", "1"]
        command += [*options.split(), *(f"--arm={arm}" for arm in arms.split())]
        command += ["--output", str(folder / f"step_time-{name}-{device}.json"), "--resume"]
        command += ["--commit", commit] if commit else []
        caches = folder.resolve() / "caches" / name
        places = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        left = end - time.monotonic()
        if left > 0:
            subprocess.run([*command, "--budget", str(left)], check=True, env={**os.environ, **places})


if __name__ == "__main__":
    typer.run(main)
