"""`check`: whether routed training of one model equals eager training on the rows, documents or tokens it selects.

The eager side shares nothing with the compiler. It finds the layer stack by watching which modules run and exchanging
their outputs (`eager_layers`), makes the router by putting the output of layer n in the place of the last layer's,
selects by loss, and trains the untouched model on the selected rows, on the selected documents packed anew
(`eager_documents`), or with its middle layers on the selected tokens (`eager_tokens`).
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cggr_compile.checking.eager_documents import first_ignored, hardest_documents, packed_anew
from cggr_compile.checking.eager_layers import Batch, inputs_of, layer_calls, logits_of, loss_of, outputs_replaced
from cggr_compile.checking.eager_tokens import TokensNotTold, on_tokens
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.front.api import check_batch, check_module, handle, optimize, restore

Step = tuple[torch.Tensor, dict[str, torch.Tensor | None]]

Judge = Callable[[nn.Module, Batch, torch.Tensor, int], tuple[torch.Tensor, Step]]
"""Of a model, a batch, what was selected and the router's layers: what an eager router selects, and eager's step."""

JUDGED = ("sequence", "segment", "token")
"""Routes that `check` can judge."""
IGNORED = -100
_MEDIA_TOKEN = re.compile(r"(image|img|video|audio)_(context_)?token_(id|index)")
"""What the fields of configurations are named that hold the id which stands for an image's features."""
# Difference, relative to the largest entry of the gradient, that reordered fp32 sums explain.
ROUNDING = 1e-6


class Reading(NamedTuple):
    """How a loss reads labels: each predicted from `shift` places before, none that is `ignored`."""

    shift: int
    ignored: int


