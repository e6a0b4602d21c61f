"""Programs that tests start in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def environment() -> dict[str, str]:
    """This process's, with the program's folder on its sys.path as it is for a user: without PYTHONSAFEPATH."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def selected_rows(model: Any, batch: Mapping[str, Any], queue: Any) -> None:
    """Puts the rows that a training step of a routed model selects into a queue."""
    model(**batch)
    queue.put(model.cggr.selected.tolist())
