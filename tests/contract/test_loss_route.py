"""The loss route against eager per-token losses, masked and reduced, and its compositions with the other routes."""

from __future__ import annotations

import copy
import math
from typing import Any

import oracle
import plans
import pytest
import token_oracle
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, token_batch
from torch import nn

import cggr_compile as cggr
from cggr_compile.ir.program import Program

LLAMA = ARCHITECTURES["llama"]


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The label that each position predicts, [B, S]."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def expected_mask(scores: torch.Tensor, counted: torch.Tensor, ratio: float) -> torch.Tensor:
    """The ceil(ratio · B · S) highest scores of counted tokens, ties to the earlier one."""
    kept = max(1, math.ceil(ratio * scores.numel() - 1e-9))
    ranked = sorted(counted.flatten().nonzero().flatten().tolist(), key=lambda place: -scores.flatten()[place].item())
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[ranked[:kept]] = True
    return mask.view_as(scores)


def masked_step(
    model: nn.Module, batch: dict[str, torch.Tensor], mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The mean of eager's losses at the positions of the mask."""
    model.zero_grad(set_to_none=True)
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    logits.retain_grad()
    loss = F.cross_entropy(logits[mask], labels_of(batch)[mask], reduction="sum") / mask.sum().clamp(min=1)
    loss.backward()
    assert not logits.grad[~mask].any()
    return loss.detach(), oracle.gradients(model)


@pytest.fixture(scope="module")
def routed(llama: tuple[nn.Module, Program]) -> dict[str, plans.Routed]:
    return {name: plans.Routed(*llama, route="loss", selection=name, seed=1) for name in ("topk", "random")}


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("selection", ["topk", "random"])
def test_the_loss_is_that_of_the_kept_tokens(routed: dict[str, plans.Routed], ratio: float, selection: str) -> None:
    """At 0.9 more tokens are asked for than have a label: all of those count, ignored ones never do."""
    step = routed[selection].at(ratio)
    eager = copy.deepcopy(step.model)
    batch = token_batch(7, 10)
    actual = step.step(batch)
    mask, counted = step.selected, labels_of(batch) != -100
    assert mask.sum() == min(math.ceil(ratio * 70), int(counted.sum()))
    assert not (mask & ~counted).any()
    if selection == "topk":
        with torch.no_grad():
            router = oracle.truncated(eager, LLAMA, 2)
            logits = router(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores = oracle.token_scores(logits, batch["labels"], "loss", causal=True)
        assert torch.equal(mask, expected_mask(scores, counted, ratio))
    # The operator reads the rows of the hidden states, eager those of the logits: the same products.
    oracle.assert_same_step(*actual, *masked_step(eager, batch, mask), rtol=1e-5, atol=1e-8)


def test_everything_kept_is_the_plain_model(llama: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(llama[0])
    batch = token_batch(7, 10)
    for route in ("loss", "token", ("sequence", "loss"), ("token", "loss")):
        routed = plans.Routed(*llama, route=route, ratio=1.0)
        oracle.assert_same_step(*routed.step(batch), *oracle.step(eager, batch))
    assert torch.equal(routed.selected[1], labels_of(batch) != -100)


def test_without_counted_labels_the_loss_is_zero_and_connected(routed: dict[str, plans.Routed]) -> None:
    step = routed["topk"].at(0.5)
    loss, gradients = step.step(token_batch() | {"labels": torch.full((6, 12), -100)})
    assert loss == 0
    assert not step.selected.any()
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_weighted_selections_estimate_the_batchs_loss(llama: tuple[nn.Module, Program], selection: str) -> None:
    """The mean over many draws is the loss of the batch within four standard errors."""
    eager = copy.deepcopy(llama[0])
    routed = plans.Routed(*llama, route="loss", ratio=0.5, selection=selection, seed=2)
    batch = token_batch(7, 10)
    losses = torch.stack([routed.step(batch)[0] for _ in range(60)])
    error = losses.std() / 60**0.5
    assert (losses.mean() - oracle.step(eager, batch)[0]).abs() < 4 * error
    assert error > 0


def test_sequence_and_loss(llama: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(llama[0])
    routed = plans.Routed(*llama, route=("sequence", "loss"), ratio=0.5)
    batch = token_batch(8, 10)
    actual = routed.step(batch)
    rows, mask = routed.selected
    assert torch.equal(rows, oracle.expected_rows(eager, LLAMA, batch, 0.5, 2))
    assert mask.sum() == 20
    dropped = torch.ones(8, dtype=torch.bool).index_fill(0, rows, False)
    assert not mask[dropped].any()
    expected = masked_step(eager, oracle.rows_of(batch, rows), mask[rows])
    oracle.assert_same_step(*actual, *expected, rtol=1e-5, atol=1e-8)


def test_token_and_loss(llama: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(llama[0])
    routed = plans.Routed(*llama, route=("token", "loss"), ratio=0.5)
    batch = token_batch(8, 10)
    actual = routed.step(batch)
    positions, mask = routed.selected
    assert torch.equal(positions, token_oracle.expected_positions(eager, LLAMA, batch, 0.5, 2))
    assert mask.sum() == 40
    short = token_oracle.shortened(eager, LLAMA, range(1, 2), positions)
    loss, gradients = masked_step(short, batch, mask)
    oracle.assert_same_step(*actual, loss, token_oracle.renamed(gradients), rtol=1e-5, atol=1e-8)


RULES = ("topk", "random", "trimmed", "stratified", "importance")
FEW = [
    *(("loss", rule) for rule in RULES),
    *((("sequence", "loss"), rule) for rule in RULES),
    *((("token", "loss"), rule) for rule in RULES[:3]),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("route", "rule"), FEW)
def test_where_few_tokens_count_each_enters_the_loss_once(
    llama: tuple[nn.Module, Program], route: Any, rule: str
) -> None:
    """Fewer tokens, and fewer rows, than k have a label, as with completions only: the loss is the mean over them, and
    none of what fills a selection up is in it. All weights are 1 then."""
    eager, batch = copy.deepcopy(llama[0]), token_batch(8, 10, masked=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for row, counted in enumerate([0, 3, 0, 0, 2, 0, 1, 0]):
        batch["labels"][row, : 10 - counted] = -100
    step = plans.Routed(*llama, route=route, selection=rule, ratio=0.5, seed=1)
    actual, mask = step.step(batch), labels_of(batch) != -100
    assert mask.sum() == 6
    selections = step.selected if isinstance(route, tuple) else (step.selected,)
    assert torch.equal(selections[-1], mask)
    if "token" in route:
        short = token_oracle.shortened(eager, LLAMA, range(1, 2), selections[0])
        loss, gradients = masked_step(short, batch, mask)
        oracle.assert_same_step(*actual, loss, token_oracle.renamed(gradients), rtol=1e-5, atol=1e-8)
    else:
        oracle.assert_same_step(*actual, *masked_step(eager, batch, mask), rtol=1e-5, atol=1e-8)


def test_num_items_keeps_the_gradient_scale() -> None:
    """A sum over the kept tokens, divided by a count of all, is scaled by counted / kept tokens."""
    torch.manual_seed(0)
    eager = LLAMA.build().train()
    eager.config.use_cache = False
    batch = token_batch() | {"num_items_in_batch": torch.tensor(200)}
    model = cggr.optimize(
        copy.deepcopy(eager), route="loss", ratio=0.25, selection="topk", router_layers=2, inner="eager"
    )
    loss, gradients = oracle.step(model, batch)
    mask, counted = model.cggr.selected, int((labels_of(batch) != -100).sum())
    assert mask.sum() == 18
    share = counted / 200
    inputs = {name: tensor for name, tensor in batch.items() if name != "num_items_in_batch"}
    expected_loss, expected = masked_step(eager, inputs, mask)
    scaled = {name: None if gradient is None else gradient * share for name, gradient in expected.items()}
    oracle.assert_same_step(loss, gradients, expected_loss * share, scaled, rtol=1e-4, atol=1e-7)
    assert model.cggr.metrics()["tokens_selected"] == 18


def first(scores: torch.Tensor, valid: torch.Tensor, k: int, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(k), torch.ones(k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": ("loss", "token")}, r"\('loss', 'token'\) is not a combination .*\('token', 'loss'\)"),
        ({"route": ("sequence", "token")}, "is not a combination of routes"),
        (
            {"route": "token", "selection": "importance"},
            "keeps its loss; .*valid selections: topk, fixed_quota, random, trimmed",
        ),
        ({"route": "token", "dynamic_threshold": True}, "dynamic_threshold=True is for whole sequences .*leave it out"),
        ({"route": ("sequence", "loss"), "dynamic_threshold": True}, r"route=\('sequence', 'loss'\) selects tokens"),
        ({"route": "loss", "selection": "auto"}, "selection='auto' is for whole sequences .*name a rule"),
        ({"route": "token", "selection": first}, "selection=first is for whole sequences .*name a rule"),
        ({"route": "token", "selection": "topk", "resample": "layer"}, "would select the same tokens for every layer"),
        ({"route": "token", "resample": "lair"}, "did you mean 'layer'"),
        *(
            ({name: value}, f"{name}={value!r} is for the token route, not route='sequence'; use route='token'")
            for name, value in (
                ("first_layers", 2),
                ("last_layers", 0),
                ("resample", "layer"),
                ("skip", "experts"),
                ("allow_compressed_recurrence", True),
            )
        ),
        ({"first_layers": 0}, "first_layers=0 is not an integer of at least 1"),
        ({"warmup_steps": 5, "dense_after_steps": 5}, "dense_after_steps=5 .* above warmup_steps=5"),
        ({"allow_compressed_recurrence": 1}, "allow_compressed_recurrence=1 is not a bool"),
    ],
)
def test_illegal_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)
