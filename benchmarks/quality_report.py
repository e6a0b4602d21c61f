"""What `quality.py` measured, as tables and as a plot of held-out loss against seconds.

Arms are compared seed by seed: a difference, or a ratio, is the mean over seeds that both have, its interval the 95 %
percentile bootstrap of those seeds (10,000 resamples); with fewer than three seeds there is none. When an arm was at a
loss is read off its curve of held-out losses, straight between two of them.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

RESAMPLES = 10_000
NEVER = "—"
SETTING = {"regime": "clean", "seconds": 34.0, "schedule": "linear", "size": "55M", "length": 512, "rows": 0}
"""What records of one table have in common, and what a record that does not say it was measured with."""

Record = dict[str, Any]
Setting = tuple[Any, ...]


def page(output: Path, base: str, losses: Sequence[float] | None = None) -> str:
    """Two tables for each setting, as markdown; the plot is written beside the output."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    groups: dict[Setting, list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record.get(name, default) for name, default in SETTING.items())].append(record)
    _plot(groups, output.with_suffix(".png"))
    parts = [_head(records)]
    for setting, group in sorted(groups.items()):
        parts.append(f"{_title(setting)}\n\n{table(group, base)}")
        levels = losses or levels_of(_done(group).get(base, {}).values())
        if levels:
            parts.append(f"Seconds to a held-out loss:\n\n{table_of_seconds(group, levels)}")
    return "\n\n".join(parts)


