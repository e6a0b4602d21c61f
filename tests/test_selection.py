"""Selection rules inside a routed step: which rows, and a loss that weighs them as the rule says."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, build, token_batch
from cggr_compile.kernels import selection

import cggr_compile as cggr

RATIO, SEED = 0.5, 3


def optimized(eager: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return cggr.optimize(copy.deepcopy(eager), ratio=RATIO, router_layers=2, inner="eager", seed=SEED, **options)


def drawn(eager: torch.nn.Module, batch: dict[str, torch.Tensor], rule: str, **options: float) -> tuple:
    """Rows and weights by the rule, from an eager router's scores and the model's own generator."""
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = oracle.truncated(eager, ARCHITECTURES["llama"], 2)(**inputs).logits
    counts = oracle.counted(batch["labels"], True)
    scores = oracle.token_scores(logits, batch["labels"], "loss", True).sum(1) / counts.clamp(min=1)
    noise = torch.rand(len(scores), generator=torch.Generator().manual_seed(SEED))
    k = -(-len(scores) // 2)
    return selection.RULES[rule].function(scores, counts > 0, k, noise, **options)


def row_sums(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row's sum of token losses, with a gradient."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


@pytest.mark.parametrize(
    ("rule", "options", "items"),
    [
        ("trimmed", {"tau": 0.2, "epsilon": 0.5}, None),
        ("stratified", {"num_strata": 3}, None),
        ("stratified", {}, 50),
        ("importance", {}, None),
        ("importance", {"floor": 0.5}, 50),
    ],
)
def test_rows_loss_and_gradients_are_the_rules(rule: str, options: dict[str, float], items: int | None) -> None:
    """Ragged counts of labels in the rows; `num_items_in_batch` as Trainer passes it under gradient accumulation."""
    eager = build("llama")
    batch = token_batch(9, 16)
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    model = optimized(eager, selection=rule, selection_options=options)
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **extra).loss
    loss.backward()
    rows, weights = drawn(eager, batch, rule, **options)
    assert torch.equal(model.cggr.selected, rows)

    counts = oracle.counted(batch["labels"], True)
    sums = row_sums(eager, oracle.rows_of(batch, rows))
    total = counts.sum() if items is None else items
    if rule == "importance":
        expected = (weights * (counts > 0).sum() * sums).sum() / total
    else:
        # A mean over what the weights stand for, scaled to the batch where the caller divides by its own count.
        expected = (weights * sums).sum() / (weights * counts[rows]).sum() * counts.sum() / total
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager), rtol=1e-4, atol=1e-6)


def test_every_label_ignored_is_a_connected_zero() -> None:
    batch = token_batch(6, 16)
    batch["labels"].fill_(-100)
    loss, gradients = oracle.step(optimized(build("llama"), selection="importance"), batch)
    assert loss.item() == 0
    assert all(gradient is not None and gradient.count_nonzero() == 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "trimed"}, "did you mean 'trimmed'"),
        ({"selection": "trimmed", "selection_options": {"taw": 1}}, "has no option 'taw', did you mean 'tau'"),
        ({"selection": "topk", "selection_options": {"tau": 1}}, "'topk' has no option 'tau' valid options: none"),
        (
            {"selection": "trimmed", "selection_options": {"tau": "a"}},
            r"selection_options\['tau'\]='a' is not a number",
        ),
        ({"selection": "trimmed", "selection_options": 3}, "neither None nor a mapping"),
    ],
)
def test_bad_options_name_the_valid_ones(options: dict, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)
