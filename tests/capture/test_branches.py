"""What a model's own lines decide by sizes is written down in every trace of a routed step, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.variables.tensor import SymNodeVariable
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.torch_internals import decisions

OPTIONS = {"ratio": 0.25, "router_layers": 1, "inner": "eager"}
PLAIN = SymNodeVariable.evaluate_expr


class Branching(Toy):
    """Takes another side for a single row, which Dynamo knows of no traced size, and guards on nothing."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(hidden) * (1 if hidden.shape[0] == 1 else 2)


class Broken(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        raise ValueError("no middle")


def compiled_by_backend(model: Toy, dynamic: bool | None) -> Callable[..., tuple]:
    return torch.compile(model, backend="cggr", options=OPTIONS, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_branch_is_refused_by_the_backend_too(dynamic: bool | None) -> None:
    compiled = compiled_by_backend(Branching().train(), dynamic)
    with pytest.raises(cggr.CannotOptimize, match=r"branches on the batch size: 1 selected rows .*test_branches\.py"):
        compiled(**toy_batch())
    assert SymNodeVariable.evaluate_expr is PLAIN


@pytest.mark.parametrize("dynamic", [None, True])
def test_after_a_step_dynamo_is_as_it_was(dynamic: bool | None) -> None:
    for step in (cggr.optimize(Toy().train(), **OPTIONS), compiled_by_backend(Toy().train(), dynamic)):
        step(**toy_batch())[0].backward()
        assert SymNodeVariable.evaluate_expr is PLAIN


def test_after_a_trace_that_failed_dynamo_is_as_it_was() -> None:
    with pytest.raises(cggr.CannotOptimize):
        cggr.optimize(Broken().train(), **OPTIONS)(**toy_batch())
    assert SymNodeVariable.evaluate_expr is PLAIN


def test_decisions_that_were_not_written_down_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a compilation of another thread ends in the middle of a trace."""
    ends = [decisions._unwrap]
    require = decisions.require_written_down

    def required() -> None:
        while ends:
            ends.pop()()
        require()

    monkeypatch.setattr(decisions, "require_written_down", required)
    monkeypatch.setattr(decisions, "trace_again", counted := _Counted(decisions.trace_again))
    with pytest.raises(cggr.CannotOptimize, match="branches on the batch size"):
        cggr.optimize(Branching().train(), **OPTIONS)(**toy_batch())
    assert counted.calls == 1
    assert SymNodeVariable.evaluate_expr is PLAIN


class _Counted:
    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: str) -> None:
        self.calls += 1
        self.function(*args)