@dataclass(frozen=True)
class Check:
    """Outcome of `check`.

    Attributes:
        difference: largest difference of the loss or a gradient entry to eager's, relative to the largest entry of that
            tensor where this is above 1; 0.0 is bitwise equality, infinity a gradient that only one side has.
        where: the tensor of that difference ("loss" or a parameter's name), empty without one.
        selected: for each batch, the rows that the compiled router selected, sorted; on the segment and the token route
            the positions, sequence by sequence.
        expected: for each batch, what the eager router selects.
        layers: how many layers the compiler found, `path` where and `proof` how.
        route, ratio, router_layers: what was checked; no route, nor router layers, where everything is kept.
    """

    difference: float
    where: str
    selected: tuple[tuple[int, ...], ...]
    expected: tuple[tuple[int, ...], ...]
    layers: int
    path: str
    proof: str
    route: str
    ratio: float
    router_layers: int

    @property
    def exact(self) -> bool:
        """Same selection, and loss and every gradient bitwise equal."""
        return self.selected == self.expected and self.difference == 0

    @property
    def within_rounding(self) -> bool:
        """Same selection, and differences no larger than reordered sums explain."""
        return self.selected == self.expected and self.difference <= ROUNDING

    def __str__(self) -> str:
        if self.selected != self.expected:
            return f"{self.selected} selected, {self.expected} by the eager router"
        checked = f"route {self.route}, ratio {self.ratio:g}, router of {self.router_layers}"
        checked = checked if self.route else "everything kept, with all"
        checked += f" of {self.layers} layers ({self.path or 'unnamed'}, {self.proof})"
        if self.exact:
            return f"exact: {checked}"
        how = "within rounding, apart" if self.within_rounding else "differs"
        return f"{how} by {self.difference:.1e} ({self.where}): {checked}"


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leaves the generators that a model on the CPU may draw from as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@_generators_kept()
def check(
    model: nn.Module,
    *batches: Batch,
    ratio: float | None = None,
    router_layers: int | str | None = None,
    route: str | None = None,
) -> Check:
    """Compares routed training steps of `model` with eager training on what an eager router selects.

    For each batch two steps are compared: one while everything is kept, and, below ratio 1, one routed. On the token
    route the layers that the compiler finds, but for the first, run on the selected tokens. The model is copied, not
    changed. Both sides run without a key-value cache and without an inner compiler. A bitwise comparison needs dropout
    probabilities of 0, and attention whose kernel does not depend on the mask's data (`attn_implementation="eager"`).

    Args:
        model: a language model on the CPU in fp32. Of an optimised one route, ratio and router layers are checked where
            they are not given; what else it is optimised with is not (selection, scoring, heads, float8, the loss and
            the depth route, first and last layers of the token route).
        batches: `input_ids` [B, S] int64, `labels` [B, S] int64, and whatever else its forward takes, one entry for
            each row, or n for each, row by row (images, as many in every row); on the segment route `position_ids`
            [B, S] that restart, and else one entry for each token.
        ratio: fraction of the rows, or of each sequence's tokens, kept, in (0, 1]. None is the model's, or 0.5 where it
            is not optimised.
        router_layers: layers of the router, or "auto". None is the model's, or 1.
        route: "sequence", "segment" or "token". None is that of these which is the model's, or "sequence".

    Raises:
        ValueError: no batch was given, one without labels, with a number for all rows, with more images in some rows
            than in others or, on the sequence route, of one row, or another route; or the model returns no logits.
        TypeError: a batch is no mapping.
        CannotOptimize: the model cannot be routed.
        LayerStackNotFound: the eager side finds no layers to make a router of.
        TokensNotTold: the eager side cannot tell how something that a layer is given holds tokens, or a layer numbers
            its tokens itself and the results differ.
    """
    check_module(model)
    own = _own_options(model)
    if route is None:
        route = next((each for each in own.routes if each in JUDGED), "sequence")
    if route not in JUDGED:
        raise ValueError(
            f"check: route={route!r} is none of 'sequence', 'segment' and 'token', which it can judge; without "
            "a route, it is that of these which the model is optimised with, or every row"
        )
    ratio = own.ratio if ratio is None else ratio
    router_layers = own.router_layers if router_layers is None else router_layers
    if not batches:
        raise ValueError("check: no batch was given; pass at least one, check(model, {'input_ids': …, 'labels': …})")
    config = RoutingConfig(route=route, ratio=ratio, inner="eager", warmup_steps=1)
    if config.ratio < 1:
        config = replace(config, router_layers=router_layers, selection="topk")
    for batch in batches:
        check_batch(batch)
        if batch.get("labels") is None:
            raise ValueError("check: a batch has no labels, so there is no loss; add 'labels' [batch, sequence]")
        if (batch["labels"] == IGNORED).all():
            raise ValueError(
                f"check: all labels of a batch are {IGNORED}, so eager's loss is 0 / 0; add some that count"
            )
        if config.ratio < 1:
            _refuse_unselectable(model, batch, route)
    eager, routed = (restore(copy.deepcopy(model)).train() for _ in range(2))
    for each in (eager, routed):
        if hasattr(each, "config"):
            each.config.use_cache = False
    if route == "token":
        config = replace(config, last_layers=0)
    optimize(routed, config)
    differences = [_difference(eager_step(routed, batch), eager_step(eager, batch)) for batch in batches]
    if config.ratio == 1:
        found = routed.cggr.report().stack
        layers, path, proof = (0, "", "none needed") if found is None else (found.layers, found.path, found.proof)
        return Check(*max(differences), (), (), layers, path, proof, route="", ratio=1.0, router_layers=0)
    routed.cggr.step()
    selected, expected = [], []
    counting: set[str] = set()
    program = routed.cggr.runtime.plans[-1].program
    stack = program.layers
    layers = router_layers if isinstance(router_layers, int) else program.routing.router_layers
    short = partial(_on_tokens, middle=len(stack) - 1, counting=counting)
    judges: dict[str, Judge] = {"sequence": _on_rows, "segment": _on_documents, "token": short}
    for batch in batches:
        actual = eager_step(routed, batch)
        chosen = routed.cggr.selected
        wanted, step = judges[route](eager, batch, chosen, layers)
        selected.append(_nested(chosen))
        expected.append(_nested(wanted))
        differences.append(_difference(actual, step))
    found = Check(
        *max(differences),
        tuple(selected),
        tuple(expected),
        layers=len(stack),
        path=stack.path,
        proof=stack.proof,
        route=route,
        ratio=ratio,
        router_layers=layers,
    )
    if counting and not found.within_rounding:
        names = " and ".join(sorted(counting))
        raise TokensNotTold(f"{names}: it numbers its tokens itself, from 0 to k - 1; check it with route='sequence'")
    return found


