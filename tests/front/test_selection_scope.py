"""`selection_scope="global"`: two ranks select together, as one process would that has the rows of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import outcomes_of
from scope_worker import LONG, USUAL, run
from toys import Toy, toy_batch

import cggr_compile as cggr


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes_of(run, [*USUAL], tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("check", USUAL)
def test_two_ranks(check: str, usual: dict[str, str]) -> None:
    assert usual[check] == ""


@pytest.mark.long
def test_two_ranks_at_length(tmp_path: Path) -> None:
    outcomes = outcomes_of(run, [*LONG], tmp_path)
    assert outcomes == dict.fromkeys(LONG, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": "token"}, r"with route='token': only whole rows travel"),
        ({"route": "loss"}, r"with route='loss'"),
        ({"route": "segment"}, r"with route='segment'"),
        ({"route": ("sequence", "loss")}, r"with route=\('sequence', 'loss'\)"),
        ({"route": "depth", "depth_layers": 1}, r"with route='depth'"),
        ({"selection": "auto"}, r"with selection='auto': each rank decides"),
        ({"dynamic_threshold": True}, r"with dynamic_threshold=True: k would differ"),
        ({"cuda_graphs": True}, r"with cuda_graphs=True: a step's collectives are not recorded"),
        ({"fallback": "eager"}, r"with fallback='eager'"),
    ],
)
def test_what_cannot_be_selected_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=rf"selection_scope='global' {message}.*selection_scope='local'"):
        cggr.RoutingConfig(selection_scope="global", **options)


def test_a_scope_of_another_name_is_refused() -> None:
    with pytest.raises(cggr.ConfigError, match="selection_scope='globl', did you mean 'global'"):
        cggr.RoutingConfig(selection_scope="globl")


def test_one_rank_selects_as_locally() -> None:
    """Bit for bit, without a collective and without a figure of ranks."""
    found = []
    for scope in ("local", "global"):
        torch.manual_seed(0)
        model = cggr.optimize(Toy().train(), ratio=0.5, selection="trimmed", selection_scope=scope, seed=0)
        for seed in range(2):
            model.zero_grad()
            loss = model(**toy_batch(6, 10, seed))[0]
            loss.backward()
        program = model.cggr.runtime.plans[-1].program
        assert not any("rows" in getattr(node.target, "__name__", "") for node in program.graph.nodes)
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([loss, model.cggr.selected, *gradients, *model.cggr.metrics().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
