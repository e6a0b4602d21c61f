"""Items made by a thread while the consumer works on those before.

One executor with one worker: futures keep the order, carry what was raised, and count how far it is ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The items in their order, up to `depth` of them made ahead by a thread of this iterator's own.

    What `items` raises is raised here, in its turn. The thread ends with the items, with an error, and when the
    iterator is closed or dropped, as a `for` does on `break`; that waits for the item in the making. The thread's
    current CUDA device is the consumer's.
    """
    end: Any = object()
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else (None, ())
    with ThreadPoolExecutor(1, "cggr-prefetch", *device) as thread:
        ahead = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in ahead:
                future.cancel()
