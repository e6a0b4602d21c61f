"""Private corners of inductor: the processes that compile its kernels."""

from __future__ import annotations


def start_inductor_workers() -> None:
    """Starts the processes that compile inductor's kernels: inductor itself does when it is first called, which here is
    after the passes."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()
