"""The check that follows each of `actions`.

After every action one labelled training call is made. It must equal eager on what was selected or raise
`CannotOptimize`. The eager side is the class's own forward on the very same modules (hooks, adapters and all), so it
shares nothing with the compiler; `selected` is checked against an eager router where the rule draws nothing.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping

import oracle
import torch
import torch.nn.functional as F
from actions import IGNORED, ROUTER_LAYERS, World
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cggr_compile as cggr


def check(world: World) -> str:
    """One training step against eager; returns how it ended: "equal", "refused" or "raised as eager does".

    Raises AssertionError for another result, and the error itself where a step that must be routed was refused.
    """
    batch = world.batch()
    bad = batch["labels"][:, 1:].ge(world.model.config.vocab_size).any()
    try:
        loss, gradients = _step(world, batch)
    except (cggr.CannotOptimize, IndexError, RuntimeError) as error:
        # torch's checkpoint leaves its hooks on while the frames of an error from within live, for whoever comes next.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, cggr.CannotOptimize) and _may_be_refused(world):
            return "refused"
        if isinstance(error, IndexError) and bad and "out of bounds" in str(error):
            return "raised as eager does"
        raise
    assert not bad, "a label out of range passed unseen"
    expected_loss, expected = _expected(world, batch)
    exact = world.route() != "loss" and not _fills_up(world, batch) and world.labels != "no row"
    coarse = next(world.model.parameters()).dtype is torch.bfloat16
    close = {"rtol": 0.05, "atol": 0.02} if coarse else {"rtol": 1e-4, "atol": 1e-6}
    oracle.assert_same_step(loss, gradients, expected_loss, expected, **({} if exact else close))
    return "equal"


def _may_be_refused(world: World) -> bool:
    return bool(world.hooks) or world.around == "reentrant checkpoint"


def _step(world: World, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    world.model.zero_grad(set_to_none=True)
    torch.manual_seed(world.seed)
    if world.around == "nothing":
        loss = world.model(**batch).loss
    else:
        trained = (parameter for parameter in world.model.parameters() if parameter.requires_grad)
        given = next(trained) if world.around == "reentrant checkpoint" else None
        run = lambda _: world.model(**batch).loss  # noqa: E731  what is checkpointed, with an input that has a gradient
        loss = checkpoint(run, given, use_reentrant=world.around == "reentrant checkpoint")
    loss.backward()
    return loss.detach(), oracle.gradients(world.model)


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:] != IGNORED


def _fills_up(world: World, batch: Mapping[str, Tensor]) -> bool:
    """Whether fewer rows are selectable than are kept: the rest repeats, which reorders sums."""
    if world.route() != "sequence" or world.options["ratio"] == 1 or world.rows == 1:
        return False
    return int(_counted(batch).any(1).sum()) < math.ceil(world.options["ratio"] * world.rows - 1e-9)


def _expected(world: World, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Eager's loss and gradients on what the step before selected, which an eager router must confirm."""
    kept = world.model.cggr.selected
    _check_selection(world, batch, kept)
    world.model.zero_grad(set_to_none=True)
    torch.manual_seed(world.seed)
    if world.route() == "sequence":
        if not _counted(batch).any():  # eager's mean over nothing is NaN; here it is a connected zero
            loss = world.forward(**batch | {"labels": batch["labels"].clamp(min=0)}).loss * 0
        else:
            loss = world.forward(**oracle.rows_of(batch, kept) | {"labels": _once(batch["labels"], kept)}).loss
    elif world.route() == "token":
        whole = kept.shape[1] == world.length
        loss = world.forward(**batch, kept=None if whole else {1: kept}).loss
        if not _counted(batch).any():
            loss = world.forward(**batch | {"labels": batch["labels"].clamp(min=0)}).loss * 0
    else:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = world.forward(**inputs).logits.float()
        targets = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        loss = F.cross_entropy(logits[kept], targets[kept], reduction="sum") / kept.sum().clamp(min=1)
    loss.backward()
    return loss.detach(), oracle.gradients(world.model)


def _once(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels of the kept rows; those that only fill up, which come again, are ignored."""
    again = torch.tensor([row in kept[:place] for place, row in enumerate(kept)])
    return labels[kept].masked_fill(again[:, None], IGNORED)


@torch.no_grad()
def _scores(world: World, batch: Mapping[str, Tensor]) -> Tensor:
    """An eager router's losses [B, S - 1], 0 where the label is ignored."""
    drops = [module for module in world.model.modules() if isinstance(module, nn.Dropout)]
    for module in drops:
        module.eval()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = world.forward(**inputs, stop=ROUTER_LAYERS).logits[:, :-1].float()
    for module in drops:
        module.train()
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _check_selection(world: World, batch: Mapping[str, Tensor], kept: Tensor) -> None:
    """What was selected is of the right number and counts, and is the hardest where the rule is topk."""
    counted, ratio, rule = _counted(batch), world.options["ratio"], world.options["selection"]
    exact = next(world.model.parameters()).dtype is not torch.bfloat16  # coarse scores tie
    if world.route() == "sequence":
        wanted = world.rows if world.rows == 1 else math.ceil(ratio * world.rows - 1e-9)
        assert len(kept) == wanted
        rows = kept.unique()
        if wanted == world.rows or not counted.any():
            return
        assert len(rows) == min(wanted, int(counted.any(1).sum()))
        assert counted[rows].any(1).all()
        if rule == "topk" and exact:
            scores = _scores(world, batch).sum(1) / counted.sum(1).clamp(min=1)
            assert rows.tolist() == _best(scores, counted.any(1), len(rows))
    elif world.route() == "token":
        assert kept.shape == (world.rows, math.ceil(ratio * world.length - 1e-9))
        real = batch.get("attention_mask", torch.ones(kept.shape[0], world.length)) != 0
        for row, places in enumerate(kept):
            least = min(len(places), int(real[row].sum()))
            assert len(set(places.tolist())) == len(places)
            assert real[row][places].sum() == least, "padding was kept in place of a token"
    else:
        targets = F.pad(counted, (0, 1), value=False)
        assert not (kept & ~targets).any()
        assert kept.sum() == min(math.ceil(ratio * world.rows * world.length - 1e-9), int(targets.sum()))


def _best(scores: Tensor, of: Tensor, number: int) -> list[int]:
    places = of.nonzero().flatten().tolist()
    return sorted(sorted(places, key=lambda place: (-scores[place].item(), place))[:number])
