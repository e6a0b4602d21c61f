"""DistributedDataParallel, and trainers, on two ranks: gradients are those of eager models that nobody wrapped."""

from __future__ import annotations

from pathlib import Path

import pytest
from ddp_worker import LONG, USUAL, overlapping_rank, run, trainer_rank
from ranks import on_two_ranks, outcomes_of


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes_of(run, [*USUAL], tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("check", USUAL)
def test_two_ranks(check: str, usual: dict[str, str]) -> None:
    assert usual[check] == ""


@pytest.mark.long
def test_two_ranks_at_length(tmp_path: Path) -> None:
    assert outcomes_of(run, [*LONG], tmp_path) == dict.fromkeys(LONG, "")


@pytest.mark.long
def test_gradients_of_outlined_layers_are_reduced_during_the_backward(tmp_path: Path) -> None:
    on_two_ranks(overlapping_rank, str(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("shards", [False, True], ids=["DistributedDataParallel", "FSDP2"])
def test_trainers_of_two_ranks_count_their_tokens_together_and_resume(shards: bool, tmp_path: Path) -> None:
    on_two_ranks(trainer_rank, str(tmp_path), shards)
