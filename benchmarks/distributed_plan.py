"""What a step should take on more ranks than were measured, between two bounds, from a report of `distributed.py`.

    python benchmarks/distributed_plan.py benchmarks/results/distributed-1b-four-h200.json --ranks 4 --ranks 1024

A step on n ranks takes what it takes on one, and what its collectives add. At best that is what nothing can hide,
those of embedding, final norm and head, which are first in the forward and last in the backward; and a step is no
shorter than all of its collectives. At worst nothing is hidden. Each rank sends (n - 1)/n of so many bytes a
parameter (`BYTES`): DistributedDataParallel fp32 gradients there and back; FSDP2 bf16 parameters for the forward, and
again for the backward, and fp32 gradients. Within a host they go at the highest rate of the report's profiles (the
others' kernels waited longer for other ranks), among hosts at `--network`. Latency is left out, and what AdamW saves
on shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from distributed import medians
from step_time import Shape, build

BYTES = {"ddp": 8, "ddp_views": 8, "ddp_bf16": 4, "fsdp2": 8, "fsdp2_kept": 6}


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step, and those of them at its ends."""

    every: float
    ends: float


def traffic(arm: str, parameters: int, root: int, ranks: int) -> Traffic:
    """Of a model with so many parameters, `root` of them outside its layers."""
    each = BYTES[arm.partition(":")[0]] * (ranks - 1) / ranks
    return Traffic(each * parameters, each * root)


def bounds(alone: float, sent: Traffic, rate: float) -> tuple[float, float]:
    """Least and most milliseconds of a step that takes `alone` on one rank, at `rate` GB/s."""
    every, ends = (count / rate / 1e6 for count in sent)
    return max(alone + ends, every), alone + every


def sizes(shape: Shape) -> tuple[int, int]:
    """Parameters of a model, and those outside its layers."""
    model = build(shape, "meta")
    every = sum(each.numel() for each in model.parameters())
    return every, every - sum(each.numel() for each in model.model.layers.parameters())


def host_rate(report: dict[str, Any], parameters: int) -> float:
    """GB/s of a rank within the host: the highest of the report's profiles; `typer.BadParameter` without any."""
    rates = [
        traffic(key, parameters, 0, int(key.rpartition(" ×")[2])).every / run["nccl_milliseconds"] / 1e6
        for key, runs in report["samples"].items()
        for run in runs
        if run.get("nccl_milliseconds")
    ]
    if not rates:
        raise typer.BadParameter("report: no measurement of several GPUs, whose profile tells what collectives take")
    return max(rates)


def table(report: dict[str, Any], ranks: list[int], network: float, host: int) -> str:
    """Bounds by arm and ranks, and the median that was measured."""
    parameters, root = sizes(Shape(**report["shape"]))
    rate = host_rate(report, parameters)
    found = medians(report)
    arms = dict.fromkeys(key.rpartition(" ×")[0] for key in found if not key.startswith("none:"))
    lines = [f"{rate:.0f} GB/s within a host of {host}, {network:g} among hosts", "",
             "| arm | ranks | at best, ms | at worst | measured |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for arm in arms:
        alone = found.get(f"none:{arm.partition(':')[2]} ×1")
        for n in ranks if alone is not None else []:
            low, high = bounds(alone, traffic(arm, parameters, root, n), rate if n <= host else network)
            measured = found.get(f"{arm} ×{n}")
            lines.append(f"| {arm} | {n} | {low:.1f} | {high:.1f} | {f'{measured:.1f}' if measured else ''} |")
    return "\n".join(lines)


def main(
    report: Annotated[Path, typer.Argument(help="output of distributed.py")],
    ranks: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    network: Annotated[float, typer.Option(help="GB/s of a rank among hosts, one way")] = 50.0,
    host: Annotated[int, typer.Option(help="ranks of a host")] = 8,
) -> None:
    """Prints the bounds of every arm of the report whose step on one rank it has."""
    print(table(json.loads(report.read_text()), ranks or [2, 4, 8, 1024], network, host))


if __name__ == "__main__":
    typer.run(main)
