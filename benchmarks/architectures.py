"""Proves the contract on a tiny model of every architecture of transformers; exit status 1 where one fails.

    python benchmarks/architectures.py --jobs 2                  # what has no result yet, into the committed files
    python benchmarks/architectures.py --only llama --only opt   # these again
    python benchmarks/architectures.py --page architectures-multimodal

Classes are examined in processes of their own, and a run can be interrupted at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from sweep.classes import IMAGES, TEXT, candidates
from sweep.runs import UnknownArchitecture, sweep

ROOT = Path(__file__).parents[1]


class Page(NamedTuple):
    """What one page shows: a route, on language models or on models with images."""

    route: str
    objectives: tuple[str, ...]


PAGES = {
    "architectures": Page("sequence", TEXT),
    "architectures-token": Page("token", TEXT),
    "architectures-multimodal": Page("sequence", IMAGES),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="model type or class (repeatable); examined again")] = None,
    page: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PAGES)} (repeatable); all without")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    time_limit: Annotated[float, typer.Option(min=1, help="processor seconds for each class")] = 300,
    memory_limit: Annotated[float, typer.Option(min=1, help="GiB of data for each class")] = 8,
    root: Annotated[Path, typer.Option(help="where benchmarks/results and docs are")] = ROOT,
) -> None:
    """Runs the sweeps; exit status 1 where a class fails or cannot be checked."""
    failed, known = False, False
    for name in page or PAGES:
        if name not in PAGES:
            raise typer.BadParameter(f"--page {name} is none of {', '.join(PAGES)}")
        route, objectives = PAGES[name]
        every = candidates(objectives)
        chosen = [name for name in only or [] if any(name in (c.model_type, c.model_class) for c in every)]
        if only and not chosen:
            continue
        known = True
        output, text = root / "benchmarks" / "results" / f"{name}-cpu.json", root / "docs" / f"{name}.md"
        failed |= sweep(chosen, jobs, time_limit, memory_limit, output, text, route, objectives)
    if not known:
        raise typer.BadParameter(f"--only {' '.join(only or ())} names no model type or class of transformers")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UnknownArchitecture, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
