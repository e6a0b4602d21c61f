"""Gradients that are lent: who holds one keeps its values. A replay is played by writing where it would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cggr_compile.graph_memory import Lending, gradients_of

HOLDERS: list[Callable[[Tensor], object]] = [
    lambda gradient: gradient,
    lambda gradient: gradient.detach(),
    lambda gradient: gradient.view(-1)[1:],
    lambda gradient: [gradient[:1]],
]


class Recording:
    """A backward with gradients at fixed places; a replay writes the number of the step to all of them."""

    def __init__(self, lending: Lending, backward_alone: bool = True) -> None:
        self.lending = lending
        self.memory = [torch.zeros(2, 3), None, torch.zeros(4), torch.zeros(())]
        self.gradients = gradients_of(self.memory, lambda x: backward_alone)

    def backward(self, step: float) -> list[Tensor | None]:
        with self.lending.held_kept():
            for x in self.memory:
                if x is not None:
                    x.fill_(step)
            return self.lending.hand_out(self.gradients)

    def places(self) -> list[int | None]:
        return [None if x is None else x.data_ptr() for x in self.memory]


def places(gradients: list[Tensor | None]) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in gradients]


def test_what_nobody_holds_is_lent_again() -> None:
    lending = Lending()
    recording = Recording(lending)
    for step in range(4):
        found = recording.backward(step)
        assert places(found) == recording.places()
        assert all(x is None or bool((x == step).all()) for x in found)
        del found
    assert not lending.copies


@pytest.mark.parametrize("hold", HOLDERS)
def test_what_is_held_keeps_its_values(hold: Callable[[Tensor], object]) -> None:
    lending = Lending()
    recording = Recording(lending)
    held = hold(recording.backward(1)[0])
    for step in (2, 3):
        found = recording.backward(step)
        assert all(x is None or bool((x == step).all()) for x in found)
    kept = held[0] if isinstance(held, list) else held
    assert bool((kept == 1).all())
    assert lending.copies


def test_gradients_of_a_recording_that_is_gone_are_kept_too() -> None:
    lending = Lending()
    first, second = Recording(lending), Recording(lending)
    second.memory[0] = first.memory[0]  # as if what the one needs in between lay where the other's gradient is
    held = first.backward(1)[0]
    del first
    second.backward(2)
    assert bool((held == 1).all())


def test_memory_that_is_written_by_others_is_not_lent() -> None:
    recording = Recording(Lending(), backward_alone=False)
    found = recording.backward(1)
    assert all(x is None or x.data_ptr() != place for x, place in zip(found, recording.places(), strict=True))


def test_gradients_that_share_memory_are_not_lent() -> None:
    whole = torch.zeros(6)
    gradients = gradients_of([whole[:3], whole[3:], torch.zeros(2)], lambda x: True)
    found = Lending().hand_out(gradients)
    shared = range(whole.data_ptr(), whole.data_ptr() + 24)
    assert [x.data_ptr() in shared for x in found] == [False, False, False]
    assert found[2].data_ptr() == gradients[2].tensor.data_ptr()


def test_gradients_that_something_else_refers_to_are_not_lent() -> None:
    x = torch.zeros(3)
    constant = x.view(3)
    (found,) = Lending().hand_out(gradients_of([x], lambda x: True))
    assert found.data_ptr() != constant.data_ptr()


def test_autograd_takes_what_is_lent() -> None:
    recording = Recording(Lending())
    parameter = torch.nn.Parameter(torch.zeros(2, 3))

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, _: Tensor) -> Tensor:
            return recording.backward(1)[0]

    Step.apply(parameter).backward()
    assert parameter.grad.data_ptr() == recording.places()[0]
    parameter.grad = None
    Step.apply(parameter).backward()
    assert not recording.lending.copies


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.booleans()), max_size=12))
def test_micro_batches_add_up(steps: list[tuple[int, int, bool]]) -> None:
    """Two recordings by turns, a gradient held by one of four holders or not, `.grad` added up by hand."""
    lending = Lending()
    recordings = [Recording(lending), Recording(lending)]
    held: list[tuple[Tensor, float]] = []
    total, expected = None, 0.0
    for step, (which, holder, clear) in enumerate(steps, 1):
        found = recordings[which].backward(step)[0]
        if clear:
            total, expected = found, float(step)
        else:
            total, expected = found if total is None else total.add_(found), expected + step
        if holder:
            kept = HOLDERS[holder](recordings[which].backward(step)[0])
            held.append((kept[0] if isinstance(kept, list) else kept, float(step)))
        del found
        assert bool((total == expected).all())
        assert all(bool((x == value).all()) for x, value in held)
