"""The results of `python benchmarks/architectures.py` as a page: counts, a row a class, and why not, where not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sweep.classes import IMAGES_OF, STATUSES, TEXT, Candidate, Record
from sweep.tiny_images import TEXT_ONLY

_INTRODUCTION = """# Architectures: the {route} route

Every entry of transformers' {mappings}, at a tiny size, through the {route} route: captured,
rewritten, and compared with eager training on the {selection} that an independent eager router selects, with and
without padding. This page is generated from the results, by `python benchmarks/architectures.py`.

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
    "`input_ids` and `labels`, with images in any form that was tried or without,",
)
_IMAGES = (
    "* **images**: two or one a row, in the form that the model takes, and proved to be read: other images give "
    "another loss or gradient. **text only**: no form of images that was tried ran, but the text alone did.\n"
)
_TEXT_ONLY = IMAGES_OF[TEXT_ONLY]
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
    introduction += _IMAGES if objectives != TEXT else ""
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
    kinds = [(objective, objective, False) for objective in objectives]
    if any(record.images == _TEXT_ONLY for record in results):
        kinds = [
            (f"{title}, {_TEXT_ONLY if alone else 'with images'}", objective, alone)
            for title, objective, _ in kinds
            for alone in (False, True)
        ]
    for title, objective, alone in kinds:
        counts = Counter(
            record.status
            for record in results
            if record.candidate.objective == objective and (record.images == _TEXT_ONLY) == alone
        )
        runnable = sum(counts.values()) - counts["not runnable"]
        share = f"{counts['exact']} of {runnable} ({counts['exact'] / runnable:.1%})" if runnable else ""
        absent = 0 if alone else sum(candidate.objective == objective for candidate in missing)
        lines.append(f"| {title} | {' | '.join(str(counts[s]) for s in statuses)} | {absent} | {share} |")
    return "\n".join(lines) + "\n"


def _table(title: str, results: Sequence[Record]) -> str:
    images = "images | " if any(record.images for record in results) else ""
    lines = [
        f"## {title}\n",
        f"| type | class | {images}captured | layers | found by | route | largest difference | s |",
        "| --- " * (9 if images else 8) + "|",
    ]
    for record in results:
        found = f"{record.layers} ({record.path or 'unnamed'})" if record.layers else ""
        apart = "" if record.difference is None else f"{record.difference:.1e}" if record.difference else "0"
        captured = "yes" if record.captured else "no"
        given = f"{record.images} | " if images else ""
        proof = record.proof.removesuffix(" + single-residual cut")
        lines.append(
            f"| {record.candidate.model_type} | {record.candidate.model_class} | {given}{captured} | {found} | "
            f"{proof} | {record.status} | {apart} | {record.seconds:.0f} |"
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
