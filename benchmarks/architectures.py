"""The committed results over every architecture of transformers, on each route that can be checked, and their pages.

    python benchmarks/architectures.py --jobs 2                  # what has no result yet
    python benchmarks/architectures.py --only llama --only opt   # these again

The command is `python -m cggr_compile architectures` for both routes, with the places of the committed files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cggr_compile.cli import architectures

ROOT = Path(__file__).parents[1]
NAMES = {"sequence": "architectures", "token": "architectures-token"}


def main(
    only: Annotated[list[str] | None, typer.Option(help="model type or class (repeatable)")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    time_limit: Annotated[float, typer.Option(help="processor seconds for each class")] = 300,
    memory_limit: Annotated[float, typer.Option(help="GiB of data for each class")] = 8,
    root: Annotated[Path, typer.Option(help="where benchmarks/results and docs are")] = ROOT,
) -> None:
    """Runs both sweeps; exit status 1 where a class fails or cannot be checked."""
    status = 0
    for route, name in NAMES.items():
        output, page = root / "benchmarks" / "results" / f"{name}-cpu.json", root / "docs" / f"{name}.md"
        try:
            architectures(only, jobs, time_limit, memory_limit, output, page, route)
        except typer.Exit as ended:
            status = ended.exit_code
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
