"""The committed results over every architecture of transformers, and their pages: each route that can be checked on
language models, sequences on models with images.

    python benchmarks/architectures.py --jobs 2                  # what has no result yet
    python benchmarks/architectures.py --only llama --only opt   # these again

The command is `python -m cggr_compile architectures` for all of them, with the places of the committed files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cggr_compile.architectures import IMAGES, TEXT, candidates
from cggr_compile.cli import architectures

ROOT = Path(__file__).parents[1]
NAMES = {
    ("sequence", "text"): "architectures",
    ("token", "text"): "architectures-token",
    ("sequence", "multimodal"): "architectures-multimodal",
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="model type or class (repeatable)")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    time_limit: Annotated[float, typer.Option(help="processor seconds for each class")] = 300,
    memory_limit: Annotated[float, typer.Option(help="GiB of data for each class")] = 8,
    root: Annotated[Path, typer.Option(help="where benchmarks/results and docs are")] = ROOT,
) -> None:
    """Runs the sweeps; exit status 1 where a class fails or cannot be checked."""
    status = 0
    for (route, models), name in NAMES.items():
        every = candidates(TEXT if models == "text" else IMAGES)
        chosen = [name for name in only or [] if any(name in (c.model_type, c.model_class) for c in every)]
        if only and not chosen:
            continue
        output, page = root / "benchmarks" / "results" / f"{name}-cpu.json", root / "docs" / f"{name}.md"
        try:
            architectures(chosen, jobs, time_limit, memory_limit, output, page, route, models)
        except typer.Exit as ended:
            status = ended.exit_code
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
