"""What padding and packing cost: a training step on padded rows and on packed documents, as users train.

    python benchmarks/padding.py --device cuda --output benchmarks/results/padding-h200.json
    python benchmarks/padding.py --quick        # a tiny model on the CPU

fp32 parameters, bf16 autocast on CUDA, fused AdamW, random weights and ids. Rows have 30 to 100 % of S tokens, padded
on the right with ignored labels; `BATCHES` batches of other lengths take turns. Packed batches are full of documents of
the same lengths. Every arm is a process of its own; each round runs all of them, one after another.

Arms, `…+graphs` with CUDA graphs: `compile` is torch.compile on padded rows; `full` is this package with every row on
rows without padding or mask, `mask`, `right` and `unpad` the same on padded rows with the option of that name.
`packed` is every document of packed rows, `documents` the same with `unpad`, `compile_packed` torch.compile; `segment`
a quarter of the tokens in whole documents (sampled head), `floor` every document of packed rows of a quarter of the
length.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from harness import WARM_UP
from step_time import SHAPES, Shape, build, outcome, start

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.run.router_time import mark, seconds_between

BATCHES = 6
RATIO = 0.25
SHORTEST = 0.3
OURS: dict[str, dict[str, Any]] = {
    "full": {},
    "mask": {},
    "right": {"padding": "right"},
    "unpad": {"unpad": True},
    "packed": {},
    "documents": {"unpad": True},
    "segment": {"route": "segment", "ratio": RATIO, "router_head": "sampled"},
    "floor": {},
}
ARMS = ("compile", "compile_packed", *OURS)


def padded(rows: int, length: int, vocabulary: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of 30 to 100 % of the length, padded on the right."""
    ids = torch.randint(0, vocabulary, (rows, length), generator=random)
    lengths = torch.randint(int(SHORTEST * length), length + 1, (rows, 1), generator=random)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(shape: Shape, length: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of `length` tokens, full of documents of 30 to 100 % of the shape's length; the last is cut off."""
    rows = []
    for _ in range(shape.batch):
        row: list[torch.Tensor] = []
        while sum(map(len, row)) < length:
            drawn = torch.randint(int(SHORTEST * shape.sequence), shape.sequence + 1, (), generator=random)
            row.append(torch.arange(int(drawn)))
        rows.append(torch.cat(row)[:length])
    positions = torch.stack(rows)
    ids = torch.randint(0, shape.vocabulary, positions.shape, generator=random)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def batch_of(arm: str, shape: Shape, random: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch of an arm; packed rows are four times as long as padded ones, and a quarter as many."""
    if arm in ("packed", "documents", "compile_packed", "segment", "floor"):
        rows = Shape(**{**asdict(shape), "batch": max(1, shape.batch // 4)})
        return packed(rows, int((RATIO if arm == "floor" else 1) * 4 * shape.sequence), random)
    batch = padded(shape.batch, shape.sequence, shape.vocabulary, random)
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()} if arm == "full" else batch


def measure(arm: str, shape: Shape, device: str, steps: int) -> dict[str, Any]:
    """Seconds of each step after the warm-up, tokens of a batch that count, peak memory in bytes."""
    name, _, switch = arm.partition("+")
    model = build(shape, device).float()
    model.config.max_position_embeddings = 4 * shape.sequence
    random = torch.Generator().manual_seed(0)
    batches = [batch_of(name, shape, random) for _ in range(BATCHES)]
    batches = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
    marks = [mark(torch.device(device))]
    options = {**OURS.get(name, {}), "cuda_graphs": switch == "graphs"}
    step: Any = torch.compile(model) if name.startswith("compile") else cggr.optimize(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    warm_up = max(WARM_UP, 2 * BATCHES)
    for index in range(steps + warm_up):
        if index == warm_up and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext():
            loss = step(**batches[index % BATCHES]).loss
        loss.backward()
        optimizer.step()
        marks.append(mark(torch.device(device)))
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = [seconds_between(*pair) for pair in pairwise(marks)]
    record: dict[str, Any] = {"first": seconds[0], "steps": seconds[warm_up:]}
    record["counted"] = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    if "unpad" in options:
        record["report"] = model.cggr.report().unpadded
    if device == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_reserved()
    return record


def table(report: dict[str, Any]) -> str:
    """Medians over all rounds."""
    shape = report["shape"]
    lines = [
        f"{report['device']}, commit {report['commit']}, torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}: {shape['name']}'s shape, {shape['batch']} × {shape['sequence']}, fp32 "
        "parameters, bf16 autocast, AdamW.\n",
        "| arm | ms (min to max) | of `mask` | of `compile` | of `full` | of `floor` | GiB |",
        "| --- " * 7 + "|",
    ]
    found = {}
    for arm, runs in report["samples"].items():
        steps = [1000 * s for run in runs for s in run.get("steps", [])]
        if steps:
            found[arm] = statistics.median(steps)
    best = {
        name: min((ms for arm, ms in found.items() if arm.partition("+")[0] == name), default=None)
        for name in ("mask", "compile", "full", "floor")
    }
    for arm, runs in report["samples"].items():
        if arm not in found:
            lines.append(f"| {arm} | {(runs or [{}])[-1].get('failed', 'not run')} |" + " |" * 5)
            continue
        steps = [1000 * s for run in runs for s in run.get("steps", [])]
        cells = [f"{found[arm] / reference:.2f}" if reference else "" for reference in best.values()]
        peak = max(run.get("peak_bytes", 0) for run in runs) / 2**30
        lines.append(
            f"| {arm} | {found[arm]:.1f} ({min(steps):.1f} to {max(steps):.1f}) | {' | '.join(cells)} | "
            f"{f'{peak:.1f}' if peak else ''} |"
        )
    return "\n".join(lines) + "\n"


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "SmolLM-135M",
    steps: int = 24,
    rounds: int = 2,
    arm: Annotated[list[str] | None, typer.Option(help="repeatable, NAME[+graphs]: " + ", ".join(ARMS))] = None,
    side_by_side: Annotated[int, typer.Option(help="processes that compile at once before round 1")] = 4,
    timeout: Annotated[float, typer.Option(help="seconds after which a process is stopped")] = 200,
    quick: Annotated[bool, typer.Option(help="the tiny model, one round of three steps")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; the table goes beside it")] = None,
    commit: Annotated[str | None, typer.Option(help="the commit measured, where there is no checkout")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every arm and writes JSON and a markdown table."""
    if quick:
        model, rounds, steps, side_by_side = "tiny", 1, 3, 0
    if only is not None:
        print(json.dumps(measure(only, SHAPES[model], device, steps)))
        return
    arms = arm or [*ARMS]
    for name in arms:
        if name.partition("+")[0] not in ARMS or name.partition("+")[2] not in ("", "graphs"):
            raise typer.BadParameter(f"arm: got {name!r}, expected one of {', '.join(ARMS)}, or with +graphs")
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    report = {**environment(torch.device(device), commit), "shape": asdict(SHAPES[model]), "samples": samples}
    command = [sys.executable, __file__, "--device", device, "--model", model]
    waiting = list(arms) if side_by_side else []
    while waiting:  # fills the caches on disk
        running = [
            start([*command, "--steps", "0", "--only", waiting.pop(0)]) for _ in range(min(side_by_side, len(waiting)))
        ]
        for process in running:
            outcome(process, timeout)
    for _ in range(rounds):
        for name in arms:
            samples[name].append(outcome(start([*command, "--steps", str(steps), "--only", name]), timeout))
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n")
                output.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    typer.run(main)
