"""Every differentiable operator that torch tests itself, in a model's middle: as it is, and where what it gives, or was
given, is changed in place. The step is eager's, or is refused.

`pip install expecttest`, which torch's samples need; `HYPOTHESIS_PROFILE=long pytest tests/sweep/test_operators.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from torch.utils import _pytree as pytree
from toys import Toy, toy_batch

import cggr_compile as cggr

pytest.importorskip("expecttest", reason="torch's samples of its operators need it")
from torch.testing._internal.common_methods_invocations import op_db

ROUNDING = 1e-6
Operator = Callable[..., Any]


class Calling(Toy):
    """`use` of an operator's sample, whose first tensor depends on the hidden states, is added to these."""

    def __init__(self, operator: Operator, use: Callable[..., torch.Tensor], sample: Any) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.operator, self.use, self.sample = operator, use, sample

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        given = self.sample.input.detach() * (hidden.mean() * 0.1 + 1)
        found = self.use(self.operator, given, self.sample.args, self.sample.kwargs)
        return super().middle(hidden + 0.1 * found)


def plain(operator: Operator, given: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    return total(operator(given, *args, **kwargs))


def result_changed(operator: Operator, given: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    result = operator(given, *args, **kwargs)
    (result[0] if isinstance(result, (tuple, list)) else result).mul_(2)
    return total((result, given))


def argument_changed(operator: Operator, given: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    result = operator(given, *args, **kwargs)
    given.mul_(2)
    return total((result, given))


def total(result: Any) -> torch.Tensor:
    """One finite number of all tensors of floats in what a call gives."""
    leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel()]
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in leaves]
    return sum(torch.nan_to_num(x.float(), 0, 0, 0).clamp(-3, 3).mean() for x in parts if x.is_floating_point())


def samples(entry: Any) -> Iterator[Any]:
    made = entry.sample_inputs("cpu", torch.float32, requires_grad=False)
    usable = [x for x in made if isinstance(x.input, torch.Tensor) and x.input.is_floating_point() and x.input.numel()]
    yield from usable[:6:3]


@pytest.mark.long
@pytest.mark.parametrize("use", [plain, result_changed, argument_changed], ids=lambda use: use.__name__)
@pytest.mark.parametrize(
    "entry",
    [entry for entry in op_db if entry.supports_autograd and entry.supports_dtype(torch.float32, "cpu")],
    ids=lambda entry: entry.formatted_name,
)
def test_the_step_is_eagers_or_is_refused(entry: Any, use: Callable[..., torch.Tensor]) -> None:
    for sample in samples(entry):
        torch._dynamo.reset()
        eager, model = (Calling(entry.op, use, sample) for _ in range(2))
        batch, model = toy_batch(), cggr.optimize(model, inner="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.manual_seed(5)
                loss, gradients = oracle.step(eager, batch)
            except (RuntimeError, TypeError) as error:
                pytest.skip(f"eager itself: {str(error).splitlines()[0]}")
            torch.manual_seed(5)
            try:
                actual, found = oracle.step(model, batch)
            except cggr.CannotOptimize:
                continue
        torch.testing.assert_close(actual, loss, rtol=0, atol=ROUNDING, equal_nan=True)
        torch.testing.assert_close(found, gradients, rtol=0, atol=ROUNDING, equal_nan=True)
