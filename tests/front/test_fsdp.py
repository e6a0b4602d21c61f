"""Models that `fully_shard` shards over two ranks: gradients are those of eager models that every rank has whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.multiprocessing
from fsdp_worker import CHECKS, run


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of each check, by its name; made by two processes, once."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, (2, str(folder)), nprocs=2)
    return json.loads(Path(folder, "outcomes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("check", [*CHECKS, "on one rank", "on two ranks again"])
def test_two_ranks(check: str, outcomes: dict[str, str]) -> None:
    assert outcomes[check] == ""
