"""Batches with images for any image-text-to-text model, found by introspection.

How a model wants its images is tried, not looked up: `_FORMS` are the ways in which transformers' processors hand
images over, each with the sizes that the configuration gives. The first one that eager training runs on, and that its
loss depends on, is taken. How many image tokens a row has is told by `get_image_features`, or else by trying.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from cggr_compile.checking.check import IGNORED, eager_step
from sweep.tiny import FIRST_ID

ROWS = 6

Batch = dict[str, torch.Tensor]

# Images a row, those that are tried, and what a row has where none can be made.
IMAGES_A_ROW = (2, 1)
TEXT_ONLY = 0
MOST_PLACES = 52
TILES = 4  # of an image that a model takes in tiles
_FRONT = 3  # tokens in front of a row's image tokens
# What models raise at images that are not in their form.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class NoImages(Exception):
    """No form of images is one that the model trains with; the message says what it raised at the likeliest."""


class _Sizes:
    """What a configuration says of images: channels, and edges in pixels."""

    def __init__(self, config: PretrainedConfig) -> None:
        vision = next(
            (part for name in _PARTS if isinstance(part := getattr(config, name, None), PretrainedConfig)), config
        )
        self.channels = _first(vision, ("in_channels", "num_channels", "in_chans"), 3)
        self.patch = _first(vision, ("model_patch_size", "patch_size"), 8)
        self.merge = _first(vision, ("spatial_merge_size", "merge_size", "merge_kernel_size"), 2)
        self.merge *= _first(vision, ("adapter_merge_size",), 1)
        self.merge *= (
            _first(config, ("spatial_merge_size", "projector_spatial_merge_size"), 1) if vision is not config else 1
        )
        self.frames = _first(vision, ("temporal_patch_size", "patch_temporal"), 1)
        self.edge = _first(vision, ("image_size",), 4 * self.patch)
        self.flat = _first(vision, ("patch_embed_hidden_size",), self.channels * self.patch**2)


_PARTS = ("vision_config", "encoder", "vision_model_config")


def _first(config: PretrainedConfig, names: tuple[str, ...], otherwise: int) -> int:
    """The first of the fields that says a size; of a list, its first."""
    for name in names:
        size = getattr(config, name, None)
        if isinstance(size, (list, tuple)) and size:
            size = size[0]
        if isinstance(size, dict):
            size = next(iter(size.values()))
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return otherwise


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _grids(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """Patches of all images behind one another, and each image's grid (frames, height, width) in patches."""
    count, side = rows * a_row, 2 * sizes.merge
    grid = torch.tensor([[1, side, side]]).repeat(count, 1)
    patches, area = count * side * side, sizes.patch**2
    merged = {"image_grid_thw": grid, "image_merge_sizes": torch.full((count,), sizes.merge)}
    for form in ((patches, sizes.channels * sizes.frames * area), (patches, sizes.channels, sizes.patch, sizes.patch)):
        yield {"pixel_values": _noise(*form), **merged}
    yield {"pixel_values": _noise(patches, sizes.frames, sizes.patch, sizes.patch, sizes.channels), **merged}
    small = {**merged, "image_grid_thw": torch.tensor([[1, 2, 2]]).repeat(count, 1)}
    yield {"pixel_values": _noise(count * 4, 2 * sizes.patch, 2 * sizes.patch, sizes.channels), **small}
    yield {"pixel_values": _noise(1, patches, sizes.channels, sizes.patch, sizes.patch), **merged}


