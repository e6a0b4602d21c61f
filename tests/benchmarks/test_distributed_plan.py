"""Bounds of steps on more ranks than were measured."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("distributed_plan")


def report(plan: ModuleType, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    shape = plan.Shape("small", 64, 128, 2, 4, 2, 1000, 2, 8)
    return {"shape": asdict(shape), "samples": samples}


def test_sizes(plan: ModuleType) -> None:
    """Two layers of 36,992 (attention 64·64·2 + 64·32·2, a gated MLP 3·64·128, two norms), a tied table, a norm."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    root = 1000 * 64 + 64
    assert plan.sizes(plan.Shape("small", 64, 128, 2, 4, 2, 1000, 2, 8)) == (2 * layer + root, root)


@pytest.mark.parametrize(("rate", "bounds"), [(1.0, (12.0, 18.0)), (0.5, (16.0, 26.0))])
def test_bounds(plan: ModuleType, rate: float, bounds: tuple[float, float]) -> None:
    """8 MB, 2 of them at the ends: at 1 GB/s they add 8 and 2 ms; at half of it all take longer than step and ends."""
    assert plan.bounds(10.0, plan.Traffic(8e6, 2e6), rate) == bounds


def test_table(plan: ModuleType) -> None:
    """The rate is that of the fastest profile: two ranks send half of eight bytes a parameter. Hosts have 1 GB/s."""
    parameters, root = plan.sizes(plan.Shape("small", 64, 128, 2, 4, 2, 1000, 2, 8))
    half, rest = 4 * parameters / 1e6, 4 * root / 1e6
    samples = {
        "none:all ×1": [{"steps": [0.01, 0.01, 0.02]}],
        "none:sampled ×1": [{"failed": "out of memory"}],
        "ddp:all ×2": [{"steps": [0.0125], "nccl_milliseconds": half / 4}, {"failed": "not done in 3 s"}],
        "fsdp2:all ×2": [{"steps": [0.013], "nccl_milliseconds": half / 2}],
        "ddp:sampled ×2": [{"steps": [0.004], "nccl_milliseconds": half}],
    }
    lines = plan.table(report(plan, samples), [2, 16], 1.0, 8).splitlines()
    assert lines[0] == "4 GB/s within a host of 8, 1 among hosts"
    far = [10 + rest * 1.875, 10 + half * 1.875]
    assert lines[4:] == [
        f"| ddp:all | 2 | {10 + rest / 4:.1f} | {10 + half / 4:.1f} | 12.5 |",
        f"| ddp:all | 16 | {far[0]:.1f} | {far[1]:.1f} |  |",
        f"| fsdp2:all | 2 | {10 + rest / 4:.1f} | {10 + half / 4:.1f} | 13.0 |",
        f"| fsdp2:all | 16 | {far[0]:.1f} | {far[1]:.1f} |  |",
    ]


def test_a_report_without_several_ranks_is_refused(plan: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match="no measurement of several GPUs"):
        plan.table(report(plan, {"none:all ×1": [{"steps": [0.01], "nccl_milliseconds": 0}]}), [2], 50.0, 8)
