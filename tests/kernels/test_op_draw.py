"""`cggr::draw` as a registered operator: it computes the rules, is traced, and names bad arguments."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels import selection, selection_ops
from torch import Tensor
from torch.library import opcheck

GIVEN = {"trimmed": {"tau": 0.25, "epsilon": 0.5}, "stratified": {"num_strata": 3}, "importance": {"floor": 0.2}}


def operands(rows: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, noise = torch.rand((2, rows), generator=generator)
    return scores, torch.rand(rows, generator=generator) < 0.8, noise


def test_the_rules_that_draw_are_covered() -> None:
    assert set(GIVEN) == set(selection_ops.DRAWING)


@pytest.mark.parametrize("rule", GIVEN)
def test_it_is_the_rule_with_its_options(rule: str) -> None:
    scores, valid, noise = operands()
    for options in ({}, GIVEN[rule]):
        names, values = list(options), [float(value) for value in options.values()]
        index, weight = torch.ops.cggr.draw(scores, valid, 4, rule, noise, names, values)
        expected = selection.RULES[rule].function(scores, valid, 4, noise, **options)
        assert torch.equal(index, expected[0])
        assert torch.equal(weight, expected[1])


@pytest.mark.parametrize("rule", GIVEN)
def test_opcheck(rule: str) -> None:
    scores, valid, noise = operands()
    opcheck(selection_ops.draw, (scores, valid, 4, rule, noise, [], []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 11)}, r"cggr::draw: scores has shape \(2, 11\), expected \[N\]"),
        ({"valid": torch.ones(11)}, "cggr::draw: valid is torch.float32, expected torch.bool"),
        ({"noise": torch.zeros(10)}, r"cggr::draw: noise has shape \(10,\), expected \[N\] as scores"),
        ({"rule": "topk"}, r"cggr::draw: rule is 'topk', expected one of \['stratified', 'trimmed', 'importance'\]"),
        ({"names": ["taw"], "values": [1.0]}, r"options are \['taw'\], 'trimmed' knows \['tau', 'epsilon'\]"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    scores, valid, noise = operands()
    given = {"scores": scores, "valid": valid, "k": 4, "rule": "trimmed", "noise": noise, "names": [], "values": []}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.cggr.draw(**{**given, **change})
