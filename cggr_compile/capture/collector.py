"""Python's garbage collector while programs are made: they are many objects that stay, and little garbage.

A collection goes through all objects of the process. It comes when enough of them are new, so those of a trace and a
compilation cause some at once, and one more later, in the middle of the training loop.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Keeps Python from looking for garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collected_at_the_end() -> Iterator[None]:
    """Paused; then one collection, which finds what is new, so that no later one comes on its account."""
    with paused():
        yield
    if gc.isenabled():
        gc.collect()
