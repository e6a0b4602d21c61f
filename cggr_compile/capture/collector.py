"""Python's garbage collector while programs are made: they are many objects that stay, and little garbage.

A collection goes through all objects of the process. It comes when enough of them are new, so those of a trace and a
compilation cause some at once, and one more later, in the middle of the training loop.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pauses:
    """Those under way, in all threads, and whether the collector was on before the first."""

    lock = threading.Lock()
    number = 0
    was_on = False


@contextmanager
def paused() -> Iterator[None]:
    """Keeps Python from looking for garbage, until the last thread that asked for it is done."""
    with _Pauses.lock:
        if _Pauses.number == 0:
            _Pauses.was_on = gc.isenabled()
            gc.disable()
        _Pauses.number += 1
    try:
        yield
    finally:
        with _Pauses.lock:
            _Pauses.number -= 1
            if _Pauses.number == 0 and _Pauses.was_on:
                gc.enable()


@contextmanager
def collected_at_the_end() -> Iterator[None]:
    """Paused; then one collection, which finds what is new, so that no later one comes on its account."""
    with paused():
        yield
    if gc.isenabled():
        gc.collect()
