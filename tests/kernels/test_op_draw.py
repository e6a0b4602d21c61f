"""`cggr::draw` as a registered operator: it computes the rules, is traced, and names bad arguments."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels.op import selection as selection_ops
from cggr_compile.kernels.reference import selection
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
        ({"scores": torch.zeros(2, 11)}, r"cggr::draw: valid has shape \(11,\), expected \[..., N\] as scores"),
        ({"valid": torch.ones(11)}, "cggr::draw: valid is torch.float32, expected torch.bool"),
        ({"noise": torch.zeros(10)}, r"cggr::draw: noise has shape \(10,\), expected \[..., N\] as scores"),
        ({"rule": "topk"}, r"cggr::draw: rule is 'topk', expected one of \['stratified', 'trimmed', 'importance'\]"),
        ({"names": ["taw"], "values": [1.0]}, r"options are \['taw'\], 'trimmed' knows \['tau', 'epsilon'\]"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    scores, valid, noise = operands()
    given = {"scores": scores, "valid": valid, "k": 4, "rule": "trimmed", "noise": noise, "names": [], "values": []}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.cggr.draw(**{**given, **change})


def lowest(
    scores: Tensor, valid: Tensor, k: int, noise: Tensor, *, weight: float = 1.0, skip: int = 0, needed: int
) -> tuple[Tensor, Tensor]:
    """A user's rule: the easiest rows in the order of their scores, after some; a view of what it was given."""
    assert [type(option) for option in (weight, skip, needed)] == [float, int, int]
    return scores.argsort()[skip : skip + k], noise[:k] * weight


def test_a_users_function_is_a_rule_under_a_key() -> None:
    scores, valid, noise = operands()
    key = selection_ops.register(lowest)
    given = (scores, valid, 4, key, noise, ["skip", "weight", "needed"], [1.0, 3.0, 7.0])
    index, weight = torch.ops.cggr.draw(*given)
    by_row = dict(zip(scores.argsort()[1:5].tolist(), (noise[:4] * 3).tolist(), strict=True))
    assert index.tolist() == sorted(by_row)
    assert weight.tolist() == [by_row[row] for row in sorted(by_row)]
    opcheck(selection_ops.draw, given)


def test_keys_are_one_for_each_function_that_lives() -> None:
    def made(number: int) -> selection.RuleFunction:
        def mine(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full((k,), number), torch.ones(k)

        return mine

    first, second = made(1), made(2)
    keys = [selection_ops.register(rule) for rule in (first, second, first)]
    assert keys[0] == keys[2] != keys[1]
    assert [torch.ops.cggr.draw(*operands()[:2], 2, key, operands()[2], [], [])[0][0] for key in keys] == [1, 2, 1]
    del first
    with pytest.raises(ValueError, match=rf"rule is '{keys[0]}', expected one of .* or the key of a function that liv"):
        torch.ops.cggr.draw(*operands()[:2], 2, keys[0], operands()[2], [], [])
    assert selection_ops.register(made(3)) not in keys
    assert selection_ops.register("trimmed") == "trimmed"


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "selection rule 'mine' returned NoneType, expected"),
        ((torch.arange(3), torch.ones(3)), ValueError, r"'mine' returned index of shape \(3,\), expected \(4,\)"),
        ((torch.arange(4.0), torch.ones(4)), TypeError, "'mine' returned index of torch.float32, expected torch.int64"),
    ],
)
def test_what_a_function_returns_is_checked_by_name(result: object, error: type[Exception], message: str) -> None:
    def mine(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> object:
        return result

    scores, valid, noise = operands()
    with pytest.raises(error, match=message):
        torch.ops.cggr.draw(scores, valid, 4, selection_ops.register(mine), noise, [], [])
