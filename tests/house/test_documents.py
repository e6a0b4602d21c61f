"""The documents: what they link to and name exists, and what is generated is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import options_page
import pytest
from cggr_compile.passes.pipeline import OPTIONAL

from cggr_compile.config import OPTIONAL_PASSES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path for top in ("cggr_compile", "passes", "kernels", "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")
]


def anchors(path: Path) -> set[str]:
    """What a link may point to in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(str(source).endswith(f"/{name}") for source in SOURCES), name


def test_the_page_of_options_is_the_docstrings() -> None:
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page()


def test_passes_that_may_be_left_out_are_those_of_the_pipeline() -> None:
    assert tuple(pass_.__name__ for pass_ in OPTIONAL) == OPTIONAL_PASSES
