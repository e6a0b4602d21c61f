"""Batches with images for tiny models: the form is found, the images are read, and rows have their own.

The oracle of reading is the model itself: other images give another loss or gradient.
"""

from __future__ import annotations

import re

import pytest
import torch
from sweep.classes import IMAGES, TEXT_ONLY, batches, build, candidates
from sweep.tiny import LAST_ID, PATCH, rotary_sections, tiny_config
from sweep.tiny_images import ROWS, NoImages, with_images
from torch.torch_version import TorchVersion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cggr_compile as cggr
from cggr_compile.checking.check import IGNORED, check, eager_step

EVERY = {c.model_type: c for c in candidates(IMAGES)}
NOT_OF_THE_OLDEST = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="Dynamo of torch 2.11 and 2.12 cannot trace LLaVA"
)


@pytest.mark.parametrize(
    ("model_type", "a_row", "dims", "beside"),
    [
        pytest.param("llava", 2, 4, (), id="images"),
        pytest.param("qwen2_vl", 2, 2, ("image_grid_thw",), id="patches-by-grid"),
        pytest.param("idefics3", 2, 5, (), id="a-list-a-row"),
        pytest.param("llava_next", 1, 5, ("image_sizes",), id="crops-by-size"),
        pytest.param("mllama", 2, 6, ("aspect_ratio_ids", "cross_attention_mask"), id="tiles"),
        pytest.param("lfm2_vl", 2, 3, ("spatial_shapes", "pixel_attention_mask"), id="packed-patches"),
        pytest.param("blip", 1, 4, (), id="beside-the-text"),
    ],
)
def test_each_form_of_images_is_found_and_read(model_type: str, a_row: int, dims: int, beside: tuple[str, ...]) -> None:
    model = build(EVERY[model_type])
    given, found = with_images(model, batches(model))
    assert found == a_row
    for batch in given:
        assert batch["pixel_values"].dim() == dims
        assert set(beside) <= set(batch)
        assert all(len(part) % ROWS == 0 for part in batch.values())
        loss, gradients = eager_step(model, batch)
        other, others = eager_step(model, {**batch, "pixel_values": batch["pixel_values"] * 0.5})
        apart = [name for name, gradient in gradients.items() if gradient is not None]
        assert loss != other or any(not torch.equal(gradients[name], others[name]) for name in apart)


def test_image_tokens_have_no_labels_and_two_images_are_apart() -> None:
    model = build(EVERY["qwen2_vl"])
    given, _ = with_images(model, batches(model))
    for batch in given:
        marks = batch["input_ids"] == model.config.image_token_id
        assert (batch["labels"][marks] == IGNORED).all()
        assert torch.equal(marks.long(), batch["mm_token_type_ids"])
        starts = marks[:, 1:] & ~marks[:, :-1]
        assert (starts.sum(1) == 2).all()
        assert (batch["input_ids"][:, :-1][starts] == model.config.vision_start_token_id).all()


@NOT_OF_THE_OLDEST
def test_a_model_of_parts_that_has_run_is_routed_as_a_fresh_one_is() -> None:
    model = build(EVERY["llava"])
    (batch, *_), _ = with_images(model, batches(model))  # which runs it
    expected = model.train()(**batch).loss
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    assert any(hooks.values())
    for _ in range(2):
        assert torch.equal(cggr.optimize(model, ratio=1.0, inner="eager")(**batch).loss, expected)
        cggr.restore(model)
        assert hooks == {name: list(module._forward_hooks) for name, module in model.named_modules()}


@NOT_OF_THE_OLDEST
def test_images_that_no_size_tells_the_rows_of_are_refused_by_check() -> None:
    model = build(EVERY["llava"])
    (batch, *_), _ = with_images(model, batches(model))
    assert check(model, batch).within_rounding
    uneven = {**batch, "input_ids": batch["input_ids"].clone()}
    uneven["input_ids"][0][uneven["input_ids"][0] == model.config.image_token_id] = LAST_ID
    with pytest.raises(
        ValueError, match=r"rows have \[0, .* tokens of image_token_i.*, .* which entries of pixel_values"
    ):
        check(model, uneven)


def test_a_model_of_text_gets_text_and_one_of_actions_nothing() -> None:
    model = build(EVERY["evolla"])
    given, found = with_images(model, batches(model))
    assert found == TEXT_ONLY
    assert not any("pixel" in name for name in given[0])

    class Acts(torch.nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state

    with pytest.raises(NoImages, match="the forward of Acts takes no labels"):
        with_images(Acts(), given)


def test_tiny_vision_towers_see_four_by_four_patches() -> None:
    for model_type in ("internvl", "llava", "idefics3", "paligemma"):
        vision = tiny_config(CONFIG_MAPPING[model_type]).vision_config
        for edge, patch in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True):
            assert (edge, patch) == (4 * PATCH, PATCH), model_type


def _pair(size: int | tuple[int, int] | list[int]) -> list[int]:
    return list(size) if isinstance(size, (list, tuple)) else [size, size]


def test_special_tokens_of_images_are_no_ordinary_ids() -> None:
    for model_type in ("blip-2", "llava", "qwen2_vl", "gemma3"):
        fields = vars(tiny_config(CONFIG_MAPPING[model_type]))
        tokens = [was for name, was in fields.items() if re.fullmatch(r"image_token_(id|index)", name)]
        assert tokens
        assert all(token > LAST_ID for token in tokens), model_type


@pytest.mark.parametrize("frequencies", [2, 4, 8, 32])
def test_rotary_sections_fill_the_frequencies(frequencies: int) -> None:
    first, second, third = rotary_sections(frequencies)
    assert first == second
    assert first + second + third == frequencies