def _refuse_unselectable(model: nn.Module, batch: Batch, route: str) -> None:
    """Raises `ValueError` for a batch of which eager cannot be given a part."""
    rows = len(batch["input_ids"])
    for name, entry in batch.items():
        if isinstance(entry, torch.Tensor) and entry.shape in ((), (1,)) and rows > 1:
            raise ValueError(f"check: {name} is one number for all rows, and eager's step is on some; leave it out")
    if route == "sequence":
        if rows == 1:
            raise ValueError("check: a batch of one row leaves no rows to select; give it two, or route='token'")
        _refuse_uneven_media(model, batch)


def _refuse_uneven_media(model: nn.Module, batch: Batch) -> None:
    """Raises `ValueError` where some rows have more image, video or audio tokens than others beside tensors that need
    not be of rows: by none of their sizes is it told which entries are whose."""
    ids, config = batch["input_ids"], getattr(model, "config", None)
    if config is None:
        return
    fields = vars(config).items()
    marks = {name: mark for name, mark in fields if _MEDIA_TOKEN.fullmatch(name) and isinstance(mark, int)}
    beside = [name for name, entry in batch.items() if isinstance(entry, torch.Tensor) and _may_be_flat(entry, ids)]
    for name, mark in marks.items():
        counts = (ids == mark).sum(1).tolist()
        if beside and len(set(counts)) > 1:
            raise ValueError(
                f"check: the rows have {counts} tokens of {name}, and check cannot tell which entries of "
                f"{', '.join(beside)} belong to which row; pass rows with as many images each"
            )


