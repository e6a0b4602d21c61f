"""Runs the examples of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str, defining: str) -> dict[str, Any]:
    """The names that the page's Python example defines which defines `defining`."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    (block,) = (block for block in blocks if re.search(rf"^(def|class) {defining}\b", block, flags=re.MULTILINE))
    names: dict[str, Any] = {}
    exec(compile(block, f"{page}: {defining}", "exec"), names)
    return names