def table(records: Iterable[Record], base: str) -> str:
    """A row an arm: seeds, steps, passes, mean held-out loss, its difference to `base`, the share of the budget after
    which it was at the final loss of `base`, longest stall, memory."""
    records = list(records)
    done = _done(records)
    reference = done.get(base, {})
    lines = [
        f"| arm | seeds | steps | passes | held-out | less {base} | at its loss after | longest stall, s | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(record["arm"] for record in records):
        if arm in done:
            lines.append(_row(_cells(arm, done[arm], reference, is_base=arm == base)))
        else:
            failed = next(record["failed"] for record in records if record["arm"] == arm)
            lines.append(f"| {arm} | failed: {(failed.strip().splitlines() or [''])[-1]} |" + " |" * 7)
    return "\n".join(lines)


def _cells(arm: str, runs: dict[int, Record], reference: dict[int, Record], is_base: bool) -> list[Any]:
    both = sorted(runs.keys() & reference.keys())
    differences = [runs[seed]["mean"] - reference[seed]["mean"] for seed in both]
    shares = [share_of_budget(runs[seed], reference[seed]) for seed in both]
    memory = [run["GiB"] for run in runs.values() if run["GiB"] is not None]
    return [
        arm,
        len(runs),
        f"{mean(run['steps'] for run in runs.values()):.0f}",
        f"{mean(run['passes'] for run in runs.values()):.2f}",
        f"{mean(run['mean'] for run in runs.values()):.4f}",
        "" if is_base else interval(differences, "+.4f"),
        "" if is_base else reached(shares, ".2f"),
        _stall(list(runs.values())),
        f"{max(memory):.1f}" if memory else "",
    ]


def _stall(runs: Collection[Record]) -> str:
    """The longest of the runs; of records that have a longest step instead, which contains a wait of up to eight steps,
    that as its bound."""
    bounds = [run.get("stall", run.get("longest_step")) for run in runs]
    return ("" if all("stall" in run for run in runs) else "≤ ") + f"{max(bounds):.2f}"


def table_of_seconds(records: Iterable[Record], losses: Sequence[float]) -> str:
    """A row an arm, a column a loss: the seconds after which the arm was at it, the mean over its seeds."""
    lines = [_row(["arm", *(f"{loss:g}" for loss in losses)]), "| --- |" + " --- |" * len(losses)]
    for arm, runs in _done(records).items():
        times = ([seconds_to(run, loss) for run in runs.values()] for loss in losses)
        lines.append(_row([arm, *(reached(each, ".1f") for each in times)]))
    return "\n".join(lines)


def levels_of(runs: Iterable[Record], number: int = 4) -> list[float]:
    """The last losses of the mean curve of `runs`, rounded up to two digits: the last is where they end."""
    runs = list(runs)
    if not runs:
        return []
    _, values = mean_curve(runs)
    return list(dict.fromkeys(math.ceil(round(value * 100, 6)) / 100 for value in values[-number:]))


def interval(values: Sequence[float], form: str) -> str:
    """The mean, with its bootstrap interval from three values on; nothing of none."""
    if not values:
        return ""
    found = np.array(values)
    if len(found) < 3:
        return f"{found.mean():{form}}"
    draws = np.random.default_rng(0).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(found[draws].mean(1), [2.5, 97.5])
    return f"{found.mean():{form}} ({low:{form}} to {high:{form}})"


def reached(values: Sequence[float | None], form: str) -> str:
    """The interval of what every seed reached; NEVER, and how many did, where not all of them."""
    found = [value for value in values if value is not None]
    if values and len(found) < len(values):
        return f"{NEVER} ({len(found)} of {len(values)})" if found else NEVER
    return interval(found, form)


def share_of_budget(record: Record, reference: Record) -> float | None:
    """Seconds to the reference's final loss, as a share of the seconds that the reference spent; None if never."""
    seconds = seconds_to(record, reference["mean"])
    return None if seconds is None else seconds / reference["spent"]


def seconds_to(record: Record, loss: float) -> float | None:
    """When the run's curve first was at a loss, between two of its points; None where it never was."""
    points = _points(record)
    if points[0][1] <= loss:
        return points[0][0]
    for (before, above), (after, below) in pairwise(points):
        if below <= loss:
            return before + (after - before) * (above - loss) / (above - below)
    return None


def mean_curve(runs: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds, those of the first run's points, and the mean held-out loss of all runs at each of them."""
    curves = [np.array(_points(run)).T for run in runs]
    seconds = curves[0][0]
    return seconds, np.mean([np.interp(seconds, *curve) for curve in curves], axis=0)


def _points(record: Record) -> list[tuple[float, float]]:
    """Seconds and held-out loss, the final one included."""
    return [(at, value) for at, _, value in record["curve"]] + [(record["spent"], record["mean"])]


def _done(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """The finished runs by arm and seed; of two records of a run the later counts."""
    arms: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if "mean" in record:
            arms[record["arm"]][record["seed"]] = record
    return dict(arms)


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(records: Iterable[Record]) -> str:
    """What all records were measured with: every device, commit and version of torch among them."""
    records = list(records)
    found = [
        sorted({record["device"] for record in records}),
        [f"commit {commit}" for commit in sorted({record["commit"] for record in records})],
        [f"torch {version}" for version in sorted({record["versions"]["torch"] for record in records})],
    ]
    return ", ".join(each for names in found for each in names) + "."


def _title(setting: Setting) -> str:
    regime, seconds, schedule, size, length, rows = setting
    limited = f"{rows} rows" if rows else "rows"
    return f"{regime}, {seconds:g} s, {schedule}, {size}, {limited} of {length} tokens"


def _plot(groups: dict[Setting, list[Record]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    color = {
        arm: f"C{place % 10}" for place, arm in enumerate(sorted({r["arm"] for rs in groups.values() for r in rs}))
    }
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 4), squeeze=False)
    for axis, (setting, records) in zip(axes[0], sorted(groups.items()), strict=True):
        done = _done(records)
        for arm, runs in sorted(done.items()):
            axis.plot(*mean_curve(list(runs.values())), marker="o", markersize=3, label=arm, color=color[arm])
        axis.set(xlabel="seconds of training", ylabel="held-out loss, mean over seeds")
        axis.set_title(_title(setting), fontsize=8)
        axis.grid(alpha=0.3)
        if done:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
