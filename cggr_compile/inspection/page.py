"""The HTML page of a diff: one file without external resources, for light and dark schemes, wide and narrow screens.

Runs of lines that did not change, or only in their number of rows, are folded; so are long insertions. Everything
is in the page, nothing needs a script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Protocol

from cggr_compile.inspection.figure import figure
from cggr_compile.inspection.report import Report
from cggr_compile.inspection.rows import LEGEND, Row, count_lines, nearby
from cggr_compile.inspection.wording import all_kept_text

_KINDS = {" ": "same", "-": "gone", "+": "come", "~": "rows"}
_GROUPS = {" ": "kept", "~": "kept", "-": "changed", "+": "changed"}
_LONGEST = {"kept": 10, "changed": 40, "heading": 1}


class Rewrite(Protocol):
    """What a page shows: a diff."""

    @property
    def report(self) -> Report:
        """The facts."""

    def summary(self) -> str:
        """In model terms."""

    def op_counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By kind of change."""

    def rows(self) -> list[Row]:
        """The full diff."""

    def pass_rows(self) -> Iterator[tuple[str, list[Row]]]:
        """The diff of each pass."""


def render(diff: Rewrite) -> str:
    """The page of one diff."""
    template = Template(files("cggr_compile.inspection").joinpath("page.html").read_text(encoding="utf-8"))
    rows = diff.rows()
    return template.substitute(
        title=escape(_title(diff)),
        subtitle=escape(_subtitle(diff)),
        summary="\n".join(_summary_line(line) for line in diff.summary().splitlines()),
        figure=figure(diff.report),
        report="\n".join(_table(title, pairs) for title, pairs in diff.report.sections()),
        counts=_counts(diff.op_counts()),
        passes="\n".join(_pass(name, rows) for name, rows in diff.pass_rows()),
        legend=escape(LEGEND),
        tally=escape(_tally(rows)),
        graph=_listing(rows),
    )


def _title(diff: Rewrite) -> str:
    report = diff.report
    stack = f"{report.stack.layers} layers" if report.stack else "model"
    return f"cggr rewrite · {stack}, {report.head.objective} objective"


def _subtitle(diff: Rewrite) -> str:
    report = diff.report
    if not report.routed:
        return f"Every row trains: {report.unrouted}."
    return (
        f"{all_kept_text(report.amounts)} train; "
        f"a step is predicted to cost {report.cost.step_ratio:.0%} of a plain one."
    )


def _summary_line(line: str) -> str:
    kind = _KINDS.get(line[0], "same") if line[1:2] == " " else "same"
    return f'<li class="{kind}">{escape(line)}</li>'


def _table(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in pairs)
    return f"<section><h3>{escape(title)}</h3><table>{cells}</table></section>"


def _counts(counts: dict[str, dict[str, tuple[int, int]]]) -> str:
    blocks = []
    for name, changed in counts.items():
        if not changed:
            blocks.append(
                f'<p class="idle"><code>{escape(name)}</code> <small>leaves the operators as they are</small></p>'
            )
            continue
        lines = "\n".join(map(escape, count_lines(changed)))
        changes = f"{len(changed)} operators" if len(changed) != 1 else "1 operator"
        blocks.append(
            f"<details><summary><code>{escape(name)}</code> <small>{changes}</small></summary>"
            f"<pre>{lines}</pre></details>"
        )
    return "\n".join(blocks)


def _pass(name: str, rows: Sequence[Row]) -> str:
    return (
        f"<details><summary><code>{escape(name)}</code> <small>{escape(_tally(rows))}</small></summary>"
        f"{_excerpt(rows)}</details>"
    )


def _tally(rows: Sequence[Row]) -> str:
    marks = [row.mark for row in rows]
    counted = (("+", "added"), ("-", "removed"), ("~", "on k rows"), (" ", "unchanged"))
    return ", ".join(f"{marks.count(mark):,} {name}" for mark, name in counted if mark in marks)


def _excerpt(rows: Sequence[Row]) -> str:
    """Added and removed lines with their neighbours; the rest is only counted."""
    near = nearby(rows, "-+")
    blocks = []
    for shown, group in groupby(zip(rows, near, strict=True), key=lambda pair: pair[1]):
        run = [row for row, _ in group]
        blocks.append("".join(map(_line, run)) if shown else f'<div class="gap">⋯ {escape(_tally(run))}</div>')
    return f'<div class="graph"><div>{"".join(blocks)}</div></div>'


def _listing(rows: Sequence[Row]) -> str:
    """Every line; long runs that changed nothing but the rows are folded, so are long changes, with their ends left
    visible."""
    blocks = []
    for group, members in groupby(rows, key=_group):
        run = list(members)
        lines = list(map(_line, run))
        if len(run) <= _LONGEST[group]:
            blocks += lines
            continue
        fold = f"<summary>⋯ {escape(_tally(run[3:-3]))}</summary>"
        blocks += [*lines[:3], f"<details>{fold}{''.join(lines[3:-3])}</details>", *lines[-3:]]
    return f'<div class="graph"><div>{"".join(blocks)}</div></div>'


def _group(row: Row) -> str:
    return "heading" if row.text.startswith("── ") else _GROUPS[row.mark]


def _line(row: Row) -> str:
    code, comment_mark, comment = row.text.partition("    # ")
    note = f"<q>{escape(comment_mark + comment)}</q>" if comment else ""
    heading = " part" if _group(row) == "heading" else ""
    return (
        f'<p class="{_KINDS[row.mark]}{heading}"><i>{row.before or ""}</i><i>{row.after or ""}</i>'
        f"<b>{row.mark}</b>{escape(code)}{note}</p>"
    )
