"""One transformers architecture at a time: a tiny model of it, batches for it, and whether routing it is exact.

`examine` runs in a process of its own (`sweep`), because a model may crash, hang or take all memory.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from cggr_compile.checking.check import IGNORED, check, eager_step
from cggr_compile.checking.eager_layers import LayerStackNotFound
from cggr_compile.checking.eager_tokens import TokensNotTold
from cggr_compile.errors import CannotOptimize
from sweep.tiny import FIRST_ID, HEAD_DIM, LAST_ID, rotary_sections, tiny_config
from sweep.tiny_images import ROWS, TEXT_ONLY, with_images

LENGTH = 12
STATUSES = ("exact", "rounding", "refused", "not runnable", "unchecked", "failure")


@dataclass(frozen=True)
class Candidate:
    """An entry of transformers' causal-LM, masked-LM or image-text-to-text mapping: `objective` is "causal", "masked"
    or "multimodal"."""

    objective: str
    model_type: str
    model_class: str


@dataclass(frozen=True)
class Record:
    """What became of one candidate.

    `status` is one of `STATUSES`: loss and every gradient bitwise equal; equal within fp32 rounding; refused with
    `CannotOptimize`; not runnable in eager training on the CPU; routed, but without an eager side to compare with
    (`LayerStackNotFound`, `TokensNotTold`); anything else. `difference` is that of `Check`, None where nothing was
    compared. `images`: of a multimodal candidate that runs, what each row had (`IMAGES_OF`). `captured`: whether
    the training step became a graph. `seconds`: processor time.
    """

    candidate: Candidate
    status: str
    reason: str = ""
    captured: bool = False
    images: str = ""
    layers: int = 0
    path: str = ""
    proof: str = ""
    difference: float | None = None
    seconds: float = 0.0
    commit: str = field(default="", compare=False)


_MAPPINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "multimodal": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
TEXT, IMAGES = ("causal", "masked"), ("multimodal",)
IMAGES_OF = {2: "two a row", 1: "one a row", TEXT_ONLY: "text only"}


def candidates(objectives: Sequence[str] = TEXT) -> list[Candidate]:
    """Every entry of the objectives' mappings, in the mappings' order."""
    return [
        Candidate(objective, model_type, name if isinstance(name, str) else name[0])
        for objective in objectives
        for model_type, name in _MAPPINGS[objective][1].items()
    ]


def build(candidate: Candidate) -> nn.Module:
    """A tiny model of the candidate in training mode, with reproducible weights and attention written out in torch.

    Raises:
        whatever transformers raises where it cannot be built.
    """
    config = tiny_config(CONFIG_MAPPING[candidate.model_type])
    auto: Any = _MAPPINGS[candidate.objective][0]
    model_class = auto._model_mapping[type(config)]
    config = _own_part(config, model_class)
    if candidate.objective == "multimodal":
        _complete(config)
    if candidate.objective == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager")
    model.config.use_cache = False
    return model.train()


def _complete(config: PretrainedConfig) -> None:
    """Gives a composite configuration the vision tower that it may do without, a decoder that reads its
    encoder, and rotary sections that fit its heads."""
    tower = config.sub_configs.get("vision_config")
    if tower is not None and getattr(config, "vision_config", None) is None and hasattr(tower, "model_type"):
        config.vision_config = tiny_config(tower)
    if isinstance(decoder := getattr(config, "decoder", None), PretrainedConfig):
        decoder.is_decoder = decoder.add_cross_attention = True
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Models that rotate a head as one do not read them.
    for kind in [part for part in rope.values() if isinstance(part, dict)] or [rope]:
        rotated = kind.get("partial_rotary_factor") or 1.0
        kind["mrope_section"] = rotary_sections(int(HEAD_DIM * rotated) // 2)


def _own_part(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """The part of a composite configuration that the class is built from."""
    parts = [getattr(config, name) for name in config.sub_configs]
    return next((part for part in parts if type(part) is model_class.config_class), config)


def batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Two batches of ids [6, 12]: every row padded on one side or the other, and no row padded.

    Labels are those of the model's positions, ignored where there is padding, in the whole of row 2 (of an
    encoder-decoder model, all but its first place) and at one more place of the first batch. Models that take no
    `attention_mask` get none.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(1)
    last = min(LAST_ID, getattr(config, "vocab_size", LAST_ID))
    ids = torch.randint(FIRST_ID, last, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        padding = 1 + row % 3
        mask[row, slice(0, padding) if row % 2 else slice(LENGTH - padding, LENGTH)] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    # A decoder reads the labels, and some wrap a row's last counted one to its front.
    labels[2, 1 if model.config.is_encoder_decoder else 0 :] = IGNORED
    labels[-1, LENGTH // 2] = IGNORED
    given = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        {"input_ids": ids.flip(0), "attention_mask": torch.ones_like(ids), "labels": ids.flip(0).clone()},
    ]
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        for batch in given:
            del batch["attention_mask"]
    return given


def examine(candidate: Candidate, runs: Callable[[str], Any], route: str = "sequence") -> Record:
    """Builds the candidate, runs it in eager training, and checks its routing.

    Args:
        candidate: which architecture.
        route: "sequence" or "token".
        runs: called with what each row has of images once the model has trained in eager mode: an
            error before that is the model's.

    Raises:
        whatever the model, or the compiler against its promise, raises.
    """
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = build(candidate)
    given, images = batches(model), ""
    if candidate.objective == "multimodal":
        given, count = with_images(model, given)
        images = IMAGES_OF[count]
    for batch in given:
        eager_step(model, batch)
    runs(images)
    start = time.process_time()
    try:
        outcome = check(build(candidate), *given, route=route)
    except CannotOptimize as error:
        seconds = time.process_time() - start
        return Record(candidate, "refused", str(error), _reached_passes(error), images, seconds=seconds)
    except (LayerStackNotFound, TokensNotTold) as error:
        return Record(candidate, "unchecked", str(error), True, images, seconds=time.process_time() - start)
    status = "exact" if outcome.exact else "rounding" if outcome.within_rounding else "failure"
    return Record(
        candidate,
        status,
        "" if outcome.exact else str(outcome),
        True,
        images,
        outcome.layers,
        outcome.path,
        outcome.proof,
        outcome.difference,
        time.process_time() - start,
    )


def _reached_passes(error: CannotOptimize) -> bool:
    """Whether the passes were running: the capture was complete."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "cggr_compile.passes.pipeline":
            return True
        trace = trace.tb_next
    return False
