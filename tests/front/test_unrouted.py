"""A training step with labels runs a plan or raises, whatever keeps Dynamo from compiling it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from routed_toys import OPTIONS, assert_routed, toy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile import CannotOptimize
from cggr_compile.torch_internals import dynamo


@contextmanager
def disabled() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.mark.parametrize(
    ("prevented", "message"),
    [
        (lambda: torch.compiler.set_stance("force_eager"), "under the stance 'force_eager'"),
        (lambda: torch.compiler.set_stance("eager_on_recompile"), "under the stance 'eager_on_recompile'"),
        (lambda: torch.compiler.set_stance("fail_on_recompile"), "under the stance 'fail_on_recompile'"),
        (disabled, "config.disable switches torch.compile off"),
        (lambda: FlopCounterMode(display=False), "_FlopCounterMode is active"),
    ],
)
def test_a_step_that_dynamo_does_not_compile_raises_and_the_next_is_routed(prevented: Callable, message: str) -> None:
    model, batch = toy(), toy_batch(8)
    with prevented(), pytest.raises(CannotOptimize, match=f"^cannot optimize: .*{message}.*; "):
        model(**batch)
    assert model.cggr.selected is None
    assert_routed(model, batch)


def test_fallback_trains_on_all_rows_says_so_once_and_draws_nothing_twice() -> None:
    model, batch = toy(fallback="eager"), toy_batch(8)
    expected = Toy.forward(model, **batch)[0]
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(RuntimeWarning, match="training without routing: .*force_eager"):
            assert torch.equal(model(**batch)[0], expected)
        assert torch.equal(model(**batch)[0], expected)
    assert any("force_eager" in reason for reason in model.cggr.runtime.passive)


def test_an_environment_that_switches_dynamo_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads the variable once, when it is imported."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with disabled(), pytest.raises(CannotOptimize, match=r"^cannot optimize: TORCHDYNAMO_DISABLE=1 in the"):
        toy()(**toy_batch())


class IgnoresLabels(Toy):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
        return super().forward(input_ids)


def test_labels_that_the_model_ignores_raise() -> None:
    model = cggr.optimize(IgnoresLabels().train(), inner="eager")
    with pytest.raises(CannotOptimize, match="no routed step was part of the forward"):
        model(**toy_batch())


def test_labels_by_position_through_a_patched_forward_raise() -> None:
    model, batch = toy(), toy_batch()
    model.forward = lambda *args, **kwargs: Toy.forward(model, *args, **kwargs)
    with pytest.raises(CannotOptimize, match="was patched by one that computes training steps without it"):
        model(batch["input_ids"], batch["labels"])


def test_the_meta_device_is_refused() -> None:
    model = toy().to("meta")
    with pytest.raises(CannotOptimize, match="a step on the meta device computes nothing"):
        model(**{name: x.to("meta") for name, x in toy_batch().items()})


# Captures


def unfreeze(model: Toy, pattern: int) -> None:
    for bit, layer in enumerate(model.layers):
        layer.requires_grad_(bool(pattern >> bit & 1))


@pytest.mark.sample(1)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_layers_unfrozen_in_turn_are_one_plan(inner: str) -> None:
    """More patterns than Dynamo's own limit of 8; compiled code is kept for each."""
    torch.manual_seed(0)
    model = cggr.optimize(Toy(4).train(), **{**OPTIONS, "inner": inner})
    patterns = range(1, 10 if inner == "eager" else 4)
    for pattern in (*patterns, 1, 3):
        unfreeze(model, pattern)
        assert_routed(model, toy_batch(8, seed=pattern))
    assert model.cggr.captures == 1
    assert model.cggr.runtime.plans[0].route.variant.compilations == (0 if inner == "eager" else len(patterns))
    assert torch._dynamo.config.recompile_limit == 8