def _may_be_flat(entry: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether a tensor may hold the images of all rows one behind the other: it is not by token, nor a number a row,
    nor a padded list of images [B, N, channels, height, width] or more."""
    return entry.shape[:2] != ids.shape and entry.dim() > 1 and not (len(entry) == len(ids) and entry.dim() > 4)


def _own_options(model: nn.Module) -> RoutingConfig:
    """Those of an optimised model, else the defaults."""
    try:
        return handle(model).config
    except CannotOptimize:
        return RoutingConfig(ratio=0.5, router_layers=1)


def eager_step(model: nn.Module, batch: Batch) -> Step:
    """Loss and gradients by parameter name, from the same generator state every time."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` seeds those of other devices, too
        loss = loss_of(model(**batch))
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _nested(selection: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tuple(part) if isinstance(part, list) else part for part in selection.tolist())


def _on_rows(model: nn.Module, batch: Batch, rows: torch.Tensor, layers: int) -> tuple[torch.Tensor, Step]:
    """The rows that the eager router selects, and eager's step on `rows`."""
    total = len(batch["input_ids"])
    step = eager_step(model, {name: _of_rows(tensor, rows, total) for name, tensor in batch.items()})
    return torch.tensor(_expected_rows(model, batch, len(rows), layers), dtype=torch.int64), step


def _on_documents(model: nn.Module, batch: Batch, positions: torch.Tensor, layers: int) -> tuple[torch.Tensor, Step]:
    """The positions [B, k] of the documents that the eager router selects, and eager's step on those at `positions`."""
    read, places = _reading(model, batch), batch["position_ids"]
    labels = first_ignored(batch["labels"], places, *read)
    losses, counted = _token_losses(_router_logits(model, batch, layers), labels, read)
    step = eager_step(model, packed_anew(batch, positions, *read))
    return hardest_documents(losses, counted, places, positions.shape[1]), step


def _of_rows(tensor: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """The entries of the rows: one of each, or as many as the tensor has for each of `total` rows. They lie along the
    first dimension, or along the last where the first is but a frame around one tensor (patches of all images)."""
    dim = 0 if len(tensor) % total == 0 else tensor.dim() - 1
    return tensor.unflatten(dim, (total, -1)).index_select(dim, rows).flatten(dim, dim + 1)


def _on_tokens(
    model: nn.Module, batch: Batch, positions: torch.Tensor, layers: int, middle: int, counting: set[str]
) -> tuple[torch.Tensor, Step]:
    """The positions [B, k] that the eager router selects, and eager's step with its last `middle` layers on them.
    Layers that count k places are added to `counting`."""
    stack = layer_calls(model, batch)
    length = batch["input_ids"].shape[1]
    with on_tokens(stack, range(len(stack) - middle, len(stack)), positions, length, counting):
        step = eager_step(model, batch)
    losses, _ = _token_losses(_router_logits(model, batch, layers), batch["labels"], _reading(model, batch))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    wanted = []
    for row, mask in zip(losses.tolist(), real.tolist(), strict=True):
        order = sorted(range(length), key=lambda place: (-mask[place], -row[place] * mask[place], place))
        wanted.append(sorted(order[: positions.shape[1]]))
    return torch.tensor(wanted), step


def _difference(actual: Step, expected: Step) -> tuple[float, str]:
    """The largest difference and the tensor it is in; infinite where only one side has a gradient."""
    pairs = [("loss", actual[0], expected[0])]
    pairs += [(name, actual[1].get(name), gradient) for name, gradient in expected[1].items()]
    distances = ((_distance(left, right), name) for name, left, right in pairs)
    return max((distance, name if distance else "") for distance, name in distances)


def _distance(left: torch.Tensor | None, right: torch.Tensor | None) -> float:
    if left is None or right is None:
        return 0.0 if left is right else math.inf
    if torch.equal(left, right) or (left.isnan().equal(right.isnan()) and left.nan_to_num().equal(right.nan_to_num())):
        return 0.0
    apart = ((left - right).abs().max() / right.abs().max().clamp(min=1)).item()
    return math.inf if math.isnan(apart) else apart


def _expected_rows(model: nn.Module, batch: Batch, kept: int, layers: int) -> list[int]:
    """The `kept` rows with a counted label whose mean token loss under the eager router is largest, sorted."""
    logits = _router_logits(model, batch, layers)
    losses, counted = _token_losses(logits, batch["labels"], _reading(model, batch))
    counts = counted.sum(1)
    means = torch.where(counts > 0, losses.sum(1) / counts.clamp(min=1), -math.inf)
    order = sorted(range(len(means)), key=lambda row: (-means[row].item(), row))
    return sorted(order[: min(kept, int((counts > 0).sum()))])


def _router_logits(model: nn.Module, batch: Batch, layers: int) -> torch.Tensor:
    inputs = inputs_of(model, batch)
    with _router(model, batch, layers) as router, torch.no_grad():
        return logits_of(router(**inputs))


def _token_losses(logits: torch.Tensor, labels: torch.Tensor, read: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B, S] in fp32, 0 where nothing is counted, and which are counted."""
    ignored = torch.full_like(labels[:, : read.shift], read.ignored)
    targets = torch.cat([labels[:, read.shift :], ignored], dim=1)
    counted = targets != read.ignored
    own = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, -own, 0.0), counted


def _reading(model: nn.Module, batch: Batch) -> Reading:
    """How the loss reads the labels: what makes the cross-entropy of the model's logits its loss. Ignored may be -100,
    any other that is negative, or, where the model ignores a word, the one that comes most often."""
    inputs, labels = inputs_of(model, batch), batch["labels"]
    with torch.no_grad():
        loss, logits = loss_of(model(**batch)), logits_of(model(**inputs))
    values, counts = labels.unique(return_counts=True)
    ignorable = [IGNORED, *values[values < 0].tolist(), int(values[counts.argmax()])]

    def gap(read: Reading) -> float:
        rows, targets = logits[:, : labels.shape[1] - read.shift].flatten(0, 1), labels[:, read.shift :].flatten()
        if ((targets < 0) & (targets != read.ignored)).any():
            return math.inf
        return abs(F.cross_entropy(rows.float(), targets, ignore_index=read.ignored).item() - loss.item())

    return min((Reading(shift, ignored) for ignored in ignorable for shift in (1, 0)), key=gap)


@contextmanager
def _router(model: nn.Module, batch: Batch, layers: int) -> Iterator[nn.Module]:
    """The model without dropout, the output of layer `layers` in the place of the last layer's."""
    training = model.training
    model.eval()
    stack = layer_calls(model, batch)
    taken: list[torch.Tensor] = []

    def place(call: int, output: torch.Tensor) -> torch.Tensor:
        if call == layers - 1:
            taken.append(output)
        return taken[0] if call == len(stack) - 1 else output

    try:
        with outputs_replaced(stack, place):
            yield model
    finally:
        model.train(training)
