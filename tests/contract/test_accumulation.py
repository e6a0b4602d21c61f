"""Accumulation with `num_items_in_batch`: micro-batches add up to the gradient of the batch, for every rule."""

from __future__ import annotations

import copy
import dataclasses

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, VOCABULARY, build

import cggr_compile as cggr
from cggr_compile.run import plan

ROWS, LENGTH, MICRO = 16, 10, 4
RATIO = 0.75


def two_layers() -> torch.nn.Module:
    return oracle.truncated(build("gpt2"), ARCHITECTURES["gpt2"], 2)


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """Every label counted: then a micro-batch's share of kept tokens is the batch's."""
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": ids.clone()}


def by_difficulty(eager: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows, the hardest first, by a one-layer eager router."""
    with torch.no_grad():
        logits = oracle.truncated(eager, ARCHITECTURES["gpt2"], 1)(batch["input_ids"]).logits
    return oracle.token_scores(logits, batch["labels"], "loss", True).sum(1).argsort(descending=True)


# Rule, options, the places (of four, by difficulty) that it selects, and their weights.
RULES: list[tuple[str, dict[str, float] | None, tuple[int, ...], tuple[float, ...]]] = [
    ("topk", None, (0, 1, 2), (1.0, 1.0, 1.0)),
    ("random", None, (0, 1, 2), (1.0, 1.0, 1.0)),
    ("trimmed", {"tau": 0.25, "epsilon": 0.0}, (1, 2, 3), (1.0, 1.0, 1.0)),
    ("stratified", {"num_strata": 2}, (0, 1, 2), (0.75, 0.75, 1.5)),
]


def apply_rule(model: torch.nn.Module, rule: str, options: dict[str, float] | None) -> None:
    """The model's one capture under another rule, which only runs the passes anew."""
    runtime = model.cggr.runtime
    (plan,) = runtime.plans
    runtime.config = dataclasses.replace(runtime.config, selection=rule, selection_options=options)
    plan.__init__(plan.captured, runtime)


def test_micro_batches_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row j of each quarter by difficulty makes micro-batch j, and noise falls with difficulty; so every rule selects
    the same quarters of the batch as of a micro-batch. Stratified: of two halves all of the harder and half of the
    easier, hence the weights (1/2) / (2/3) and (1/2) / (1/3)."""
    eager = two_layers()
    model = cggr.optimize(copy.deepcopy(eager), ratio=RATIO, router_layers=1, inner="eager")
    drawn = torch.linspace(0.9, 0.1, ROWS)
    monkeypatch.setattr(plan, "uniform_noise", lambda shape, device, generator: drawn[:: ROWS // shape[0]])
    batch = batch_of(ROWS)
    batch = oracle.rows_of(batch, by_difficulty(eager, batch))
    items = torch.tensor(ROWS * (LENGTH - 1))
    model(**batch, num_items_in_batch=items)

    for rule, options, places, weights in RULES:
        apply_rule(model, rule, options)
        whole, gradients = oracle.step(model, {**batch, "num_items_in_batch": items})
        expected_rows = [place * MICRO + row for place in places for row in range(MICRO)]
        assert model.cggr.selected.tolist() == expected_rows, rule

        model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for row in range(MICRO):
            micro = {name: tensor[row::MICRO].contiguous() for name, tensor in batch.items()}
            loss = model(**micro, num_items_in_batch=items).loss
            assert model.cggr.selected.tolist() == list(places), rule
            loss.backward()
            total += loss.detach()
        accumulated = oracle.gradients(model)

        eager.zero_grad(set_to_none=True)
        logits = eager(batch["input_ids"][expected_rows]).logits[:, :-1]
        labels = batch["labels"][expected_rows][:, 1:]
        token_losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        row_weight = torch.tensor(weights).repeat_interleave(MICRO)
        expected = (row_weight * token_losses.mean(1)).sum() / row_weight.sum()
        expected.backward()
        for loss, actual in ((whole, gradients), (total, accumulated)):
            oracle.assert_same_step(loss, actual, expected.detach(), oracle.gradients(eager), rtol=1e-4, atol=1e-6)
    assert model.cggr.captures == 1


def inclusion(scores: torch.Tensor, k: int, floor: float) -> torch.Tensor:
    """π = min(1, c·q) that sums to k, by bisection on c."""
    q = (1 - floor) * scores / scores.sum() + floor / len(scores)
    low, high = 0.0, float(k / q.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * q).clamp(max=1).sum() < k else (low, middle)
    return (high * q).clamp(max=1)


def test_importance_is_unbiased_over_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """One uniform number draws the rows, and the selection only changes where it crosses a cumulative π: weighing one
    step from each interval by its length integrates loss and gradient exactly. Of the batch and of each half of it,
    divided by the batch's tokens: so two micro-batches add up to the plain gradient, in expectation."""
    floor = 0.3
    eager = two_layers()
    model = cggr.optimize(
        copy.deepcopy(eager),
        ratio=0.5,
        router_layers=1,
        inner="eager",
        selection="importance",
        selection_options={"floor": floor},
    )
    noise = {"drawn": 0.0}
    monkeypatch.setattr(plan, "uniform_noise", lambda shape, device, generator: torch.full(shape, noise["drawn"]))
    batch = batch_of(8)
    batch["labels"][::2, :5] = -100
    batch["labels"][3] = -100
    items = int(batch["labels"][:, 1:].ne(-100).sum())

    def expectation(part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        with torch.no_grad():
            logits = oracle.truncated(eager, ARCHITECTURES["gpt2"], 1)(part["input_ids"]).logits
        counts = oracle.counted(part["labels"], True)
        scores = oracle.token_scores(logits, part["labels"], "loss", True).sum(1)[counts > 0] / counts[counts > 0]
        k = len(counts) // 2
        edges = inclusion(scores.double().sort(descending=True).values, k, floor).cumsum(0) % 1
        edges = torch.cat([torch.tensor([0.0, 1.0]), edges]).sort().values
        loss, sums, selections = torch.zeros(()), {}, set()
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if high - low < 1e-6:
                continue
            noise["drawn"] = (low + high) / 2
            drawn, gradients = oracle.step(model, {**part, "num_items_in_batch": items})
            selections.add(tuple(model.cggr.selected.tolist()))
            loss += (high - low) * drawn
            for name, gradient in gradients.items():
                sums[name] = sums.get(name, 0) + (high - low) * gradient
        return loss, sums, len(selections)

    for part in (batch, *({name: tensor[half] for name, tensor in batch.items()} for half in (slice(4), slice(4, 8)))):
        loss, gradients, selections = expectation(part)
        assert selections > 1
        expected_loss, expected = oracle.step(eager, {**part, "num_items_in_batch": items})
        oracle.assert_same_step(loss, gradients, expected_loss, expected, rtol=1e-4, atol=1e-6)


def test_an_auxiliary_loss_is_of_the_selected_rows_and_not_scaled() -> None:
    """`num_items_in_batch` divides the tokens' sum, which is scaled to the batch's; the experts' balance is a mean."""
    eager = oracle.truncated(build("mixtral"), ARCHITECTURES["mixtral"], 2)
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="eager")
    batch = batch_of(6)
    batch["attention_mask"] = torch.ones_like(batch["labels"])
    batch["attention_mask"][:, :2] = 0
    batch["labels"][:, :4] = -100
    items = 2 * int(batch["labels"][:, 1:].ne(-100).sum())
    model.zero_grad(set_to_none=True)
    routed = model(**batch, num_items_in_batch=items)
    routed.loss.backward()
    plain = eager(**oracle.rows_of(batch, model.cggr.selected), num_items_in_batch=items)
    assert plain.aux_loss > 0
    assert torch.equal(routed.aux_loss, plain.aux_loss)
    balance = eager.router_aux_loss_coef * plain.aux_loss
    expected = (plain.loss - balance) * 2 + balance
    expected.backward()
    oracle.assert_same_step(
        routed.loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager), rtol=1e-4, atol=1e-6
    )
