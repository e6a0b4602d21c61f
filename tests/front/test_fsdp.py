"""Models that `fully_shard` shards over two ranks: gradients are those of eager models that every rank has whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsdp_worker import LONG, USUAL, run
from ranks import outcomes_of


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes_of(run, [*USUAL], tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("check", [*USUAL, "on one rank", "on two ranks again"])
def test_two_ranks(check: str, usual: dict[str, str]) -> None:
    assert usual[check] == ""


@pytest.mark.long
def test_two_ranks_at_length(tmp_path: Path) -> None:
    outcomes = outcomes_of(run, [*LONG], tmp_path)
    assert outcomes == dict.fromkeys(LONG, "")
