"""What `step_time.py` measured, as a table and as a plot.

    python benchmarks/step_time_report.py benchmarks/results/step_time-graphs-h100.json

writes both beside each file. (`cold` is looked up as `cuda_graphs` outlines layers today, not as in older results.)
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import typer

GRAPHS, OUTLINED = "graphs", "outlined"
_SWITCHES = (
    *("+outlined", "+recompute", "+small", "+fp8", "+matmul", "+checkpoint", "+inductor", "+graphs"),
    *("+layers=N", "+budget=F"),
)


class Arm(NamedTuple):
    """An arm as it is written, `NAME[@RATIO][+SWITCH…]`; `layers` is None where none is given."""

    name: str
    ratio: float
    graphs: bool = False
    outlined: bool = False
    recompute: bool = False
    small: bool = False
    fp8: bool = False
    matmul: bool = False
    checkpoint: bool = False
    inductor: bool = False
    layers: int | None = None
    budget: float = 1.0

    @classmethod
    def parse(cls, text: str, ratio: float) -> Arm:
        """The arm, with `ratio` where it names none; `typer.BadParameter` for other switches or fractions."""
        first, *switches = text.split("+")
        name, _, own = first.partition("@")
        given = dict(switch.partition("=")[::2] for switch in switches)
        flags = {switch for switch, number in given.items() if not number}
        numbers = {switch: number for switch, number in given.items() if number}
        try:
            kept, budget, layers = float(own or ratio), float(numbers.get("budget", 1)), int(numbers.get("layers", 1))
        except ValueError:
            kept = budget = layers = math.nan
        known = flags <= {GRAPHS, OUTLINED, "recompute", "small", "fp8", "matmul", "checkpoint", "inductor"}
        known = known and set(numbers) <= {"budget", "layers"}
        if not (known and 0 < kept <= 1 and 0 <= budget <= 1 and layers >= 1):
            raise typer.BadParameter(f"arm: got {text!r}, expected NAME[@RATIO][+SWITCH…] of {', '.join(_SWITCHES)}")
        chosen = dict.fromkeys(flags, True)
        return cls(name, kept, **chosen, layers=layers if "layers" in numbers else None, budget=budget)


def table(report: dict[str, Any]) -> str:
    """Medians over all rounds, a row an arm."""
    shape = report["shape"]
    medians = _medians(report)
    kinds = {arm: Arm.parse(arm, report["ratio"]) for arm in medians}

    def against(arm: str, reference: float | None, share: float = 1.0) -> str:
        return f"{medians[arm] / (share * reference):.2f}" if reference else ""

    update = " and fused AdamW" if report["optimizer"] else ""
    update += ", fp32 parameters under bf16 autocast" if report.get("autocast") else ""
    lines = [
        f"{report['device']}, commit {report['commit']}, torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}: {shape['name']}'s shape, {shape['batch']} × {shape['sequence']}, "
        f"r = {report['ratio']} where the arm names none, forward and backward{update}.\n",
        "| arm | ms (min to max) | of compile | of the floor | of r × all | of the prediction | kernels, ms | number "
        "| GiB | cold, s | first, s |",
        "| --- " * 11 + "|",
    ]
    for arm, runs in report["samples"].items():
        if not runs:
            continue
        if arm not in medians:
            lines.append(f"| {arm} | {next(run['failed'] for run in runs if 'failed' in run)} |" + " |" * 9)
            continue
        every = [1000 * s for run in runs for s in run["steps"]]
        cells = [
            arm,
            f"{1000 * medians[arm]:.1f} ({min(every):.1f} to {max(every):.1f})",
            against(arm, _fastest(report, "compile")),
            against(arm, _fastest(report, "floor", kinds[arm].ratio)),
            against(arm, _fastest(report, "all"), kinds[arm].ratio),
            _against_prediction(report, medians[arm], runs[0]),
        ]
        if "kernels" in runs[0]:
            cells += [f"{runs[0]['kernel_milliseconds']:.1f}", f"{runs[0]['kernels']}"]
            cells.append(f"{max(run['peak_bytes'] for run in runs) / 2**30:.1f}")
        else:
            cells += [""] * 3
        cold = report.get("cold", {}).get(compiled_as(arm))
        cells.append(f"{cold:.0f}" if isinstance(cold, float) else "")
        cells.append(" / ".join(f"{run['first']:.0f}" for run in runs))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _against_prediction(report: dict[str, Any], seconds: float, run: dict[str, Any]) -> str:
    """A step over what the cost model predicts: its share of forward and backward on all rows, and the optimiser."""
    everything, share = _fastest(report, "all"), run.get("predicted_share")
    if everything is None or share is None:
        return ""
    update = sum(micros for name, _, micros in run.get("profile", []) if re.search(_OPTIMISER, name)) / 1e6
    return f"{seconds / (share * (everything - update) + update):.2f}"


_OPTIMISER = r"multi_tensor_apply"  # fused AdamW's kernels
_SCORING = ("routed", "sampled", "token", "loss", "token_loss")
# Parts of a step, by what the name of a kernel begins with or contains; the first that fits is its part.
_PARTS = (
    ("attention", r"flash|sdpa|fmha|cudnn"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitK"),
    ("fused elementwise and norms", r"^triton_"),
    ("optimiser", _OPTIMISER),
    ("copies and fills", r"^Mem|copy|fill|vectorized_elementwise"),
    ("other kernels of torch", r"^void|at::"),
    ("scores, selection, loss (Triton, this package)", r""),
)


def profile(report: dict[str, Any]) -> str:
    """Where the step of the fastest arm that scores within it goes, by parts and by kernel; empty without a profile."""
    routed = {
        arm: seconds
        for arm, seconds in _medians(report).items()
        if Arm.parse(arm, report["ratio"]).name in _SCORING and "profile" in report["samples"][arm][0]
    }
    if not routed:
        return ""
    arm = min(routed, key=routed.__getitem__)
    total, kernels = 1000 * routed[arm], report["samples"][arm][0]["profile"]
    parts: dict[str, list[float]] = {name: [0, 0.0] for name, _ in _PARTS}
    for name, count, micros in kernels:
        part = parts[next(part for part, pattern in _PARTS if re.search(pattern, name))]
        part[0] += count
        part[1] += micros / 1000
    rest = total - sum(milliseconds for _, milliseconds in parts.values())
    lines = [
        f"Where the {total:.1f} ms of `{arm}` go, by one profiled step (rest: between kernels, and in slower ones):\n",
        "| part | kernels | ms | share |", "| --- " * 4 + "|",
    ]  # fmt: skip
    for name, (count, milliseconds) in sorted(parts.items(), key=lambda part: -part[1][1]):
        lines.append(f"| {name} | {count:.0f} | {milliseconds:.2f} | {milliseconds / total:.0%} |")
    lines.append(f"| rest | | {rest:.2f} | {rest / total:.0%} |")
    lines += ["", "| kernel | number | ms |", "| --- " * 3 + "|"]
    for name, count, micros in sorted(kernels, key=lambda kernel: -kernel[2])[:16]:
        lines.append(f"| `{name[:80]}` | {count} | {micros / 1000:.2f} |")
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any]) -> str:
    """Table and profile."""
    return "\n".join(filter(None, [table(report), profile(report)]))


def plot(report: dict[str, Any], path: Path) -> None:
    """A bar for each arm: the median step time, and from the fastest to the slowest step.

    A dashed line is the ratio of the step on all rows. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    medians = _medians(report)
    if not medians:
        return
    arms, shape = list(medians), report["shape"]
    middle = [1000 * medians[arm] for arm in arms]
    every = [[1000 * s for run in report["samples"][arm] for s in run["steps"]] for arm in arms]
    below = [median - min(samples) for median, samples in zip(middle, every, strict=True)]
    above = [max(samples) - median for median, samples in zip(middle, every, strict=True)]
    figure = Figure(figsize=(7, 0.9 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(arms, middle, xerr=[below, above], color="#1a7f37", ecolor="#59636e", height=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=12)
    everything = _fastest(report, "all")
    if everything is not None:
        ideal = 1000 * report["ratio"] * everything
        axes.axvline(ideal, linestyle="--", color="#bc4c00", label=f"{report['ratio']} × all: {ideal:.1f} ms")
        axes.legend(loc="center right")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms a step")
    axes.set_title(f"{shape['name']}, {shape['batch']} × {shape['sequence']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _medians(report: dict[str, Any]) -> dict[str, float]:
    """Seconds by arm, of the arms whose every round ended well."""
    return {
        arm: statistics.median(s for run in runs for s in run["steps"])
        for arm, runs in report["samples"].items()
        if runs and all("steps" in run for run in runs)
    }


def _fastest(report: dict[str, Any], name: str, ratio: float | None = None) -> float | None:
    """Seconds of the fastest arm of a name, at a ratio if given, under whatever switches; None without one."""
    kinds = {arm: Arm.parse(arm, report["ratio"]) for arm in _medians(report)}
    alike = [arm for arm, kind in kinds.items() if kind.name == name and ratio in (None, kind.ratio)]
    return min((_medians(report)[arm] for arm in alike), default=None)


def compiled_as(arm: str) -> str:
    """The arm whose compilation an arm shares."""
    if not arm.endswith("+" + GRAPHS):
        return arm
    recorded = arm.removesuffix("+" + GRAPHS)
    return recorded if "+" + OUTLINED in recorded else f"{recorded}+{OUTLINED}"


def main(files: list[Path]) -> None:
    """Writes table and plot beside each JSON."""
    for file in files:
        report = json.loads(file.read_text())
        file.with_suffix(".md").write_text(page(report))
        plot(report, file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
