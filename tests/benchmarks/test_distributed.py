"""The benchmark of several ranks: its arms, its table, and, in the long profile, a run of its own."""

from __future__ import annotations

import importlib
import json
import threading
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer


@pytest.fixture
def distributed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("distributed")


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("none:compile", ("none", "compile", {"ratio": 0.25})),
        ("ddp_views:all+graphs", ("ddp_views", "all", {"ratio": 1.0, "cuda_graphs": True})),
        ("fsdp2:sampled@0.5+outlined", ("fsdp2", "sampled",
                                        {"ratio": 0.5, "router_head": "sampled", "outline_layers": True})),
    ],
)  # fmt: skip
def test_arms(distributed: ModuleType, name: str, parsed: tuple[str, str, dict[str, Any]]) -> None:
    assert distributed.parse(name, 0.25) == parsed


@pytest.mark.parametrize("name", ["fsdp1:all", "ddp:routed", "ddp:compile+graphs", "ddp:all+fast", "all"])
def test_other_arms_are_refused(distributed: ModuleType, name: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected WRAP:ARM of none, ddp"):
        distributed.parse(name, 0.25)


@pytest.mark.parametrize(("strong", "scaling"), [(False, "80%"), (True, "40%")])
def test_table(distributed: ModuleType, strong: bool, scaling: str) -> None:
    """Twice as many ranks in 1.25 of the time: of twice the work, or of the same."""
    samples = {
        "none:all ×1": [{"steps": [0.07, 0.08, 0.09], "peak_bytes": 2**30, "exposed_milliseconds": 0.0}],
        "ddp:all ×2": [{"steps": [0.1]}, {"steps": [0.1, 0.2]}],
        "ddp:eager ×2": [{"failed": "not done in 3 s"}],
        "fsdp2:all ×2": [],
    }
    lines = distributed.table({"samples": samples, "strong": strong}).splitlines()
    assert lines[0].split("|")[4].split() == ["strong" if strong else "weak", "scaling"]
    assert lines[2:] == [
        "| none:all | 1 | 80.0 | 100% | 1.0 | 0.0 |",
        f"| ddp:all | 2 | 100.0 | {scaling} | | |",
        "| ddp:eager | 2 | not done in 3 s | | | |",
        "| fsdp2:all | 2 | not run | | | |",
    ]


def test_kernel_times(distributed: ModuleType) -> None:
    """Communication is exposed where nothing computes beside it, however kernels overlap each other."""
    kernels = [
        ("gemm", 0.0, 4000.0), ("ncclDevKernel_AllGather", 1000.0, 6000.0), ("gemm", 5000.0, 7000.0),
        ("ncclDevKernel_ReduceScatter", 5500.0, 9000.0), ("ncclDevKernel_AllGather", 8000.0, 10000.0),
    ]  # fmt: skip
    assert distributed.kernel_times(kernels) == {
        "kernel_milliseconds": 16.5, "nccl_milliseconds": 10.5, "exposed_milliseconds": 4.0,
    }  # fmt: skip


def test_a_batch_that_ranks_cannot_share_is_refused(distributed: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match=r"batch: 3 rows cannot be divided among \[1, 2\] ranks"):
        distributed.main(device="cpu", model="tiny", batch=3, strong=True)


def test_more_ranks_than_gpus_are_refused(distributed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gpus", lambda: ["0", "1"])
    with pytest.raises(typer.BadParameter, match="ranks: 4 need as many GPUs, and there are 2"):
        distributed.main(device="cuda", model="tiny", ranks=[1, 4])


@pytest.mark.parametrize(("beside", "most"), [(False, 1), (True, 3)])
def test_measurements_never_share_a_gpu(
    distributed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: bool, most: int
) -> None:
    """With `beside`, one of two ranks and two of one rank fill four GPUs; a rank more than there is room for waits."""
    running: list[set[str]] = []
    overlaps: list[int] = []
    guard, filled = threading.Lock(), threading.Event()

    def start(command: list[str], variables: dict[str, str]) -> tuple[set[str], int]:
        number = int(next(word for word in command if word.startswith("--nproc")).partition("=")[2])
        own = set(variables["CUDA_VISIBLE_DEVICES"].split(","))
        assert len(own) == number
        with guard:
            assert not own & set().union(*running)
            running.append(own)
            overlaps.append(len(running))
            if len(running) == most:
                filled.set()
        return own, number

    def outcome(process: tuple[set[str], int], timeout: float) -> dict[str, Any]:
        assert filled.wait(60)
        with guard:
            running.remove(process[0])
        return {"first": 1.0, "steps": [float(process[1])]}

    monkeypatch.setattr(distributed, "gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(distributed, "environment", lambda device, commit: {"commit": commit, "command": "this"})
    monkeypatch.setattr(distributed, "start", start)
    monkeypatch.setattr(distributed, "outcome", outcome)
    arms, output = ["none:all", "none:compile", "ddp:all", "fsdp2:all"], tmp_path / "out.json"
    run = partial(distributed.main, device="cuda", model="tiny", arm=arms, rounds=2, beside=beside, output=output)
    run(ranks=[1, 2], limit=0)
    assert not overlaps
    run(ranks=[1, 2])
    assert len(overlaps) == 8
    run(ranks=[2, 4], again=True)
    assert len(overlaps) == 12
    samples = json.loads(output.read_text())["samples"]
    assert {key: [run["steps"] for run in runs] for key, runs in samples.items()} == {
        f"{name} ×{n}": [[float(n)]] * 2 for n, names in ((1, arms[:2]), (2, arms[2:]), (4, arms[2:])) for name in names
    }
    assert max(overlaps) == most


@pytest.mark.long
def test_ranks_share_a_batch(distributed: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arms = ["ddp:all", "fsdp2:sampled"]
    distributed.main(device="cpu", quick=True, strong=True, batch=4, arm=arms, output=output)
    report = json.loads(output.read_text())
    assert report["strong"]
    assert report["shape"]["batch"] == 4
    assert [len(run["steps"]) for runs in report["samples"].values() for run in runs] == [3, 3]
