"""`torch.compile(model, backend="cggr")`: the same rewrite, whatever the user compiled with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch
from toys import Toy, route, toy_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.4, "router_layers": 2, "inner": "eager"}


@pytest.mark.sample(3)
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("sizes", [((6, 12), (9, 14)), ((8, 8), (5, 11))], ids=["different", "equal"])
def test_static_or_dynamic_the_backend_routes_exactly(dynamic: bool | None, sizes: tuple) -> None:
    """A static capture is traced again with symbols; the batch sizes then share it. Equal sizes are told apart."""
    torch.manual_seed(0)
    eager = Toy().train()
    compiled = torch.compile(copy.deepcopy(eager), backend="cggr", options=OPTIONS, dynamic=dynamic)
    for rows, length in sizes:
        batch = toy_batch(rows, length, ignored=0.2)
        expected_rows = torch.tensor(route(eager, batch).hardest(-(-2 * rows // 5)))
        assert_routed(compiled, eager, batch, expected_rows)
    assert cggr.handle(compiled).captures == 1


def assert_routed(
    compiled: torch.nn.Module, eager: torch.nn.Module, batch: dict[str, torch.Tensor], rows: torch.Tensor
) -> None:
    loss, gradients = oracle.step(compiled, batch)
    assert torch.equal(cggr.handle(compiled).selected, rows)
    gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(batch, rows)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_model_of_transformers(dynamic: bool | None) -> None:
    llama = ARCHITECTURES["llama"]
    eager = oracle.truncated(build("llama"), llama, 2)
    compiled = torch.compile(
        copy.deepcopy(eager), backend="cggr", options={**OPTIONS, "router_layers": 1}, dynamic=dynamic
    )
    for rows, length in [(8, 8), (9, 14)]:
        batch = token_batch(rows, length)
        assert_routed(compiled, eager, batch, oracle.expected_rows(eager, llama, batch, 0.4, 1))
    assert cggr.handle(compiled).captures == 1


def test_the_model_is_known_where_its_forward_is_decorated() -> None:
    """By a wrapper that takes anything, as transformers has."""

    def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))

    class Decorated(Toy):
        forward = decorated(Toy.forward)

    model = Decorated().train()
    compiled = torch.compile(model, backend="cggr", options={"ratio": 0.5, "inner": "eager"})
    compiled(**toy_batch())[0].backward()
    assert cggr.handle(compiled).captures == 1


def test_graphs_that_do_not_train_pass_through() -> None:
    eager = Toy().train()
    compiled = torch.compile(copy.deepcopy(eager), backend="cggr", options=OPTIONS)
    batch = toy_batch()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    torch.testing.assert_close(compiled(**inputs)[0], eager(**inputs)[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], eager(**batch)[0])
    compiled.eval()
    eager.eval()
    torch.testing.assert_close(compiled(**batch)[0], eager(**batch)[0])
    passive = cggr.handle(compiled).runtime.passive
    assert {"no labels were passed", "gradients are disabled", "the model is in eval mode"} <= set(passive)


class _Holder:
    def __init__(self, model: torch.nn.Module) -> None:
        self.models = [model]

    def step(self, **batch: torch.Tensor) -> tuple:
        for model in self.models:
            outputs = model(**batch)
        return outputs


@pytest.mark.parametrize(
    "callable_of", [lambda model: model, lambda model: _Holder(model).step], ids=["model", "method"]
)
def test_what_trains_is_told_for_each_call(callable_of: Callable[..., Callable[..., tuple]]) -> None:
    """Also where the forward reads no mode, and where an equal module trained before."""
    batch = toy_batch()
    for seed in range(10):
        torch.manual_seed(seed)
        model = Toy().train()
        step = torch.compile(callable_of(model), backend="cggr", options=OPTIONS)
        rows = torch.tensor(route(model, batch).hardest(2))
        for _ in range(2):
            assert torch.equal(step(**batch)[0], model(**oracle.rows_of(batch, rows))[0])
            model.eval()
            assert torch.equal(step(**batch)[0], model(**batch)[0])
            model.train()


def test_a_student_trains_behind_a_teacher_that_does_not() -> None:
    teacher, student, batch = Toy().eval().requires_grad_(False), Toy().train(), toy_batch()

    def step(**batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taught = teacher(batch["input_ids"])[0]
        return student(**batch)[0] + 0 * taught.mean()

    compiled = torch.compile(step, backend="cggr", options=OPTIONS)
    rows = torch.tensor(route(student, batch).hardest(2))
    torch.testing.assert_close(compiled(**batch), step(**oracle.rows_of(batch, rows)))
    student.eval()
    torch.testing.assert_close(compiled(**batch), step(**batch))


def test_functions_share_a_batch() -> None:
    """Whose sizes have been marked: Dynamo traces for other reasons again, by when the second model has hooks."""
    batch = toy_batch()
    for model in (Toy().train(), Toy().train()):
        step = torch.compile(_Holder(model).step, backend="cggr", options=OPTIONS)
        rows = torch.tensor(route(model, batch).hardest(2))
        assert torch.equal(step(**batch)[0], model(**oracle.rows_of(batch, rows))[0])


def test_options_are_validated() -> None:
    compiled = torch.compile(Toy().train(), backend="cggr", options={"ration": 0.4})
    with pytest.raises(Exception, match="unknown option 'ration', did you mean 'ratio'"):
        compiled(**toy_batch())


def test_a_graph_break_is_refused_with_its_line() -> None:
    class Broken(Toy):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().logits(hidden)

    compiled = torch.compile(Broken().train(), backend="cggr", options=OPTIONS)
    with pytest.raises(Exception, match=r"breaks Dynamo's graph .*test_backend\.py:\d+: torch\._dynamo\.graph_break"):
        compiled(**toy_batch())
