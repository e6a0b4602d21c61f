"""What is logged of what a run does by itself."""

from __future__ import annotations

import logging

from cggr_compile.torch_internals.distributed import all_ranks

_log = logging.getLogger("cggr_compile")


def notice(message: str, alike: bool = True) -> None:
    """Logs what all ranks do `alike` once, by the first of them, and else by each: a warning, since nobody sees less
    without having set up logging."""
    ranks = all_ranks()
    if ranks is None or ranks.rank == 0 or not alike:
        _log.warning("cggr: %s", message)
