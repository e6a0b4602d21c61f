"""Programs that tests start in processes of their own."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """This process's, with the program's folder on its sys.path as it is for a user: without PYTHONSAFEPATH."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
