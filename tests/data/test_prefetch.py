"""Items from a thread: order, errors in their turn, how far ahead, and that the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_compile.data.prefetch import prefetched


def counted(number: int, made: list[int], error: Exception | None = None) -> Iterator[int]:
    for i in range(number):
        made.append(i)
        yield i
    if error is not None:
        raise error


@given(number=st.integers(0, 6), depth=st.integers(1, 4), fails=st.booleans(), stop=st.integers(0, 7))
def test_items_come_in_order_and_the_thread_ends(number: int, depth: int, fails: bool, stop: int) -> None:
    threads = threading.active_count()
    made: list[int] = []
    error = OSError("disk") if fails else None
    got = []

    def consume() -> None:
        for item in prefetched(counted(number, made, error), depth):
            got.append(item)
            assert len(made) <= len(got) + depth
            if len(got) == stop:
                return

    if fails and not 0 < stop <= number:
        with pytest.raises(OSError, match="disk") as raised:
            consume()
        assert raised.value is error
    else:
        consume()
    assert got == list(range(min(number, stop) if stop else number))
    assert threading.active_count() == threads


def test_items_are_made_while_the_consumer_works() -> None:
    second = threading.Event()

    def items() -> Iterator[str]:
        yield threading.current_thread().name
        second.set()
        yield threading.current_thread().name

    names = prefetched(items(), 1)
    assert next(names).startswith("cggr-prefetch")
    assert second.wait(10)
    names.close()


def test_closing_makes_no_further_item() -> None:
    entered, leave = threading.Event(), threading.Event()
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in counted(9, made):
            if i == 1:
                entered.set()
                leave.wait(10)
            yield i

    some = prefetched(items(), 3)
    assert next(some) == 0
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    some.close()
    assert made == [0, 1]


def test_an_error_of_the_consumer_ends_the_thread() -> None:
    threads = threading.active_count()

    def consume() -> None:
        for _ in prefetched(iter(range(9)), 2):
            raise KeyError

    with pytest.raises(KeyError) as raised:
        consume()
    assert raised.tb is not None  # it holds the frame of the loop
    assert threading.active_count() == threads


def test_the_thread_has_the_cuda_device_of_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the current device for each thread, and pins memory by it."""
    where: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: where.append((d, threading.current_thread().name)))
    assert list(prefetched(iter("ab"), 2)) == ["a", "b"]
    assert [(device, name.startswith("cggr-prefetch")) for device, name in where] == [(3, True)]


def test_several_iterators_have_threads_of_their_own() -> None:
    with ThreadPoolExecutor(3) as consumers:
        lists = consumers.map(lambda n: list(prefetched(iter(range(n)), 2)), (5, 0, 7))
        assert [len(each) for each in lists] == [5, 0, 7]
