"""A checkpoint around a routed model: its backward belongs to the rows of its loss, whatever is drawn or decided."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from toys import WIDTH, Toy, toy_batch

import cggr_compile as cggr

OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 2, "inner": "eager", "seed": 3}
SAMPLED = {"router_head": "sampled", "router_head_frequent": 2, "router_head_sampled": 3}
DRAWING = {
    "random": {"selection": "random"},
    "trimmed": {"selection": "trimmed"},
    "importance": {"selection": "importance"},
    "stratified": {"selection": "stratified"},
    "sampled head": SAMPLED,
    "tokens": {"route": "token", "selection": "random"},
    "losses": {"route": "loss", "selection": "random"},
    "threshold": {"dynamic_threshold": True},
    "auto": {"selection": "auto"},
    "warm-up": {"selection": "random", "warmup_steps": 4},
}


def optimized(**options: Any) -> Toy:
    torch.manual_seed(0)
    return cggr.optimize(Toy(4).train(), **{**OPTIONS, **options})


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [toy_batch(8, 12, seed=seed) for seed in range(count)]


def gradients(model: Toy) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def checkpointed(step: Callable[..., torch.Tensor], **options: Any) -> torch.Tensor:
    return checkpoint(step, use_reentrant=False, **options)


def assert_same_as_without(model: Toy, run: Callable[[Toy, bool], torch.Tensor]) -> None:
    """`run(model, around)` returns a loss: with checkpoints around and without, loss, gradients, and what the model
    remembers are bitwise the same, and the second run of a step leaves no trace."""
    twin = copy.deepcopy(model)
    loss = run(model, True)
    model.cggr.step()  # counted between forward and backward, as a pipeline does
    before, kept, metrics = model.cggr.state_dict(), model.cggr.runtime.last, model.cggr.metrics()
    loss.backward()
    expected = run(twin, False)
    twin.cggr.step()
    expected.backward()
    assert torch.equal(loss, expected)
    for actual, wanted in zip(gradients(model), gradients(twin), strict=True):
        assert torch.equal(actual, wanted)
    assert model.cggr.runtime.last is kept
    assert str(model.cggr.state_dict()) == str(before) == str(twin.cggr.state_dict())
    assert model.cggr.metrics().keys() == metrics.keys() | {"parameters_without_gradient"}


IN_CI = ("random", "sampled head", "tokens", "auto")


@pytest.mark.parametrize(
    "options",
    [pytest.param(DRAWING[name], id=name, marks=[] if name in IN_CI else pytest.mark.long) for name in DRAWING],
)
def test_gradients_belong_to_the_rows_of_the_loss(options: dict[str, Any]) -> None:
    """Three checkpoints wait for one backward, two of them over the same batch; the first compiles."""
    first, second = batches(2)

    def run(model: Toy, around: bool) -> torch.Tensor:
        total = torch.zeros(())
        for batch in (first, second, first):
            step = lambda batch=batch: model(**batch)[0]  # noqa: E731
            total = total + (checkpointed(step) if around else step())
        return total

    assert_same_as_without(optimized(**options), run)


def test_nested_checkpoints_several_calls_in_one_and_a_second_backward() -> None:
    first, second = batches(2)
    model = optimized(selection="random")

    def both(model: Toy, around: bool) -> torch.Tensor:
        def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(**batch)[0]

        def pair() -> torch.Tensor:
            inner = checkpointed(lambda: step(first)) if around else step(first)
            return (inner * step(second) * step(first)).log()

        return checkpointed(pair) if around else pair()

    assert_same_as_without(model, both)
    model.zero_grad()
    twice = checkpointed(lambda: model(**first)[0])
    once = torch.autograd.grad(twice, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(twice, list(model.parameters()))
    assert all(map(torch.equal, once, again))
    del twice
    assert not model.cggr.runtime.recomputations._calls


@pytest.mark.parametrize("options", [{}, {"inner": "aot_eager"}], ids=["eager", "aot_eager"])
def test_scores_that_were_given_and_no_early_stop(options: dict[str, Any]) -> None:
    batch = batches(1)[0]

    def run(model: Toy, around: bool) -> torch.Tensor:
        model.cggr.use_scores(torch.arange(8.0))
        step = lambda: model(**batch)[0]  # noqa: E731
        return checkpointed(step, early_stop=False) if around else step()

    model = optimized(**options)
    assert_same_as_without(model, run)
    assert model.cggr.selected.tolist() == [4, 5, 6, 7]


def test_hooks_of_the_callers_do_not_hide_the_checkpoint() -> None:
    batch = batches(1)[0]

    def run(model: Toy, around: bool) -> torch.Tensor:
        def step() -> torch.Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model(**batch)[0]

        return checkpointed(lambda: step() * 2) if around else step() * 2

    assert_same_as_without(optimized(selection="random"), run)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "random"},
        {"ratio": 1.0, "inner": "aot_eager", "outline_layers": True},
        {"selection": "topk", "inner": "aot_eager", "warmup_steps": 4},
    ],
)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_hooks_of_the_callers_see_the_tensors_that_steps_save_and_no_trace(
    options: dict[str, Any], checkpoints: bool
) -> None:
    """From the first step on, in which everything is captured and compiled."""
    model, seen = optimized(**options), []
    twin, saved = copy.deepcopy(model), []

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return x.detach().clone()

    def step(model: Toy, hooks: bool) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x) if hooks else contextlib.nullcontext():
            return checkpointed(lambda: model(**batches(1)[0])[0]) if checkpoints else model(**batches(1)[0])[0]

    for _ in range(2):
        seen.clear()
        loss = step(model, hooks=True)
        loss.backward()
        saved.append(len(seen))
        assert set(seen) <= {torch.Tensor, torch.nn.Parameter}
    # A checkpoint's forward saves its own inputs at most (torch 2.11), and keeps its hooks in front of the caller's.
    assert saved[0] == saved[1]
    assert (saved[0] > 1) is not checkpoints
    for _ in range(2):
        expected = step(twin, hooks=False)
        expected.backward()
    assert torch.equal(loss, expected)
    for actual, wanted in zip(gradients(model), gradients(twin), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("fallback", ["raise", "eager"])
def test_what_cannot_be_run_again_is_refused(fallback: str) -> None:
    """A reentrant checkpoint's loss is the whole batch's; a model that changes meanwhile is another step's."""
    model, batch = optimized(selection="random", fallback=fallback), batches(1)[0]
    needed = torch.ones((), requires_grad=True)
    loss = checkpoint(lambda scale: model(**batch)[0] * scale, needed, use_reentrant=True)
    with pytest.raises(cggr.CannotOptimize, match=r"a backward runs the model again.*use_reentrant=False"):
        loss.backward()
    loss = checkpointed(lambda: model(**batch)[0])
    model.layers.append(torch.nn.Linear(WIDTH, WIDTH))
    with pytest.raises(cggr.CannotOptimize, match="a checkpoint runs the model again, and not the step that it ran"):
        loss.backward()


class OfItsOwn(Toy):
    """A loss that no route knows."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.logsumexp(-1) * labels).mean()


def test_a_step_that_fell_back_is_run_again_as_it_was() -> None:
    model, batch = cggr.optimize(OfItsOwn().train(), fallback="eager", inner="eager"), batches(1)[0]
    eager = cggr.restore(copy.deepcopy(model))
    with pytest.warns(RuntimeWarning, match="training without routing"):
        loss = checkpointed(lambda: model(**batch)[0])
    loss.backward()
    expected = eager(**batch)[0]
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients(model), gradients(eager)))
