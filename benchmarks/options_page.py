"""Writes docs/options.md: every option with its default and what `RoutingConfig`'s docstring says of it.

python benchmarks/options_page.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from cggr_compile import RoutingConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

`cggr.optimize(model, **options)`, `cggr.explain`, `cggr.RoutingConfig` and `torch.compile(model, backend="cggr",
options={...})` take the same. This page is `RoutingConfig`'s docstring, by `python benchmarks/options_page.py`.

| option | default | |
| --- | --- | --- |
"""


def described() -> dict[str, str]:
    """What the docstring says of each option; options that share an entry have the same text."""
    text = inspect.getdoc(RoutingConfig) or ""
    entries = text.partition("Attributes:\n")[2]
    found = {}
    for entry in re.split(r"\n(?= {4}\w)", "\n" + inspect.cleandoc("    \n" + entries).replace("\n", "\n    ")):
        names, _, meaning = entry.strip().partition(": ")
        if meaning:
            found[names] = re.sub(r"\s+", " ", meaning)
    return found


def page() -> str:
    """The page."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(RoutingConfig)}
    rows, shown = [], []
    for names, meaning in described().items():
        each = names.split(", ")
        shown += each
        default = ", ".join(f"`{defaults[name]!r}`".replace("'", '"') for name in each)
        rows.append(
            f"| {', '.join(f'`{name}`' for name in each)} | {default} | {meaning.replace('|', chr(92) + '|')} |"
        )
    missing = sorted(set(defaults) - set(shown))
    if missing:
        raise ValueError(f"RoutingConfig's docstring does not describe {', '.join(missing)}")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
