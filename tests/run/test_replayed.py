"""Replayed steps against autograd on the run ones, whatever a loop holds and when: CUDA graphs played on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs_on_cpu import graphs_on_cpu  # noqa: F401  a fixture
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cggr_compile.run.cuda_graphs import Replayed
from cggr_compile.run.graph_memory import Pool

pytestmark = pytest.mark.usefixtures("graphs_on_cpu")

HOLDERS: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x.detach(), lambda x: x.view(-1)[1:]]


def run(x: Tensor, weight: Tensor, bias: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor, None]:
    hidden = torch.tanh(x @ weight.T + bias + frozen)
    return (hidden @ weight).pow(2).mean(), hidden.detach().sum(), None


class Loop:
    """A model whose steps are replayed, by the size of the batch, and the same one whose steps are run."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.pool = Pool()
        self.replayed: dict[int, Replayed] = {}
        self.parameters = [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))]
        self.plain = [nn.Parameter(x.detach().clone()) for x in self.parameters]
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.held: list[tuple[Tensor, Tensor]] = []

    def forward(self, rows: int) -> tuple[Tensor, Tensor]:
        """The losses of the two."""
        step = self.replayed.setdefault(rows, Replayed(run, self.pool, None))
        x = torch.randn(rows, 3)
        (loss, total, nothing), expected = step(x, *self.parameters, self.frozen), run(x, *self.plain, self.frozen)
        assert nothing is None
        assert torch.equal(loss, expected[0])
        assert torch.equal(total, expected[1])
        self.held += [(loss.detach(), expected[0].detach()), (total, expected[1])]
        return loss, expected[0]

    def backward(self, losses: tuple[Tensor, Tensor], factor: float = 1.0) -> None:
        for loss in losses:
            (factor * loss).backward()
        self.check()

    def clear(self, zeros: bool = False) -> None:
        for x in (*self.parameters, *self.plain):
            if x.grad is not None:
                x.grad = x.grad.zero_() if zeros else None

    def update(self) -> None:
        with torch.no_grad():
            for x in (*self.parameters, *self.plain):
                if x.grad is not None:
                    x -= 0.1 * x.grad

    def hold(self, holder: Callable[[Tensor], Tensor]) -> None:
        for x, y in zip(self.parameters, self.plain, strict=True):
            if x.grad is not None:
                self.held.append((holder(x.grad), holder(y.grad)))

    def check(self) -> None:
        for x, y in zip(self.parameters, self.plain, strict=True):
            assert torch.equal(x, y)
            assert (x.grad is None) == (y.grad is None)
            assert x.grad is None or torch.equal(x.grad, y.grad)
        for x, y in self.held:
            assert torch.equal(x, y)

    @property
    def recordings(self) -> int:
        return sum(step.recordings for step in self.replayed.values())


def test_loops_that_clear_gradients_first_get_them_where_they_are() -> None:
    loop, places = Loop(), []
    for _ in range(6):
        loop.clear()
        loop.backward(loop.forward(4))
        places.append(loop.parameters[0].grad.data_ptr())
        loop.update()
    assert len(set(places[1:])) == 1
    assert (loop.recordings, loop.pool.lending.copies) == (1, False)


def test_loops_that_add_up_get_copies_from_the_first_recording_on() -> None:
    loop = Loop()
    for _ in range(3):
        loop.clear()
        for rows in (4, 4, 2, 4):
            loop.backward(loop.forward(rows), 0.25)
        loop.update()
    assert (loop.recordings, loop.pool.lending.copies) == (2, True)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_held_gradient_costs_one_more_recording(holder: Callable[[Tensor], Tensor]) -> None:
    loop = Loop()
    for step in range(8):
        loop.clear()
        loop.backward(loop.forward(4))
        if step in (3, 5):
            loop.hold(holder)
    assert (loop.recordings, loop.pool.lending.copies) == (2, True)


@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_that_live_up_to_the_next_backward(zeros: bool) -> None:
    loop = Loop()
    for _ in range(4):
        losses = loop.forward(4)
        loop.clear(zeros)
        loop.backward(losses)
    assert (loop.recordings, loop.pool.lending.copies) == (1, True)


def test_a_forward_beside_another_is_run() -> None:
    loop = Loop()
    for _ in range(3):
        loop.clear()
        for losses in [loop.forward(4) for _ in range(3)]:
            loop.backward(losses)
    assert loop.recordings == 1


def test_a_second_backward_raises() -> None:
    loop = Loop()
    for _ in range(2):
        loss, _ = loop.forward(4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran twice.*cuda_graphs=False"):
        loss.backward()


def test_a_parameter_that_moved_is_recorded_anew() -> None:
    loop = Loop()
    for step in range(6):
        if step == 3:
            loop.parameters[0].data = loop.parameters[0].data.clone()
        loop.clear()
        loop.backward(loop.forward(4))
    assert loop.recordings == 2


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 3), st.sampled_from([0.5, 1.0])),
    st.tuples(st.just("forward alone"), st.integers(1, 3)),
    st.tuples(st.just("side by side"), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.just("clear"), st.booleans()),
    st.tuples(st.just("clear")),
    st.tuples(st.just("hold"), st.sampled_from(HOLDERS)),
    st.tuples(st.just("release")),
    st.tuples(st.just("update")),
    st.tuples(st.just("move")),
)


@given(st.lists(ACTIONS, max_size=24))
def test_any_loop(actions: list[tuple[Any, ...]]) -> None:
    loop = Loop()
    for name, *arguments in actions:
        match name:
            case "step":
                loop.backward(loop.forward(arguments[0]), arguments[1])
            case "forward alone":
                loop.forward(arguments[0])
            case "side by side":
                first, second = map(loop.forward, arguments)
                loop.backward(first)
                loop.backward(second)
            case "clear":
                loop.clear(*arguments)
            case "hold":
                loop.hold(*arguments)
            case "release":
                loop.held.clear()
            case "update":
                loop.update()
            case "move":
                loop.parameters[0].data = loop.parameters[0].data.clone()
        loop.check()
