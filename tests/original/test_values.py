"""What the original's losses, scorers and models compute, against independent computation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch
from hypothesis import given
from hypothesis import strategies as st
from original_models import (
    LOSS_METRICS,
    MODEL_METRICS,
    SCORINGS,
    SELECTIONS,
    Fixed,
    Plain,
    batch_of,
    chosen_tokens,
    logits_of,
)
from torch import Tensor, nn

from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer, create_truncated_router
from cggr_compile.original.loss import sequence_aware_places


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_loss_is_the_mean_over_the_selected(scoring: str, selection: str) -> None:
    logits, targets = logits_of(3, 10, 20, spread=2.0), torch.randint(0, 20, (3, 10))
    targets[0, 2:6] = -100
    targets[2] = -100
    criterion = CGGRLoss(
        scoring, selection, min_tokens_ratio=0.3, warmup_steps=0, dynamic_threshold=False, min_tokens_per_sequence=3
    )
    loss = criterion(logits, targets)
    scores = oracle.token_scores(logits.detach(), targets, scoring, causal=False).flatten()
    counted = targets.flatten() != -100
    ranked = chosen_tokens(scores, counted, 16)
    ranked.sort(key=lambda i: -scores[i])
    if selection == "stratified":  # four strata of four, shares 4 : 3 : 2 : 1 of floor(0.3 · 16) = 4
        rows = [ranked[0], ranked[4], ranked[1], ranked[8]]
    elif selection == "sequence_aware":  # three of each sequence that has any: more than four
        rows = [i for start in (0, 10) for i in [j for j in ranked if start <= j < start + 10][:3]]
    else:
        rows = ranked[:4]
    rows = sorted(rows)
    expected = F.cross_entropy(logits.flatten(0, 1)[rows], targets.flatten()[rows])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.flatten(0, 1).abs().sum(-1).nonzero().flatten().tolist() == rows
    metrics = criterion.get_metrics()
    assert list(metrics) == LOSS_METRICS
    logs = logits.detach().log_softmax(-1).flatten(0, 1)[counted]
    assert metrics == {
        "step": 0,
        "token_ratio": 0.3,
        "tokens_selected": len(rows),
        "tokens_total": 16,
        "avg_confidence": pytest.approx(logs.exp().amax(-1).mean().item(), rel=1e-5),
        "avg_entropy": pytest.approx(-(logs.exp() * logs).sum(-1).mean().item(), rel=1e-5),
        "avg_difficulty": pytest.approx(scores[counted].mean().item(), rel=1e-5),
        "selection": selection,
        "scoring": scoring,
    }


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 6)), least=st.integers(1, 3))
def test_sequence_aware_places_are_the_definitions(data: st.DataObject, shape: tuple[int, int], least: int) -> None:
    """Python's sort: the hardest `least` of each sequence, then the rest, then NaN, ties to the lower index."""
    count = shape[0] * shape[1]
    scores = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, -2.0, math.inf, -math.inf, math.nan]), min_size=count, max_size=count)
    )
    valid = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    ranked = sorted((i for i in range(count) if valid[i] and not math.isnan(scores[i])), key=lambda i: (-scores[i], i))
    first = [i for b in range(shape[0]) for i in [j for j in ranked if j // shape[1] == b][:least]]
    order = [i for i in ranked if i in first] + [i for i in ranked if i not in first]
    order += [i for i in range(count) if valid[i] and math.isnan(scores[i])]
    places = sequence_aware_places(torch.tensor(scores).view(shape), torch.tensor(valid).view(shape), least)
    found = places.flatten().tolist()
    assert sorted(found) == list(range(count))
    assert [found.index(place) for place in range(len(order))] == order


def test_flat_logits_are_one_sequence() -> None:
    logits, targets = logits_of(12, 20), torch.randint(0, 20, (12,))
    assert CGGRLoss(warmup_steps=0)(logits, targets).equal(CGGRLoss(warmup_steps=0)(logits[None], targets[None]))


@pytest.mark.parametrize("base", [nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), nn.CrossEntropyLoss()])
def test_base_loss_gets_the_selected_tokens(base: nn.Module) -> None:
    logits, targets = logits_of(2, 8, 20), torch.randint(0, 20, (2, 8))
    targets[:, :3] = -100
    options = {"scoring": "loss", "min_tokens_ratio": 0.5, "warmup_steps": 0, "dynamic_threshold": False}
    loss = CGGRLoss(base_loss=base, **options)(logits, targets)
    scores = oracle.token_scores(logits.detach(), targets, "loss", causal=False).flatten()
    rows = chosen_tokens(scores, targets.flatten() != -100, 5)
    torch.testing.assert_close(loss, base(logits.flatten(0, 1)[rows], targets.flatten()[rows]).mean())
    nothing = CGGRLoss(base_loss=base, **options)(logits, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing == 0
    assert logits.grad.equal(torch.zeros_like(logits))


@pytest.mark.parametrize(("step", "warmup"), [(0, 10), (3, 10), (10, 10), (25, 10), (0, 0)])
@pytest.mark.parametrize("selection", ["topk", "fixed_quota"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_ratio(step: int, warmup: int, selection: str, dynamic: bool) -> None:
    logits, targets = logits_of(4, 25, 30, spread=3.0), torch.zeros(4, 25, dtype=torch.long)
    criterion = CGGRLoss(
        selection=selection,
        min_tokens_ratio=0.4,
        warmup_steps=warmup,
        dynamic_threshold=dynamic,
        threshold_sensitivity=0.7,
    )
    for _ in range(step):
        criterion.step()
    criterion(logits, targets)
    ratio = 1 - (1 - 0.4) * min(1.0, step / warmup if warmup else 1.0)
    if dynamic and selection == "topk":
        confidence = logits.detach().softmax(-1).amax(-1).mean().item()
        ratio = min(1.0, ratio * (1 + (1 - confidence) * 0.7))
    metrics = criterion.get_metrics()
    assert metrics["token_ratio"] == pytest.approx(ratio, rel=1e-6)
    assert metrics["tokens_selected"] == math.floor(100 * ratio + 1e-9)
    assert metrics["step"] == step


def test_ratio_is_exact_at_both_ends() -> None:
    criterion = CGGRLoss(min_tokens_ratio=0.4, warmup_steps=1000, dynamic_threshold=False)
    for step, ratio in ((0, 1.0), (1000, 0.4)):
        criterion.step_count.fill_(step)
        criterion(logits_of(2, 8, 20), torch.zeros(2, 8, dtype=torch.long))
        assert criterion.get_metrics()["token_ratio"] == ratio


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("with_targets", [True, False])
def test_scorer_compares_with_the_next_token(scoring: str, with_targets: bool) -> None:
    ids, labels = batch_of(3, 7)
    labels[1, 3] = -100
    logits = logits_of(3, 7, VOCABULARY).detach()
    scorer = CGGRScorer(Fixed(logits), scoring=scoring, warmup_steps=0, min_tokens_ratio=0.4, dynamic_threshold=False)
    difficulty, mask, info = scorer(ids, targets=labels) if with_targets else scorer(ids)
    if with_targets:
        expected = oracle.token_scores(logits, labels, scoring, causal=True)
        counted = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    else:
        unlabelled = {"combined": ("entropy", "margin"), "loss": ("entropy",)}.get(scoring, (scoring,))
        zeros = torch.zeros_like(ids)
        expected = sum(oracle.token_scores(logits, zeros, part, causal=False) for part in unlabelled)
        counted = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(difficulty, expected)
    assert info["tokens_total"] == counted.sum() == (17 if with_targets else 21)
    rows = chosen_tokens(expected.flatten(), counted.flatten(), math.floor(counted.sum().item() * 0.4))
    assert mask.flatten().nonzero().flatten().tolist() == rows
    torch.testing.assert_close(info["confidence"], logits.softmax(-1).amax(-1))
    assert (info["selection"], info["scoring"]) == ("topk", scoring)


def test_scorer_skips_padding_without_targets() -> None:
    ids, _ = batch_of(2, 6)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    _, mask, info = CGGRScorer(Plain())(ids, attention_mask=attention_mask)
    assert mask.equal(attention_mask.bool())
    assert info["tokens_total"] == 8


def test_scores_of_bfloat16_logits_are_float32() -> None:
    logits = logits_of(2, 6, 50).detach().bfloat16()
    difficulty, _, _ = CGGRScorer(Fixed(logits))(torch.zeros(2, 6, dtype=torch.long))
    wanted = oracle.token_scores(logits, torch.zeros(2, 6, dtype=torch.long), "entropy", causal=False)
    wanted = wanted + oracle.token_scores(logits, torch.zeros(2, 6, dtype=torch.long), "margin", causal=False)
    torch.testing.assert_close(difficulty, wanted)


@pytest.mark.parametrize(
    ("mask_rows", "ratio", "kept", "mode"),
    [
        ([1], 0.5, [1], "mask_any"),
        ([0, 3], 0.25, [0, 3], "mask_any"),
        ([0, 1, 2, 3], 0.4, [1, 2], "quota_fallback"),
        ([0, 1, 2, 3], 1.0, [0, 1, 2, 3], "mask_any"),
        ([], 0.5, [0, 1, 2, 3], "mask_any"),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_model_trains_on_the_sequences_of_a_replaced_scorer(
    mask_rows: list[int], ratio: float, kept: list[int], mode: str, as_tensor: bool
) -> None:
    ids, labels = batch_of(4, 6)
    labels[2, 4] = -100
    attention_mask = torch.ones_like(ids)
    mask = torch.zeros(4, 6)
    mask[mask_rows, 2] = 1.0
    info = {
        "current_ratio": torch.tensor(ratio) if as_tensor else ratio,
        "confidence": torch.zeros(4, 6),
        "entropy": torch.ones(4, 6),
        "selection": "topk",
        "scoring": "combined",
    }
    plain = Plain()
    model = CGGRModel(plain, warmup_steps=0)
    model.scorer = Fixed(torch.tensor([0.1, 1.0, 0.8, 0.4]).repeat_interleave(6).view(4, 6), mask, info)
    assert model.get_metrics() == {}
    model.step()
    loss = model(ids, labels=labels, attention_mask=attention_mask)
    assert model.scorer.targets is labels
    assert plain.shapes == [(len(kept), 6)]
    expected = F.cross_entropy(plain(ids[kept])[:, :-1].flatten(0, 1), labels[kept, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    counted = 5 * len(kept) - (2 in kept)
    metrics = model.get_metrics()
    assert list(metrics) == MODEL_METRICS
    assert metrics == {
        "step": 1,
        "token_ratio": pytest.approx(ratio),
        "tokens_selected": counted,
        "tokens_total": 19,
        "router_tokens_selected": len(mask_rows),
        "sequences_selected": len(kept),
        "avg_confidence": 0.0,
        "avg_entropy": 1.0,
        "sequence_selection_mode": mode,
        "selection": "topk",
        "scoring": "combined",
    }


@pytest.mark.parametrize(
    ("rows", "ratio", "kept"), [(5, 0.4, 2), (10, 0.3, 3), (10, 0.31, 4), (25, 0.6, 15), (4, 0.01, 1)]
)
@pytest.mark.parametrize("kind", [float, lambda ratio: torch.tensor(ratio, dtype=torch.float64), torch.tensor])
def test_quota_is_the_ceiling_of_the_ratio(rows: int, ratio: float, kept: int, kind: Callable[[float], Any]) -> None:
    ids, labels = batch_of(rows)
    zeros = torch.zeros(rows, 8)
    info = {"current_ratio": kind(ratio), "confidence": zeros, "entropy": zeros, "selection": "topk", "scoring": "loss"}
    model = CGGRModel(Plain())
    model.scorer = Fixed(zeros, zeros == 0, info)
    model(ids, labels=labels)
    assert model.model.shapes == [(kept, 8)], "equal difficulties: the first sequences"


def test_quota_ranks_by_the_mean_over_counted_labels() -> None:
    ids, labels = batch_of(3, 4)
    labels[0, 2:] = -100
    difficulty = torch.tensor([[1.0, 9, 9, 9], [2, 2, 2, 9], [math.nan, 3, 3, 0]])  # means 1, 2 and 3
    zeros = torch.zeros(3, 4)
    info = {"current_ratio": 0.5, "confidence": zeros, "entropy": zeros, "selection": "topk", "scoring": "loss"}
    model = CGGRModel(Plain())
    model.scorer = Fixed(difficulty, zeros == 0, info)
    loss = model(ids, labels=labels)
    torch.testing.assert_close(loss, F.cross_entropy(model.model(ids[1:])[:, :-1].flatten(0, 1), ids[1:, 1:].flatten()))


def test_model_without_labels_is_the_model() -> None:
    model = build("llama").eval()
    ids, _ = batch_of()
    assert CGGRModel(model)(ids).logits.equal(model(ids).logits)


def test_model_on_llama_equals_eager_on_the_rows() -> None:
    """A padded batch, the model's own scores, the quota: rows, loss and gradients are those of the eager oracle."""
    model, batch = build("llama"), token_batch(seed=3)
    reference = copy.deepcopy(model)
    routed = CGGRModel(model, create_truncated_router(model, 2), 0.4, 0, dynamic_threshold=False, scoring="loss")
    loss = routed(**batch)
    loss.backward()
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        scores = oracle.token_scores(
            oracle.truncated(reference, ARCHITECTURES["llama"], 2)(**inputs).logits, batch["labels"], "loss", True
        )
    counted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    tokens = chosen_tokens(scores.flatten(), counted.flatten(), math.floor(0.4 * counted.sum().item()))
    rows = torch.tensor(sorted({token // 12 for token in tokens}))
    assert len(rows) < 6, "row 2 has no label: the mask decides"
    expected_loss, expected = oracle.step(reference, oracle.rows_of(batch, rows))
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected_loss, expected, rtol=1e-4, atol=1e-6)
    assert routed.get_metrics()["sequence_selection_mode"] == "mask_any"


@pytest.mark.parametrize("length", [1, 8])
def test_all_labels_ignored(length: int) -> None:
    plain = Plain()
    ids, labels = batch_of(4, length)
    loss = CGGRModel(plain, warmup_steps=0)(ids, labels=torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.eq(0).all() for parameter in plain.parameters())
    logits = logits_of(2, 3, 5)
    zero = CGGRLoss()(logits, torch.full((2, 3), -100))
    zero.backward()
    assert zero == 0
    assert logits.grad.equal(torch.zeros_like(logits))


def test_batched_arguments_follow_the_rows() -> None:
    seen: dict[str, Any] = {}

    class Recording(Plain):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
            seen.update(kwargs)
            return super().forward(input_ids)

    ids, labels = batch_of(4, 4)
    model = CGGRModel(Recording(), router=Plain(), warmup_steps=0)
    kwargs = {
        "attention_mask": torch.arange(4)[:, None].expand(4, 4),
        "nested": {"pair": (torch.arange(4), [torch.arange(4) + 4])},
        "cache_position": torch.arange(4),
        "position_ids": torch.arange(4)[None],
        "num_items_in_batch": torch.tensor(3),
        "flag": True,
    }
    mask = torch.zeros(4, 4)
    mask[[1, 3]] = 1
    info = {"current_ratio": 0.5, "confidence": mask, "entropy": mask, "selection": "topk", "scoring": "loss"}
    model.scorer = Fixed(torch.zeros(4, 4), mask, info)
    model(ids, labels=labels, **kwargs)
    assert seen["attention_mask"].equal(kwargs["attention_mask"][[1, 3]])
    assert seen["nested"]["pair"][0].tolist() == [1, 3]
    assert seen["nested"]["pair"][1][0].tolist() == [5, 7]
    for name in ("cache_position", "position_ids", "num_items_in_batch", "flag"):
        assert seen[name] is kwargs[name]