def test_what_changes_the_step_is_another_plan() -> None:
    """A constant of a layer, a dtype, an autocast, a longer table: none of them is told by the names of the inputs."""
    model, batch = toy(), toy_batch(8)
    assert_routed(model, batch)

    def doubled(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    def tripled(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * 3

    for captures, hook in enumerate((doubled, tripled), 2):
        registered = model.layers[1].register_forward_hook(hook)
        assert_routed(model, batch)
        assert model.cggr.captures == captures
        registered.remove()
    assert_routed(model, batch)
    assert model.cggr.captures == 3
    model.bfloat16()(**batch)
    assert model.cggr.captures == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(**batch)
    assert model.cggr.captures == 5


def test_more_captures_than_are_kept_raise_or_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "MAX_CAPTURES", 2)
    model, batch = toy(), toy_batch(8)
    for pattern in (1, 2):
        unfreeze(model, pattern)
        assert_routed(model, batch)
    unfreeze(model, 3)
    with pytest.raises(CannotOptimize, match="the model changes so often that this step needs more than 2 captures"):
        model(**batch)
    unfreeze(model, 1)
    assert_routed(model, batch)


# torch.compile(model, backend="cggr")


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="cggr", options={**OPTIONS, **options})


def beyond_the_limit(model: Toy) -> Any:
    unfreeze(model, 1)
    return torch._dynamo.config.patch(recompile_limit=1)


def failing(model: Toy) -> Any:
    model.middle = fails_in_dynamo
    return torch._dynamo.config.patch(suppress_errors=True)


def under(stance: str) -> Callable[[Toy], Any]:
    def change(model: Toy) -> Any:
        unfreeze(model, 1)
        return torch.compiler.set_stance(stance)

    return change


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "prevented",
    [
        pytest.param(
            beyond_the_limit,
            marks=pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="routed by torch 2.11"),
        ),
        failing,
        under("force_eager"),
        under("eager_on_recompile"),
    ],
)
def test_the_backend_raises_where_dynamo_does_not_ask_it(prevented: Callable[[Toy], Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Toy().train()
    routed, batch = compiled(model), toy_batch(8)
    assert_routed(model, batch, routed)
    message = "ran a training step without asking backend='cggr'|the model breaks Dynamo's graph"
    with prevented(model), pytest.raises(CannotOptimize, match=message):
        routed(**batch)
    assert model(**batch)[0].requires_grad, "a call of the model itself is nobody's business"


def fails_in_dynamo(hidden: torch.Tensor) -> torch.Tensor:
    places = torch.arange(hidden.shape[1])
    return hidden + torch.arange(places[-1] + 1, places[0] - places[-1], -1).float().sum()


class Prints(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            print(end="")
            hidden = hidden + layer(hidden).tanh()
        return hidden


def test_a_graph_break_under_the_backend_is_refused_or_falls_back() -> None:
    torch._dynamo.reset()
    model, batch = Prints().train(), toy_batch(8)
    for _ in range(2):
        with pytest.raises(CannotOptimize, match="graph"):
            compiled(model)(**batch)
    routed = compiled(model, fallback="eager")
    with pytest.warns(RuntimeWarning, match="training without routing: .*graph"):
        loss = routed(**batch)[0]
    torch.testing.assert_close(loss, Toy.forward(model, **batch)[0])


# torch.compile around an optimised model


def test_a_compilation_around_the_model_calls_the_routed_step() -> None:
    model, batch = toy(), toy_batch(8)
    around = torch.compile(model, backend="eager")
    for seed in range(3):
        assert_routed(model, toy_batch(8, seed=seed), around)
    assert model.cggr.captures == 1
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(around(**inputs)[0], Toy.forward(model, **inputs)[0])
    model.eval()
    assert torch.equal(around(**batch)[0], Toy.forward(model, **batch)[0])


def test_a_compiled_step_around_the_model() -> None:
    model, batch = toy(), toy_batch(8)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch)[0] * 2
        loss.backward()
        return loss

    compiled_step = torch.compile(step, backend="eager")
    for _ in range(2):
        model.zero_grad()
        loss = compiled_step(batch)
    rows = model.cggr.selected
    assert torch.equal(loss, Toy.forward(model, **{name: x[rows] for name, x in batch.items()})[0] * 2)
    assert model.head.weight.grad is not None
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile around it with fullgraph=False"):
        torch.compile(step, backend="eager", fullgraph=True)(batch)


@pytest.mark.parametrize("strict", [False, True])
def test_an_optimised_model_in_eval_mode_is_exported(strict: bool) -> None:
    model, batch = toy().eval(), toy_batch(8)
    inputs = {"input_ids": batch["input_ids"]}
    exported = torch.export.export(model, (), inputs, strict=strict).module()
    assert torch.equal(exported(**inputs)[0], Toy.forward(model, **inputs)[0])
