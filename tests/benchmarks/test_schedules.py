"""How long a schedule stalls: what is lost on a rung, and the script on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_lost_is_what_a_rungs_first_steps_take_beyond_its_later_ones() -> None:
    schedules = importlib.import_module("schedules")
    samples = [[1.0, 9.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.5, 1.5], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]
    assert schedules.lost(samples) == [(1.0, 2.0, 7.0), (0.5, 1.0, 0.5)]
    assert "| token | 1 | 0.50 | 0.50 |" in schedules.table({"samples": {"token": samples}})


@pytest.mark.long
def test_every_rung_of_every_route_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # routes are processes, as for a user
    schedules = importlib.import_module("schedules")
    schedules.main(device="cpu", quick=True, output=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert {route: len(schedules.lost(samples)) for route, samples in found.items()} == dict.fromkeys(found, 9)
    assert (tmp_path / "out.md").read_text().count("\n| ") == 4


def test_a_route_that_fails_ends_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of having the next wait for its place."""
    schedules = importlib.import_module("schedules")

    def run(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(schedules.subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        schedules.main(device="cpu", quick=True, output=tmp_path / "out.json")
