"""Models that `fully_shard` shards over two ranks: gradients are those of eager models that every rank has whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from fsdp_worker import LONG, USUAL, run
from ranks import on_two_ranks


def outcomes_of(checks: Sequence[str], folder: Path) -> dict[str, str]:
    """What came of checks that two processes make, one after the other."""
    on_two_ranks(run, str(folder), list(checks))
    return json.loads(Path(folder, "outcomes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes_of([*USUAL], tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("check", [*USUAL, "on one rank", "on two ranks again"])
def test_two_ranks(check: str, usual: dict[str, str]) -> None:
    assert usual[check] == ""


@pytest.mark.long
def test_two_ranks_at_length(tmp_path: Path) -> None:
    outcomes = outcomes_of([*LONG], tmp_path)
    assert outcomes == dict.fromkeys(LONG, "")
