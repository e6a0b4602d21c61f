"""The Triton `masked_loss` by either algorithm, on the cases of `head_oracle`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cggr_compile.kernels.providers import choose
from head_oracle import (
    DEVICE,
    Case,
    check_loss,
    draw,
    step,
)
from torch import Tensor

ALGORITHMS = ["triton_one_pass", "triton_recompute"]
# Factors and sums that an algorithm rounds to the dtype: entries, scaled rows of hidden, the result.
ROUNDINGS = 3
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def implementation(name: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return choose("masked_loss", DEVICE, dtype, name).implementation


def both(test: Callable) -> Callable:
    return pytest.mark.parametrize("algorithm", ALGORITHMS)(test)


def check(algorithm: str, case: Case, grad: float = 1.0, roundings: int = 0, **options: object) -> None:
    check_loss(implementation(algorithm, case.hidden.dtype), case, grad, roundings, **options)


def steps(algorithm: str, case: Case, grad: float = 1.0, **options: object) -> dict[str, Tensor]:
    return step(implementation(algorithm, case.hidden.dtype), case, grad, **options)


def loss_of(algorithm: str, case: Case, **options: object) -> Tensor:
    tensors = {"row_weight": case.row_weight, "rows": case.rows, "num_items": case.num_items}
    return implementation(algorithm, case.hidden.dtype)(*case[:4], **tensors, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def one_tile(dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """A case of two tiles at most in each dimension, for what does not depend on tiles."""
    return draw(11, 9, 19, dtype, **options)
