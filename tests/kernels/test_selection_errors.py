"""What selection rules refuse: arguments, options, results of a user's function, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cggr_compile.kernels.reference import selection
from torch import Tensor


@pytest.mark.parametrize("name", list(selection.RULES))
def test_bad_arguments(name: str) -> None:
    rule = selection.RULES[name]
    scores, valid = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for arguments, message in (
        ((scores.double(), valid, 2, scores), r"scores is torch\.float64 of shape \(2, 4\)"),
        ((scores, valid[:1], 2, scores), r"valid is torch\.bool of shape \(1, 4\)"),
        ((scores, scores, 2, scores), r"valid is torch\.float32"),
        ((scores, valid, -1, scores), r"k is -1, expected at least 0"),
        ((scores, valid, 2, scores[0]), r"noise is torch\.float32 of shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.function(*arguments)
    if rule.needs_noise:
        with pytest.raises(ValueError, match=f"noise: the rule '{name}' (draws|ranks) by noise, which is None"):
            rule.function(scores, valid, 2, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stratified", {"num_strata": 0}, "num_strata is 0, expected at least 1"),
        ("trimmed", {"tau": 1.5}, r"tau is 1\.5, expected a fraction in \[0, 1\]"),
        ("trimmed", {"epsilon": -0.1}, r"epsilon is -0\.1"),
        ("importance", {"floor": 0.0}, r"floor is 0\.0, expected a share in \(0, 1\]"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection.RULES[name].function(torch.zeros(2, 4), torch.zeros(2, 4) == 0, 4, torch.zeros(2, 4), **options)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.zeros(2), TypeError, r"'mine' returned Tensor, expected \(index, weight\)"),
        ((torch.zeros(2), torch.zeros(2)), TypeError, r"'mine' returned index of torch\.float32"),
        ((torch.zeros(2).long(), torch.zeros(2).double()), TypeError, r"'mine' returned weight of torch\.float64"),
        ((torch.zeros(3).long(), torch.zeros(3)), ValueError, r"'mine' returned index of shape \(3,\)"),
        ((torch.zeros(2).long(), torch.zeros(3)), ValueError, r"'mine' returned weight of shape \(3,\)|index of shape"),
    ],
)
def test_a_users_function_is_checked(result: Any, error: type[Exception], message: str) -> None:
    def mine(scores: Tensor, valid: Tensor, k: int, noise: Tensor | None) -> Any:
        return result

    with pytest.raises(error, match=message):
        selection.rule_of(mine).function(torch.zeros(4), torch.zeros(4) == 0, 2, torch.zeros(4))


def test_unknown_rules() -> None:
    with pytest.raises(ValueError, match="rule: got 'best', expected one of"):
        selection.rule_of("best")
    with pytest.raises(TypeError, match="rule: got int"):
        selection.rule_of(3)
