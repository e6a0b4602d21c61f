"""How long a schedule stalls the loop: seconds lost whenever another fraction is kept.

    python benchmarks/schedules.py --output benchmarks/results/schedules-h200.json
    python benchmarks/schedules.py --quick        # a tiny model on the CPU

The kept fraction falls from 1 to 0.25 on the schedule's rungs, some optimiser steps each. The host waits for the device
after every step. What a rung's steps take beyond the median of its second half is lost: compilation, recording, the
memory of another size. Each route has a process of its own, and a GPU where there are several.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Annotated, Any

import torch
import typer
from harness import gpus
from step_time import SHAPES, build

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.schedule import LADDER_RUNGS

RATIO = 0.25
ROUTES = ("sequence", "token", "loss")


def measure(route: str, model: str, device: str, steps: int) -> list[list[float]]:
    """Of every optimiser step the fraction that is kept and its seconds, `steps` for each rung; what is compiled before
    the loop is in the first."""
    shape, cuda = SHAPES[model], device == "cuda"
    trained = build(shape, device)
    cggr.optimize(trained, route=route, ratio=RATIO, cuda_graphs=cuda, warmup_steps=LADDER_RUNGS * steps)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5, fused=cuda)
    cggr.attach(trained, optimizer)
    config = trained.cggr.config
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=device)
    found = []
    for step in range((LADDER_RUNGS + 1) * steps):
        began = time.perf_counter()
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        found.append([config.kept_fraction(step), time.perf_counter() - began])
    return found


def lost(samples: Sequence[Sequence[float]]) -> list[tuple[float, float, float]]:
    """Of every rung the fraction kept, the median seconds of its second half, and what its steps took beyond that."""
    rungs = []
    for fraction, group in groupby(samples, key=lambda sample: sample[0]):
        seconds = [each for _, each in group]
        steady = median(seconds[len(seconds) // 2 :])
        rungs.append((fraction, steady, sum(seconds) - steady * len(seconds)))
    return rungs


def table(report: dict[str, Any]) -> str:
    """A row a route: what the rungs behind the first lose together, and the most that one of their steps takes beyond
    its rung's median."""
    lines = ["| route | rungs | lost on all, s | most of a step, s |", "| --- | --- | --- | --- |"]
    for route, samples in report["samples"].items():
        rungs = lost(samples)
        later = {fraction: steady for fraction, steady, _ in rungs[1:]}
        worst = max(seconds - later[fraction] for fraction, seconds in samples if fraction in later)
        lines.append(f"| {route} | {len(rungs) - 1} | {sum(rung[2] for rung in rungs[1:]):.2f} | {worst:.2f} |")
    return "\n".join(lines) + "\n"


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "SmolLM-135M",
    steps: Annotated[int, typer.Option(help="for each rung")] = 20,
    route: Annotated[list[str] | None, typer.Option(help="repeatable, all if not given: " + ", ".join(ROUTES))] = None,
    quick: Annotated[bool, typer.Option(help="the tiny model")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    commit: str | None = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every route and writes JSON and a table."""
    if quick:
        model, steps = "tiny", 4
    if only is not None:
        print(json.dumps(measure(only, model, device, steps)))
        return
    report = {**environment(torch.device(device), commit), "model": model, "samples": {}}
    command = [sys.executable, __file__, "--device", device, "--model", model, "--steps", str(steps), "--only"]
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in [{"CUDA_VISIBLE_DEVICES": name} for name in gpus()] if device == "cuda" else [{}]:
        places.put(place)

    def samples(name: str) -> list[list[float]]:
        place = places.get()
        try:
            variables = {**os.environ, **place}
            done = subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True, env=variables)
        finally:
            places.put(place)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(max_workers=places.qsize()) as threads:
        running = {threads.submit(samples, name): name for name in route or ROUTES}
        for ended in as_completed(running):
            report["samples"][running[ended]] = ended.result()
            if output is not None:
                output.write_text(json.dumps(report) + "\n")
                output.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    typer.run(main)
