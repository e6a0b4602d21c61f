"""Predicted peaks of memory against the measured ones: every run of `step_time.py`, `padding.py` and `distributed.py`
of this package's arms, on one GPU, whose peak is committed.

    python benchmarks/memory.py                    # writes benchmarks/results/memory.json and .md
    python benchmarks/memory.py --only smollm-h100

Nothing is measured here: the models are on the meta device or, where a step ran under autocast, in CPU memory that
nothing touches. What was measured is the allocator's peak of allocated bytes; under CUDA graphs, in `padding.py` and in
`distributed.py` it is that of reserved bytes, which pieces that do not fit anywhere add to.

The second table is what the options that save memory are predicted to leave of a step on everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import distributed
import padding
import torch
import typer
from step_time import SHAPES, Shape, build
from step_time_report import Arm

import cggr_compile as cggr
from cggr_compile.environment import environment
from cggr_compile.inspection.explanation import Explanation
from cggr_compile.schedule import kept_of

RESULTS = Path(__file__).parent / "results"
SAMPLED = {"router_head": "sampled", "selection": "topk"}
STEP_TIME: dict[str, dict[str, Any]] = {
    "all": {"ratio": 1.0},
    "floor": {"ratio": 1.0},
    "random": {"selection": "random"},
    "routed": {"selection": "topk"},
    "sampled": SAMPLED,
    "token": {"route": "token", **SAMPLED},
    "token_random": {"route": "token", "selection": "random"},
    "loss": {"route": "loss", **SAMPLED},
    "loss_random": {"route": "loss", "selection": "random"},
}
"""The options of the arms of `step_time.py`; `ahead` runs two steps beside each other, which is not predicted."""
SAVING: dict[str, dict[str, Any]] = {
    "nothing": {},
    '`kernels={"masked_loss": "triton_one_pass_small"}`': {"small": True},
    "`recompute_elementwise=True`": {"recompute": True},
    "both": {"small": True, "recompute": True},
    "both, `activation_memory_budget` 0.5": {"small": True, "recompute": True, "budget": 0.5},
    "`gradient_checkpointing_enable()`": {"checkpoints": True},
    "`gradient_checkpointing_enable()`, small blocks": {"checkpoints": True, "small": True},
}


@dataclass(frozen=True)
class Case:
    """One measured run: where it is from, the options and switches of its step, and the bytes measured."""

    source: str
    arm: str
    shape: Shape
    options: dict[str, Any]
    measured: int
    reserved: bool
    optimizer: bool
    budget: float = 1.0
    autocast: bool = False
    batch: str | None = None  # an arm of `padding.py`, whose batch it is


def cases() -> Iterator[Case]:
    """All of them."""
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        if not isinstance(report, dict) or not isinstance(report.get("samples"), dict) or "shape" not in report:
            continue
        shape = Shape(**report["shape"])
        for name, runs in report["samples"].items():
            peaks = [run["peak_bytes"] for run in runs if "peak_bytes" in run]
            found = _case(path.stem, name, report, shape) if peaks else None
            if found is not None:
                yield replace(found, measured=peaks[0])


def _case(source: str, name: str, report: dict[str, Any], shape: Shape) -> Case | None:
    if source.startswith("step_time"):
        arm = Arm.parse(name, report["ratio"])
        if arm.name not in STEP_TIME:
            return None
        rows = kept_of(arm.ratio, shape.batch) if arm.name == "floor" else shape.batch
        options = {"ratio": arm.ratio, **STEP_TIME[arm.name], **_switches(arm)}
        shape, autocast = replace(shape, batch=rows), report.get("autocast", False)
        return Case(source, name, shape, options, 0, arm.graphs, report["optimizer"], arm.budget, autocast)
    if source.startswith("distributed"):
        wrapped, _, _ = name.partition(" ")
        wrap, arm_name, options = distributed.parse(wrapped, report["ratio"])
        if wrap != "none" or arm_name not in distributed.OURS:
            return None
        return Case(source, name, shape, options, 0, reserved=True, optimizer=True, autocast=True)
    arm_name, _, switch = name.partition("+")
    if arm_name not in padding.OURS or "unpad" in padding.OURS[arm_name]:
        return None  # how much is unpadded depends on the batch
    options = {"ratio": 1.0, **padding.OURS[arm_name], "cuda_graphs": switch == "graphs"}
    return Case(source, name, shape, options, 0, reserved=True, optimizer=True, autocast=True, batch=arm_name)


def _switches(arm: Arm) -> dict[str, Any]:
    return {
        "cuda_graphs": arm.graphs,
        "recompute_elementwise": arm.recompute,
        "router_layers": arm.layers or "auto",
        "router_body": "fp8" if arm.fp8 else "exact",
        "matmul": "fp8" if arm.matmul else "exact",
        "kernels": {"masked_loss": "triton_one_pass_small"} if arm.small else "auto",
    }


def explained(case: Case) -> Explanation:
    """The step of a case, captured."""
    if not case.autocast:
        with torch.device("meta"):
            model = build(case.shape, "meta").to(torch.bfloat16)
            ids = torch.zeros(case.shape.batch, case.shape.sequence, dtype=torch.long)
        return cggr.explain(model, {"input_ids": ids, "labels": ids.clone()}, **case.options)
    with torch.device("meta"):
        model = build(case.shape, "meta").float()
    model.config.max_position_embeddings = 4 * case.shape.sequence
    model = model.to_empty(device="cpu")
    model.tie_weights()  # to_empty makes two tensors of a tied one
    if case.batch is not None:
        batch = padding.batch_of(case.batch, case.shape, torch.Generator().manual_seed(0))
    else:
        ids = torch.zeros(case.shape.batch, case.shape.sequence, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids.clone()}
    with torch.autocast("cpu", torch.bfloat16):
        return cggr.explain(model, batch, **case.options)


def predicted(case: Case) -> dict[str, Any]:
    """GiB by part, their sum as the run had an optimizer or not, the error, and seconds that the prediction took
    beside the capture."""
    with torch._functorch.config.patch(activation_memory_budget=case.budget):
        explanation = explained(case)
        start = monotonic()
        memory = explanation.memory()
    peak = memory.peak - (0 if case.optimizer else memory.optimizer)
    measured = case.measured / 2**30
    return {
        **asdict(case), "parts": asdict(memory), "measured": measured, "predicted": peak, "error": peak / measured - 1,
        "seconds": monotonic() - start,
    }  # fmt: skip


def saving(shape: Shape) -> dict[str, float]:
    """GiB that a step of AdamW on everything is predicted to take with each of SAVING."""
    found = {}
    for name, given in SAVING.items():
        with torch.device("meta"):
            model = build(shape, "meta").to(torch.bfloat16)
            ids = torch.zeros(shape.batch, shape.sequence, dtype=torch.long)
        if given.get("checkpoints"):
            model.gradient_checkpointing_enable()
        options = _switches(Arm("all", 1.0, small=bool(given.get("small")), recompute=bool(given.get("recompute"))))
        with torch._functorch.config.patch(activation_memory_budget=given.get("budget", 1.0)):
            found[name] = (
                cggr.explain(model, {"input_ids": ids, "labels": ids.clone()}, ratio=1.0, **options).memory().peak
            )
    return found


def page(report: dict[str, Any]) -> str:
    """Both tables."""
    rows = sorted(report["cases"], key=lambda row: (row["reserved"], row["source"]))
    lines = [
        f"Predicted with torch {report['versions']['torch']} on a machine without a GPU, commit {report['commit']}; "
        "measured as the named results say. GiB; allocated bytes, in the second part reserved ones.\n",
        "| measured in | arm | batch | measured | predicted | error |",
        "| --- " * 6 + "|",
    ]
    lines += [
        f"| {row['source']} | {row['arm']} | {row['shape']['name']} {row['shape']['batch']} × "
        f"{row['shape']['sequence']} | {row['measured']:.2f} | {row['predicted']:.2f} | {row['error']:+.1%} |"
        for row in rows
    ]
    for reserved, word in ((False, "allocated"), (True, "reserved")):
        errors = sorted(abs(row["error"]) for row in rows if row["reserved"] == reserved)
        if errors:
            lines.append(
                f"\nOf {len(errors)} peaks of {word} bytes: largest error {errors[-1]:.1%}, median "
                f"{errors[len(errors) // 2]:.1%}, {sum(error <= 0.1 for error in errors)} within 10 %."
            )
    if report["saving"]:
        lines += [
            "\nWhat a step on everything with AdamW is predicted to take, bf16:\n",
            "| | " + " | ".join(report["saving"]) + " |",
            "| --- " * (len(report["saving"]) + 1) + "|",
        ]
        lines += [
            f"| {name} | " + " | ".join(f"{found[name]:.1f}" for found in report["saving"].values()) + " |"
            for name in SAVING
        ]
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path, typer.Option(help="JSON; the tables go beside it")] = RESULTS / "memory.json",
    only: Annotated[str, typer.Option(help="part of a result's name or of `result arm`")] = "",
    commit: Annotated[str | None, typer.Option(help="the commit, where there is no checkout")] = None,
    write: bool = True,
) -> None:
    """Predicts every case and writes JSON and a markdown page."""
    report: dict[str, Any] = {**environment(torch.device("cpu"), commit), "cases": [], "saving": {}}
    for case in cases():
        if only in f"{case.source} {case.arm}":
            report["cases"].append(predicted(case))
            row = report["cases"][-1]
            print(
                f"{case.source} {case.arm}: {row['measured']:.2f}, {row['predicted']:.2f}, {row['error']:+.1%}, "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
    if not only:
        for name in ("SmolLM-135M", "Llama-3.2-1B"):
            shape = SHAPES[name]
            report["saving"][f"{name} {shape.batch} × {shape.sequence}"] = saving(shape)
    if write and not only:
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    typer.run(main)
