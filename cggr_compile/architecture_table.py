"""The results of `python -m cggr_compile architectures` as a page: counts, a row a class, and why not, where not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cggr_compile.architectures import STATUSES, TEXT, Candidate, Record

_INTRODUCTION = """# Architectures: the {route} route

Every entry of transformers' {mappings}, at a tiny size, through the {route} route: captured,
rewritten, and compared with eager training on the {selection} that an independent eager router selects, with and
without padding. This page is generated from the results, by `python -m cggr_compile architectures`.

* **exact**: the same {selection}, and loss and every gradient bitwise equal, also while everything is kept.
* **rounding**: the same {selection}; loss and gradients differ by what reordered fp32 sums explain.
* **refused**: `CannotOptimize`, with the reason below.
* **not runnable**: eager training with {inputs} on the CPU raises, before this compiler is asked.
* **failure**: a mismatch, any other error, or a limit of time or memory.
"""
_TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "multimodal": "Image-text-to-text models",
}
_TEXT = ("causal-LM and masked-LM mappings", "`input_ids` and `labels`")
_WITH_IMAGES = (
    "image-text-to-text mapping",
    "`input_ids`, `labels` and two images a row (`pixel_values` [2 B, channels, height, width])",
)
_SELECTED = {"sequence": "rows", "token": "tokens"}
_UNCHECKED = (
    "* **unchecked**: the eager side cannot find the layers, or tell the tokens of what they are given: neither exact "
    "nor a failure.\n"
)


def render(
    results: Sequence[Record],
    todo: Iterable[Candidate],
    environment: dict[str, Any],
    route: str = "sequence",
    objectives: Sequence[str] = TEXT,
) -> str:
    """The page. `todo`: the candidates without a result; `route`: the one that was examined;
    `objectives`: those of the candidates."""
    missing = list(todo)
    unchecked = any(record.status == "unchecked" for record in results)
    mappings, inputs = _TEXT if objectives == TEXT else _WITH_IMAGES
    introduction = _INTRODUCTION.format(route=route, selection=_SELECTED[route], mappings=mappings, inputs=inputs) + (
        _UNCHECKED if unchecked else ""
    )
    parts = [introduction, _provenance(results, environment), _counts(results, missing, objectives)]
    for objective in objectives:
        chosen = [record for record in results if record.candidate.objective == objective]
        if chosen:
            parts.append(_table(_TITLES[objective], chosen))
    parts.append(_reasons([record for record in results if record.status not in ("exact", "not runnable")], "Why not"))
    parts.append(_reasons([record for record in results if record.status == "not runnable"], "Not runnable in eager"))
    if missing:
        parts.append("## Not run\n\n" + ", ".join(f"{c.model_type} ({c.objective})" for c in missing) + "\n")
    return "\n".join(part for part in parts if part)


def _provenance(results: Sequence[Record], environment: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if version != "absent"
    )
    commits = ", ".join(f"{commit} ({count})" for commit, count in Counter(r.commit for r in results).most_common())
    return f"`{environment['command']}`, {environment['device']}, {versions}; results by commit: {commits}.\n"


def _counts(results: Sequence[Record], missing: Sequence[Candidate], objectives: Sequence[str]) -> str:
    statuses = [status for status in STATUSES if status != "unchecked" or any(r.status == status for r in results)]
    lines = [f"| | {' | '.join(statuses)} | not run | exact of those that run in eager |"]
    lines.append("| --- " * (len(statuses) + 3) + "|")
    for objective in objectives:
        counts = Counter(record.status for record in results if record.candidate.objective == objective)
        runnable = sum(counts.values()) - counts["not runnable"]
        share = f"{counts['exact']} of {runnable} ({counts['exact'] / runnable:.1%})" if runnable else ""
        absent = sum(candidate.objective == objective for candidate in missing)
        lines.append(f"| {objective} | {' | '.join(str(counts[s]) for s in statuses)} | {absent} | {share} |")
    return "\n".join(lines) + "\n"


def _table(title: str, results: Sequence[Record]) -> str:
    lines = [
        f"## {title}\n",
        "| type | class | captured | layers | found by | route | largest difference | s |",
        "| --- " * 8 + "|",
    ]
    for record in results:
        found = f"{record.layers} ({record.path or 'unnamed'})" if record.layers else ""
        apart = "" if record.difference is None else f"{record.difference:.1e}" if record.difference else "0"
        captured = "yes" if record.captured else "no"
        proof = record.proof.removesuffix(" + single-residual cut")
        lines.append(
            f"| {record.candidate.model_type} | {record.candidate.model_class} | {captured} | {found} | {proof} | "
            f"{record.status} | {apart} | {record.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _reasons(results: Sequence[Record], title: str) -> str:
    if not results:
        return ""
    lines = [
        f"* {record.candidate.model_type} ({record.candidate.model_class}, {record.status}): {_one_line(record.reason)}"
        for record in results
    ]
    return "\n".join([f"## {title}\n", *lines]) + "\n"


def _one_line(reason: str) -> str:
    """Safe inside markdown."""
    return " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")[:500]
