"""From which length on a sort selects faster than the kernel: `cggr::select` by each provider, on CUDA.

    python benchmarks/selection.py --output benchmarks/results/selection-h100.json

Top quarter of one row of N distinct scores. Samples are of CUDA events around one call, after warm-up; providers take
turns within one process, since neither patches anything.
"""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from cggr_compile.kernels.providers import LONGEST_SELECT, choose
from harness import measure

from cggr_compile.environment import environment

LENGTHS = tuple(2**power for power in (8, 10, 12, 14, 15, 16, 17, 18, 20))
PROVIDERS = ("triton", "reference")


def table(report: dict) -> str:
    """Medians in microseconds, a row a length."""
    lines = [
        f"{report['device']}, commit {report['commit']}, torch {report['versions']['torch']}; "
        f"median (min to max) of {report['steps']} calls, in µs. The kernel is the default up to {LONGEST_SELECT} "
        "entries.\n",
        f"| entries | {' | '.join(PROVIDERS)} |",
        "| --- " * (len(PROVIDERS) + 1) + "|",
    ]
    for length, by_provider in report["milliseconds"].items():
        samples = ([1000 * x for x in by_provider[name]] for name in PROVIDERS)
        cells = (f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in samples)
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    steps: int = 30,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
) -> None:
    """Measures, writes JSON and table, prints the table."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    found: dict[int, dict[str, list[float]]] = {}
    for length in LENGTHS:
        scores = torch.randn(length, generator=generator, device=device)
        valid = torch.ones_like(scores, dtype=torch.bool)
        for name in PROVIDERS:
            run = choose("select", device, torch.float32, name).implementation
            call = functools.partial(run, scores, valid, length // 4, "topk")
            found.setdefault(length, {})[name] = measure(call, (), device, steps)["milliseconds"]
    report = {**environment(device, commit), "steps": steps, "milliseconds": found}
    text = table(report)
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
