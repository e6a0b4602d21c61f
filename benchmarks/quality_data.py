"""Text for the quality benchmark: tokens by domain, rows held out, and the regimes that spoil what trains.

    python benchmarks/quality_data.py tokens.npz a.txt.xz b.txt --vocabulary 32768

trains a byte-level BPE on the texts (or takes the tokenizer of `--tokenizer DIR`, also of a GGUF file there) and writes
the tokens of each file, a domain each, and the vocabulary's size. A run cuts them into rows (`rows_of`): held-out rows
of every domain are taken first, so that what a regime does to the others never reaches them.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

REGIMES = ("clean", "repeats", "noise", "dirty", "rare")
LEAST_HELD_OUT, MOST_HELD_OUT = 16, 128
COPIED, SOURCE, NOISE, RARE = 0.45, 0.03, 0.10, 0.10
"""Of the training rows: the share that is copied, that it is copied from, of noise, and of the rare domain."""

_CHUNK = 1 << 20  # characters

Encode = Callable[[str], list[int]]


class Rows(NamedTuple):
    """`train` int64 [N, S], shuffled, and `held_out` int64 [M, S] by domain."""

    train: np.ndarray
    held_out: dict[str, np.ndarray]


def rows_of(path: Path, length: int, regime: str, most: int = 0) -> Rows:
    """The rows of a token file under a regime, the same for every run; with `most`, so many of those that train.

    "repeats": COPIED of the training rows are copies of SOURCE of them. "noise": NOISE of them are tokens drawn from
    the whole corpus one by one. "dirty": both. "rare": RARE of them are the first domain's, the others the last one's.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime: got {regime!r}, expected one of {', '.join(REGIMES)}")
    tokens, order = np.load(path), np.random.default_rng(1)
    train, held_out = [], {}
    for domain in (name for name in tokens.files if name != "vocabulary"):
        number = len(tokens[domain]) // length
        rows = tokens[domain][: number * length].reshape(number, length).astype(np.int64)
        rows = rows[order.permutation(number)]
        held = max(LEAST_HELD_OUT, min(MOST_HELD_OUT, number // 20))
        held_out[domain], rest = rows[:held], rows[held:]
        train.append(rest)
    if regime == "rare":
        first, last = train[0], train[-1]
        number = min(len(first), int(len(last) * RARE / (1 - RARE)))
        train = [first[:number], last[: int(number * (1 - RARE) / RARE)]]
    rows = np.concatenate(train)
    rows = rows[order.permutation(len(rows))]
    return Rows(_spoilt(rows[: most or len(rows)], regime, order), held_out)


def _spoilt(rows: np.ndarray, regime: str, order: np.random.Generator) -> np.ndarray:
    number = len(rows)
    source = rows[: int(SOURCE * number)]
    copied = int(COPIED * number) if regime in ("repeats", "dirty") else 0
    noisy = int(NOISE * number) if regime in ("noise", "dirty") else 0
    kept = rows[len(source) :][: number - copied - noisy] if copied else rows[: number - noisy]
    copies = source[order.integers(0, len(source), copied)] if copied else rows[:0]
    flat = rows.reshape(-1)
    noise = flat[order.integers(0, flat.size, (noisy, rows.shape[1]))]
    found = np.concatenate([kept, copies, noise])
    return found[order.permutation(len(found))]


def vocabulary_of(path: Path) -> int:
    """The size of the vocabulary that a token file was made with."""
    return int(np.load(path)["vocabulary"])


def gguf_of(folder: Path) -> str | None:
    """The name of the GGUF file in a folder, None where there is none. Raises ValueError where there are several."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) > 1:
        raise ValueError(f"{folder} has several GGUF files: {', '.join(names)}; give a folder with one")
    return names[0] if names else None


def _text(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()


def _chunks(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            yield text[start : start + _CHUNK]


def _given(folder: Path) -> tuple[int, Encode]:
    """The vocabulary's size and the encoding of a folder's tokenizer."""
    from transformers import AutoTokenizer

    name = gguf_of(folder)
    given = AutoTokenizer.from_pretrained(folder, **({"gguf_file": name} if name else {}))

    def encode(text: str) -> list[int]:
        rows = given(list(_chunks([text])), add_special_tokens=False)["input_ids"]
        return list(chain.from_iterable(rows))

    return len(given), encode


def _trained(contents: dict[str, str], vocabulary: int) -> tuple[int, Encode]:
    """The vocabulary's size and the encoding of a byte-level BPE trained on the texts."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(_chunks(list(contents.values())), vocab_size=vocabulary, show_progress=False)

    def encode(text: str) -> list[int]:
        return list(chain.from_iterable(each.ids for each in trained.encode_batch(list(_chunks([text])))))

    return trained.get_vocab_size(), encode


def main(
    output: Path,
    texts: list[Path],
    vocabulary: Annotated[int, typer.Option(help="Size of the BPE that is trained on the texts.")] = 32768,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer to use instead.")] = None,
) -> None:
    """Tokenises texts, each a domain."""
    contents = {path.name.partition(".")[0]: _text(path) for path in texts}
    size, encode = _given(tokenizer) if tokenizer is not None else _trained(contents, vocabulary)
    kind = np.uint16 if size <= 1 << 16 else np.uint32
    tokens = {domain: np.array(encode(text), dtype=kind) for domain, text in contents.items()}
    np.savez_compressed(output, vocabulary=size, **tokens)
    print({domain: len(each) for domain, each in tokens.items()}, "vocabulary", size)


if __name__ == "__main__":
    typer.run(main)
