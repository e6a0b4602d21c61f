"""The Triton `score` on the cases of `head_oracle`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cggr_compile.kernels.providers import choose
from head_oracle import (
    DEVICE,
    Case,
    assert_no_worse,
    draw,
    plain_score,
    score_truth,
)
from torch import Tensor

QUANTITIES = ["nll", "entropy", "margin", "confidence"]


def score(case: Case, quantities: Sequence[str] = QUANTITIES, **options: object) -> Tensor:
    out = choose("score", DEVICE, case.hidden.dtype, "triton").implementation(*case[:4], quantities, **options)
    assert out.dtype == torch.float32
    assert out.shape == (len(quantities), len(case.hidden))
    return out


def named(case: Case, **options: object) -> dict[str, Tensor]:
    return dict(zip(QUANTITIES, score(case, **options), strict=True))


def check(case: Case, **options: object) -> dict[str, Tensor]:
    found = named(case, **options)
    assert_no_worse(found, plain_score(case, **options), score_truth(case, **options))
    return found


def one_tile(dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """A case of two tiles at most in each dimension, for what does not depend on tiles."""
    return draw(11, 9, 19, dtype, **options)


def of_logits(x: Tensor, target: Tensor | None = None) -> Case:
    """A case whose logits [R, C] are x exactly: hidden rows are unit vectors, which pick columns of the weight."""
    rows = len(x)
    target = torch.arange(rows) % x.shape[1] if target is None else target
    return Case(torch.eye(rows, device=DEVICE), x.T.contiguous().to(DEVICE), None, target.to(DEVICE))
