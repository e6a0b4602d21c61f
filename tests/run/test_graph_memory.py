"""Gradients that are lent: whether somebody holds one, and that two never share memory. Replays are played on the CPU
by writing where they would."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cggr_compile.run.graph_memory import Lending

HOLDERS: list[Callable[[Tensor], object]] = [
    lambda gradient: gradient,
    lambda gradient: gradient.detach(),
    lambda gradient: gradient.view(-1)[1:],
    lambda gradient: [gradient[:1]],
]


class Recording:
    """A backward with gradients at fixed places; a replay writes the number of the step to all of them."""

    def __init__(self, lending: Lending) -> None:
        self.lending = lending
        self.memory = [torch.zeros(2, 3), None, torch.zeros(4), torch.zeros(())]

    def backward(self, step: float) -> list[Tensor | None]:
        assert not self.lending.held
        for x in self.memory:
            if x is not None:
                x.fill_(step)
        return self.lending.hand_out(self.memory)


def places(gradients: list[Tensor | None]) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in gradients]


def test_what_nobody_holds_is_lent_again() -> None:
    recording = Recording(Lending())
    for step in range(4):
        found = recording.backward(step)
        assert places(found) == places(recording.memory)
        assert all(x is None or bool((x == step).all()) for x in found)
        del found


@pytest.mark.parametrize("hold", HOLDERS)
def test_a_holder_is_noticed_until_it_lets_go(hold: Callable[[Tensor], object]) -> None:
    lending = Lending()
    recording = Recording(lending)
    held = hold(recording.backward(1)[0])
    assert lending.held
    assert lending.held
    del held
    assert not lending.held


def test_a_gradient_of_a_recording_that_is_gone_is_still_held() -> None:
    lending = Lending()
    held = Recording(lending).backward(1)[0]
    assert lending.held
    del held
    assert not lending.held


def test_copies_are_nobody_elses() -> None:
    lending = Lending()
    lending.copies = True
    recording = Recording(lending)
    first = recording.backward(1)
    second = recording.backward(2)
    assert all(x is None or bool((x == 1).all()) for x in first)
    assert all(x is None or bool((x == 2).all()) for x in second)
    assert not lending.held


def test_gradients_that_share_memory_are_copied() -> None:
    whole, alone, twice = torch.arange(6.0), torch.arange(2.0), torch.arange(3.0)
    gradients = [whole[:3], whole[3:], alone, twice, twice]
    found = Lending().hand_out(gradients)
    assert all(bool((x == y).all()) for x, y in zip(found, gradients, strict=True))
    assert len({x.untyped_storage().data_ptr() for x in found}) == 5
    assert found[2].data_ptr() == alone.data_ptr()


def test_a_gradient_that_something_else_refers_to_is_copied() -> None:
    x = torch.zeros(3)
    constant = x.view(3)
    (found,) = Lending().hand_out([x])
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
    assert parameter.grad.data_ptr() == recording.memory[0].data_ptr()
    assert recording.lending.held
    parameter.grad = None
    assert not recording.lending.held


def tensor_of(held: object) -> Tensor:
    return held[0] if isinstance(held, list) else held


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, len(HOLDERS)), st.booleans()), max_size=12))
def test_no_replay_changes_what_is_held(steps: list[tuple[int, int, bool]]) -> None:
    """Two recordings in the same memory by turns, which are not replayed while anything is held."""
    lending = Lending()
    recordings = [Recording(lending), Recording(lending)]
    recordings[1].memory = recordings[0].memory
    held: list[tuple[object, float]] = []
    for step, (which, holder, release) in enumerate(steps, 1):
        if release:
            held.clear()
        if lending.held:
            assert held
            continue
        found = recordings[which].backward(step)[0]
        if holder:
            held.append((HOLDERS[holder - 1](found), float(step)))
        del found
        assert all(bool((tensor_of(kept) == value).all()) for kept, value in held)
