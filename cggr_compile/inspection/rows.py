"""The lines of a diff: which match, how they are marked, and which of them are shown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cggr_compile.inspection.graph_text import Line

CONTEXT = 3
LEGEND = "'-' captured, '+' rewritten, '~' the same node on k rows or tokens in place of all"


@dataclass(frozen=True)
class Row:
    """One line of a diff: mark (` `, `-`, `+` or `~`), line numbers on either side from 1, and text."""

    mark: str
    before: int | None
    after: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.mark} {self.text}".rstrip()


def compare(before: Sequence[Line], after: Sequence[Line]) -> list[Row]:
    """Matches lines by key; matched lines whose text differs are marked `~` and shown as they are afterwards."""
    matcher = difflib.SequenceMatcher(None, [line.key for line in before], [line.key for line in after], autojunk=False)
    rows: list[Row] = []
    for kind, b0, b1, a0, a1 in matcher.get_opcodes():
        if kind == "equal":
            for b, a in zip(range(b0, b1), range(a0, a1), strict=True):
                mark = " " if before[b].text == after[a].text else "~"
                rows.append(Row(mark, b + 1, a + 1, after[a].text))
            continue
        rows += [Row("-", b + 1, None, before[b].text) for b in range(b0, b1)]
        rows += [Row("+", None, a + 1, after[a].text) for a in range(a0, a1)]
    return rows


def count_lines(counts: dict[str, tuple[int, int]]) -> list[str]:
    """`aten.linear: 22 -> 40 (+18)` for each operator."""
    return [f"{name}: {before} -> {after} ({after - before:+d})" for name, (before, after) in counts.items()]


def unified(rows: Sequence[Row]) -> Iterator[str]:
    """The rows with CONTEXT unchanged lines around changes; what is left out is counted."""
    near = nearby(rows)
    skipped = 0
    for row, shown in zip(rows, near, strict=True):
        if not shown:
            skipped += 1
            continue
        if skipped:
            yield f"@@ {skipped} unchanged @@"
        skipped = 0
        yield str(row)
    if skipped:
        yield f"@@ {skipped} unchanged @@"


def nearby(rows: Sequence[Row], marks: str = "-+~") -> list[bool]:
    """Which rows lie within CONTEXT lines of a row with one of the marks."""
    near = [False] * len(rows)
    for index, row in enumerate(rows):
        if row.mark in marks:
            for close in range(max(0, index - CONTEXT), min(len(rows), index + CONTEXT + 1)):
                near[close] = True
    return near