def _whole(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """Images of one size, [N, channels, height, width], or in crops of that size."""
    count, edge = rows * a_row, sizes.edge
    image = (sizes.channels, edge, edge)
    actual = {
        "image_sizes": torch.full((count, 2), edge),
        "high_res_pixel_values": _noise(count, *image),
        "pixel_values_images": _noise(count, *image),
        "batch_num_images": torch.full((rows,), a_row),
    }
    yield {"pixel_values": _noise(count, *image), **actual}
    yield {"pixel_values": _noise(count, *image)}
    yield {"pixel_values": _noise(count, 3, *image), **actual, "image_sizes": torch.tensor([[edge, 2 * edge]] * count)}


def _listed(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """A list of images for each row, [B, n, channels, height, width], or of their tiles."""
    image = (sizes.channels, sizes.edge, sizes.edge)
    yield {
        "pixel_values": _noise(rows, a_row, *image),
        "pixel_attention_mask": torch.ones(rows, a_row, sizes.edge, sizes.edge, dtype=torch.int64),
    }
    yield {
        "pixel_values": _noise(rows, a_row, *image),
        "pixel_attention_mask": torch.ones(rows, a_row, dtype=torch.bool),
    }
    yield {"pixel_values": _noise(rows * a_row, 16, sizes.channels * sizes.patch**2)}
    yield {
        "pixel_values": _noise(rows, a_row, TILES, *image),
        "aspect_ratio_ids": torch.ones(rows, a_row, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(rows, a_row, TILES, dtype=torch.int64),
    }


def _packed(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """Patches of each image, padded to one number of them."""
    count, side = rows * a_row, 4
    patches = side * side
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).view(1, patches, 2)
    yield {
        "pixel_values": _noise(count, patches, sizes.channels * sizes.patch**2).sigmoid(),
        "pixel_attention_mask": torch.ones(count, patches, dtype=torch.int64),
        "spatial_shapes": torch.full((count, 2), side),
        "image_position_ids": places.repeat(count, 1, 1),
    }


def _strips(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """Patches of all images side by side in one strip, [1, channels, patch, all pixels]."""
    count, side = rows * a_row, 4
    yield {
        "pixel_values": _noise(1, sizes.channels, sizes.patch, count * side * side * sizes.patch),
        "target_sizes": torch.full((count, 2), side),
    }


def _flattened(sizes: _Sizes, rows: int, a_row: int) -> Iterator[Batch]:
    """Patches of one image a row, each behind its place, [B, patches, 2 + channels * patch * patch]."""
    if a_row != 1:
        return
    places = torch.stack(torch.meshgrid(torch.arange(1, 5), torch.arange(1, 3), indexing="ij"), -1).view(1, 8, 2)
    pixels = _noise(rows, 8, sizes.flat)
    yield {
        "flattened_patches": torch.cat([places.repeat(rows, 1, 1).float(), pixels], dim=-1),
        "width": torch.full((rows,), 4),
        "height": torch.full((rows,), 2),
    }


# Each with an argument that says that a model takes this form.
_FORMS: tuple[tuple[str, Callable[[_Sizes, int, int], Iterator[Batch]]], ...] = (
    ("image_grid_thw", _grids),
    ("target_sizes", _strips),
    ("spatial_shapes", _packed),
    ("image_position_ids", _packed),
    ("flattened_patches", _flattened),
    ("pixel_values", _whole),
    ("pixel_values", _listed),
)


def with_images(model: nn.Module, batches: list[Batch]) -> tuple[list[Batch], int]:
    """The batches [B, S] with images in every row, and how many a row has: two, one, or `TEXT_ONLY`.

    Image tokens follow the third token of a row, those of a second image the fourth, and have no labels. A model
    without image tokens reads its images beside the text. One whose forward takes no `input_ids` gets none.

    Raises:
        NoImages: the model trains neither with any form of images nor without.
    """
    taken = set(inspect.signature(model.forward).parameters)
    if "labels" not in taken:
        raise NoImages(f"the forward of {type(model).__name__} takes no labels")
    # Without ids, a mask is one of the patches.
    text = {"input_ids", "attention_mask", "labels"} if "input_ids" in taken else {"labels"}
    batches = [{name: part for name, part in batch.items() if name in text} for batch in batches]
    refusal = ""
    for a_row, images in _tried(model, taken):
        said = ""
        for places in _places(model, images, a_row):
            merged = [_merged(model, batch, images, taken, places, a_row) for batch in batches]
            before, said = said, ""
            try:
                if all(_reads(model, batch, images) for batch in merged):
                    return merged, a_row
            except _REFUSALS as error:
                said = f"{type(error).__name__}: {error}"
            refusal = refusal or said
            if said and said == before:
                break  # what the model says does not depend on the number of image tokens
    alone = [{**batch, **_beside(batch, torch.zeros_like(batch["labels"]), taken, 1)} for batch in batches]
    try:
        for batch in alone:
            eager_step(model, batch)
    except _REFUSALS as error:
        raise NoImages(f"{refusal} / {type(error).__name__}: {error}") from error
    return alone, TEXT_ONLY


def _tried(model: nn.Module, taken: set[str]) -> Iterator[tuple[int, Batch]]:
    """Images a row, and the arguments of each form that the model may take."""
    sizes = _Sizes(model.config)
    rows = ROWS
    for a_row in IMAGES_A_ROW:
        for argument, form in _FORMS:
            if argument in taken:
                for images in form(sizes, rows, a_row):
                    yield a_row, {name: part for name, part in images.items() if name in taken}


def _places(model: nn.Module, images: Batch, a_row: int) -> Iterator[int]:
    """How many image tokens a row may have: as many as the model makes features of its images, else any number."""
    if _image_token(model) is None:
        yield 0
        return
    count = _features(model, images)
    if count:
        yield count
    yield from (places for places in range(a_row, MOST_PLACES + 1) if places != count)


def _features(model: nn.Module, images: Batch) -> int:
    """Features that `get_image_features` makes for a row, 0 where it does not say."""
    owner = next((part for part in (model, getattr(model, "model", None)) if hasattr(part, "get_image_features")), None)
    if owner is None:
        return 0
    declared = inspect.signature(owner.get_image_features).parameters
    given = {name: part for name, part in images.items() if name in declared or "args" in declared}
    try:
        with torch.no_grad():
            features = owner.get_image_features(**given)
    except _REFUSALS:
        return 0
    parts = getattr(features, "pooler_output", features)
    parts = [parts] if isinstance(parts, torch.Tensor) else parts
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        return 0
    total = sum(part.numel() // part.shape[-1] for part in parts)
    return total // ROWS if total % ROWS == 0 and total // ROWS <= MOST_PLACES else 0


def _image_token(model: nn.Module) -> int | None:
    """The id that stands for an image's features; an ordinary one where their places are an argument."""
    for name in ("image_token_id", "image_token_index", "video_token_index"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    return FIRST_ID if "image_embeds_position_mask" in inspect.signature(model.forward).parameters else None


def _merged(model: nn.Module, batch: Batch, images: Batch, taken: set[str], places: int, a_row: int) -> Batch:
    """The batch with `places` image tokens in every row, its images, and what the model asks for beside them."""
    fillers = {"input_ids": _image_token(model), "attention_mask": 1, "labels": IGNORED}
    # A decoder's labels are a sequence of their own.
    kept = {"labels"} if model.config.is_encoder_decoder else set()
    blocks = [places // a_row] * a_row if places % a_row == 0 else [places]
    widened = {
        name: part if name in kept or not places else _widened(part, blocks, fillers[name])
        for name, part in batch.items()
    }
    marks = torch.zeros_like(batch.get("input_ids", batch["labels"]))
    marks = _widened(marks, blocks, 1) if places else marks
    start = getattr(model.config, "vision_start_token_id", None)
    if isinstance(start, int) and places:
        firsts = (marks - F.pad(marks, (1, -1))).clamp(min=0)
        widened["input_ids"] = widened["input_ids"].masked_fill(F.pad(firsts, (-1, 1)).bool(), start)
    return {**widened, **_beside(widened, marks, taken, a_row), **images}


def _widened(part: torch.Tensor, blocks: list[int], filler: int | None) -> torch.Tensor:
    """A batch [B, S] with blocks of so many fillers, the first behind _FRONT tokens and a token between two."""
    pieces = [part[:, :_FRONT]]
    for number, size in enumerate(blocks):
        between = part[:, _FRONT + number : _FRONT + number + 1] if number + 1 < len(blocks) else part[:, :0]
        pieces += [part.new_full((len(part), size), filler), between]
    return torch.cat([*pieces, part[:, _FRONT + len(blocks) - 1 :]], dim=1)


def _beside(batch: Batch, marks: torch.Tensor, taken: set[str], a_row: int) -> Batch:
    """What models ask for beside text and images; `marks` is 1 at image tokens."""
    rows, length = marks.shape
    offered = {
        "token_type_ids": marks,
        "mm_token_type_ids": marks,
        "image_embeds_position_mask": marks,
        "image_attention_mask": torch.ones(rows, length, a_row, dtype=torch.int64),
        "cross_attention_mask": torch.ones(rows, length, a_row, TILES, dtype=torch.int64),
        "qformer_input_ids": torch.full((rows * a_row, 3), FIRST_ID),
        "qformer_attention_mask": torch.ones(rows * a_row, 3, dtype=torch.int64),
        "bbox": torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(rows, length, 1),
    }
    return {name: part for name, part in offered.items() if name in taken}


def _reads(model: nn.Module, batch: Batch, images: Batch) -> bool:
    """Whether the last row's images make a difference to the loss or a gradient (a gate may be closed at first), and
    no other row's make one to the last row's loss.

    Where rows have too few places, and the model does not mind, rows take the features of the rows before them.
    """
    pixels = {name: part for name, part in images.items() if part.is_floating_point()}
    others = {name: _last_changed(part) for name, part in pixels.items()}
    loss, gradients = eager_step(model, batch)
    another, others_gradients = eager_step(model, {**batch, **others})
    if not loss.isfinite() or not _owns(model, batch, pixels):
        return False
    return bool(loss != another) or any(
        gradient is not None and other is not None and not torch.equal(gradient, other)
        for gradient, other in zip(gradients.values(), others_gradients.values(), strict=True)
    )


def _owns(model: nn.Module, batch: Batch, pixels: Batch) -> bool:
    """Whether the last row's loss has no gradient with respect to other rows' images."""
    labels = batch["labels"].clone()
    labels[:-1] = IGNORED
    watched = {name: part.clone().requires_grad_() for name, part in pixels.items()}
    eager_step(model, {**batch, **watched, "labels": labels})
    for part in watched.values():
        if part.grad is not None and part.grad.narrow(*_share(part, first=True)).any():
            return False
    return True


def _last_changed(part: torch.Tensor) -> torch.Tensor:
    """The images with other values in the last row's."""
    changed = part.clone()
    last = changed.narrow(*_share(part, first=False))
    last.copy_(last.roll(1, -1) * 0.5)
    return changed


def _share(part: torch.Tensor, first: bool) -> tuple[int, int, int]:
    """Dimension, start and length of the first rows' images, or of the last row's: of the first dimension that the
    rows divide."""
    dim = next(dim for dim, size in enumerate(part.shape) if size % ROWS == 0)
    start = part.shape[dim] - part.shape[dim] // ROWS
    return (dim, 0, start) if first else (dim, start, part.shape[dim] - start)
