"""Searches for garbage: none while a step compiles, one behind it, none in the steps that follow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.capture.collector import paused


@pytest.fixture
def searches() -> Iterator[list[int]]:
    """The generation of each search that was made."""
    found: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


@pytest.mark.parametrize(
    ("options", "programs"), [({"ratio": 1.0}, 1), ({"selection": "auto"}, 2)], ids=["every row", "auto"]
)
def test_a_capture_is_searched_once_where_it_was_compiled(
    options: dict[str, Any], programs: int, searches: list[int]
) -> None:
    """The program of `"auto"` that selects is compiled where steps begin to be counted."""
    model = cggr.optimize(Toy().train(), router_layers=1, inner="aot_eager", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(6):
        if number == 1:
            cggr.attach(model, optimizer)
        searches.clear()
        loss = model(**toy_batch(8, seed=number))[0]
        whole = searches.count(2)
        assert whole == int(number < programs), f"{searches} in step {number}"
        loss.backward()
        optimizer.step()


def test_nothing_is_searched_where_nothing_is_compiled_or_the_loop_does_it_itself(searches: list[int]) -> None:
    gc.disable()
    try:
        cggr.optimize(Toy().train(), ratio=1.0, inner="aot_eager")(**toy_batch(8))
        cggr.optimize(Toy().train(), ratio=0.5, router_layers=1, inner="eager")(**toy_batch(8))
        assert not searches
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_pauses_of_several_threads_end_with_the_last_one() -> None:
    one, other = paused(), paused()
    with ThreadPoolExecutor(1) as thread:
        one.__enter__()
        thread.submit(other.__enter__).result()
        one.__exit__(None, None, None)
        assert not gc.isenabled()
        thread.submit(other.__exit__, None, None, None).result()
    assert gc.isenabled()
