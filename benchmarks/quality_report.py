"""What `quality.py` measured, as a table and as a plot of held-out loss against seconds.

Arms are compared seed by seed: a difference is the mean over seeds that both have, its interval the 95 % percentile
bootstrap of those differences (10,000 resamples); with fewer than three seeds there is none.
"""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

RESAMPLES = 10_000


def page(output: Path, base: str) -> str:
    """Tables, one for each regime and budget, as markdown; the plot is written beside the output."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["regime"], record["seconds"]].append(record)
    _plot(groups, output.with_suffix(".png"))
    about = records[0]
    head = f"{about['device']}, commit {about['commit']}, torch {about['versions']['torch']}, {about['size']}, rows of"
    tables = [table(group, base, *key) for key, group in sorted(groups.items())]
    return "\n\n".join([f"{head} {about['length']} tokens.", *tables])


def table(records: list[dict[str, Any]], base: str, regime: str, seconds: float) -> str:
    """A row an arm: seeds, steps, mean held-out loss, difference to `base` with its interval, longest step, memory."""
    arms: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        arms[record["arm"]][record["seed"]] = record
    lines = [
        f"{regime}, {seconds:g} s\n",
        f"| arm | seeds | steps | held-out | less {base} | s to its loss | longest step, s | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    reference = {seed: run for seed, run in arms.get(base, {}).items() if "mean" in run}
    for arm, runs in arms.items():
        done = {seed: run for seed, run in runs.items() if "mean" in run}
        if not done:
            lines.append(f"| {arm} | failed: {next(iter(runs.values()))['failed'].splitlines()[-1]} |" + " |" * 6)
            continue
        both = sorted(done.keys() & reference.keys())
        differences = np.array([done[seed]["mean"] - reference[seed]["mean"] for seed in both])
        reached = [seconds_to(done[seed], reference[seed]["mean"]) for seed in both]
        memory = [run["GiB"] for run in done.values() if run["GiB"] is not None]
        cells = [
            arm,
            len(done),
            f"{mean(run['steps'] for run in done.values()):.0f}",
            f"{mean(run['mean'] for run in done.values()):.4f}",
            difference(differences) if arm != base else "",
            f"{mean(reached):.1f}" if reached and None not in reached else "",
            f"{max(run['longest_step'] for run in done.values()):.2f}",
            f"{max(memory):.1f}" if memory else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def difference(differences: np.ndarray) -> str:
    """The mean, with its bootstrap interval from three seeds on."""
    if len(differences) == 0:
        return ""
    if len(differences) < 3:
        return f"{differences.mean():+.4f}"
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
    return f"{differences.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def seconds_to(record: dict[str, Any], loss: float) -> float | None:
    """When the run's curve first was at a loss, between two of its points; None where it never was."""
    points = [(at, value) for at, _, value in record["curve"]] + [(record["spent"], record["mean"])]
    for (before, above), (after, below) in pairwise(points):
        if below <= loss:
            return before if above <= loss else before + (after - before) * (above - loss) / (above - below)
    return None


def _plot(groups: dict[tuple[str, float], list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for axis, ((regime, seconds), records) in zip(axes[0], sorted(groups.items()), strict=True):
        arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            if "mean" in record:
                arms[record["arm"]].append(record)
        for arm, runs in arms.items():
            points = [[(at, value) for at, _, value in run["curve"]] + [(run["spent"], run["mean"])] for run in runs]
            shortest = min(map(len, points))
            line = np.array([each[:shortest] for each in points]).mean(0)
            axis.plot(line[:, 0], line[:, 1], marker="o", markersize=3, label=arm)
        axis.set(xlabel="seconds of training", ylabel="held-out loss", title=f"{regime}, {seconds:g} s")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
