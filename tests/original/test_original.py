"""Code written for the original CGGR, and what it promised, against independent computation."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import cggr_compile as cggr
from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer, TruncatedRouter, create_truncated_router
from cggr_compile.original.loss import sequence_aware_places

LOSS_METRICS = [
    *("step", "token_ratio", "tokens_selected", "tokens_total"),
    *("avg_confidence", "avg_entropy", "avg_difficulty", "selection", "scoring"),
]
MODEL_METRICS = [
    *("step", "token_ratio", "tokens_selected", "tokens_total", "router_tokens_selected", "sequences_selected"),
    *("avg_confidence", "avg_entropy", "sequence_selection_mode", "selection", "scoring"),
]
INFO = ["confidence", "entropy", "current_ratio", "tokens_selected", "tokens_total", "selection", "scoring"]
SCORINGS = ("entropy", "margin", "loss", "combined")
SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


class Plain(nn.Module):
    """No Hugging Face model: ids to logits through a list of blocks, under names of its own."""

    def __init__(self, blocks: int = 3, width: int = 16, dropout: float = 0.0, counted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.stack = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.out = nn.Linear(width, VOCABULARY)
        self.num_layers = blocks
        self.counted = counted
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        x = self.tokens(input_ids)
        blocks = (self.stack[i] for i in range(self.num_layers)) if self.counted else self.stack
        for block in blocks:
            x = block(x)
        return self.out(x)


class Fixed(nn.Module):
    """Logits that were given, or a scorer that was."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.values = values
        self.targets: Tensor | None = None
        self.step_count = torch.tensor(0)

    def step(self) -> None:
        self.step_count += 1

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Any:
        self.targets = targets
        return self.values[0] if len(self.values) == 1 else self.values


def batch_of(rows: int = 6, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return ids, ids.clone()


def logits_of(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def chosen_tokens(scores: Tensor, valid: Tensor, k: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return sorted([i for i in order if valid[i]][:k])


# --- the three integrations of the original's README, unchanged but for the import ---


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_readme_batch_splitting(kind: str) -> None:
    model = build("llama") if kind == "llama" else Plain()
    input_ids, labels = batch_of()

    router = create_truncated_router(model, num_layers=2)
    cggr_model = CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=4)
    optimizer = torch.optim.AdamW(cggr_model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = cggr_model(input_ids, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cggr_model.step()
        losses.append(loss.item())
        metrics = cggr_model.get_metrics()
    assert losses[-1] < losses[0] - 1
    assert list(metrics) == MODEL_METRICS
    assert metrics["step"] == 11
    assert metrics["sequences_selected"] < 6
    assert {id(p) for p in router.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_readme_manual_integration(kind: str) -> None:
    model = build("llama") if kind == "llama" else Plain()
    input_ids, targets = batch_of()
    criterion = CGGRLoss(
        scoring="combined",  # 'entropy', 'margin', 'loss', 'combined'
        selection="stratified",  # 'topk', 'stratified', 'sequence_aware'
        min_tokens_ratio=0.25,
        warmup_steps=8,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, kept = [], []
    for _ in range(12):
        output = model(input_ids)
        loss = criterion(getattr(output, "logits", output), targets)  # Only hard tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        criterion.step()
        losses.append(loss.item())
        kept.append(criterion.get_metrics()["tokens_selected"])
    assert losses[-1] < losses[0] - 1
    assert kept[0] == 48 > kept[4] > kept[-1] >= 12


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_readme_native_integration(kind: str) -> None:
    router = build("llama") if kind == "llama" else Plain()
    input_ids, _ = batch_of()
    scorer = CGGRScorer(router, min_tokens_ratio=0.5)
    scorer.step_count.fill_(1000)
    difficulty, mask, info = scorer(input_ids)
    expert_layer, x = nn.Linear(4, 4), torch.randn(6, 8, 4)
    expert_output = expert_layer(x) * mask.unsqueeze(-1)
    assert difficulty.shape == mask.shape == (6, 8)
    assert (difficulty.dtype, mask.dtype) == (torch.float32, torch.bool)
    assert list(info) == INFO
    assert info["tokens_selected"] == mask.sum() == math.floor(48 * info["current_ratio"].item())
    assert expert_output.ne(0).any(-1).equal(mask)
    assert f"{info['current_ratio']:.2f}"  # a number to scripts that print it


def test_readme_full_api() -> None:
    criterion = CGGRLoss(
        # Scoring
        scoring="combined",
        # Selection
        selection="topk",
        num_strata=4,  # For stratified
        min_tokens_per_sequence=1,  # For sequence_aware
        # Thresholding
        dynamic_threshold=True,
        threshold_sensitivity=0.5,
        # Curriculum
        min_tokens_ratio=0.25,
        warmup_steps=1000,
    )
    assert criterion(logits_of(2, 8, 20), torch.zeros(2, 8, dtype=torch.long)).dim() == 0


def test_signatures() -> None:
    common = {
        "scoring": "combined",
        "selection": "topk",
        "dynamic_threshold": True,
        "threshold_sensitivity": 0.5,
        "min_tokens_ratio": 0.25,
        "warmup_steps": 1000,
        "num_strata": 4,
        "min_tokens_per_sequence": 1,
    }
    required = inspect.Parameter.empty
    scorer = ("min_tokens_ratio", "warmup_steps", "dynamic_threshold", "threshold_sensitivity", "selection", "scoring")
    scored = {key: common[key] for key in (*scorer, "num_strata", "min_tokens_per_sequence")}
    schedule = {"min_tokens_ratio": 0.25, "warmup_steps": 1000}
    filtered = {"dataloader": required, "nano_router": required, "threshold": 0.3}
    expected = {
        "CGGRLoss": {**common, "base_loss": None},
        "CGGRScorer": {"router": required, **scored},
        "CGGRModel": {"model": required, "router": None, **scored},
        "TruncatedRouter": {"model": required, "num_layers": 2, "architecture": "auto"},
        "create_truncated_router": {"model": required, "num_layers": 2},
        "NanoRouter": {"vocab_size": 32000, "hidden_dim": 64, "pretrained_embeddings": None},
        "NanoRouter.from_model": {"model": required, "hidden_dim": 64},
        "NanoRouter.calibrate": {
            **dict.fromkeys(("self", "dataloader", "full_scorer"), required),
            "num_batches": 100,
            "lr": 1e-3,
        },
        "DifficultyFilteredDataLoader": {**filtered, "input_key": "input_ids", "skip_ratio": 0.5},
        "AsyncDifficultyFilteredDataLoader": {**filtered, "queue_size": 4, "input_key": "input_ids"},
        "AsyncCGGRScorer": {"router": required, **schedule, "selection": "fixed_quota"},
        "AsyncCGGRModel": {"model": required, "router": None, **schedule},
        "create_prefetching_iterator": {"dataloader": required, "async_scorer": required},
        "SelectiveCheckpointWrapper": {"model": required, "checkpoint_layers": None},
        "SelectiveCheckpointWrapper.selective_checkpointing": {"self": required, "enable": True},
        "apply_selective_checkpointing": dict.fromkeys(
            ("model", "forward_fn", "input_ids", "hard_indices", "kwargs"), required
        ),
        "CGGRCheckpointedModel": {"model": required, "router": None, **schedule, "use_checkpointing": True},
        "get_flash_attention_info": {},
        "enable_flash_attention": {"model": required, "backend": "auto", "verbose": True},
        "load_model_with_flash_attention": {
            "model_name_or_path": required,
            "backend": "auto",
            "torch_dtype": None,
            "device_map": "auto",
            "kwargs": required,
        },
        "benchmark_attention_backends": {
            "model": required,
            "input_ids": required,
            "warmup_steps": 3,
            "benchmark_steps": 10,
        },
    }
    for name, parameters in expected.items():
        found = inspect.signature(operator.attrgetter(name)(cggr)).parameters
        # In their order, which positional arguments follow.
        assert [(key, p.default) for key, p in found.items()] == list(parameters.items()), name
        assert name.partition(".")[0] in cggr.__all__


# --- values ---


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


# --- state, modes, autocast ---


def test_step_count_survives_a_round_trip() -> None:
    for make in (CGGRLoss, lambda: CGGRScorer(Plain()), lambda: CGGRModel(Plain())):
        first, second = make(), make()
        for _ in range(3):
            first.step()
        assert second.load_state_dict(first.state_dict()).missing_keys == []
        counter = getattr(second, "scorer", second).step_count
        assert (counter.item(), counter.dtype) == (3, torch.long)
    assert list(CGGRLoss().state_dict()) == ["step_count"]
    assert "scorer.step_count" in CGGRModel(Plain()).state_dict()


def test_scoring_ignores_dropout_and_restores_the_mode() -> None:
    model = Plain(dropout=0.5).train()
    model.stack[1].eval()
    ids, labels = batch_of()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    scorer = CGGRScorer(model)
    difficulty = scorer(ids, targets=labels)[0]
    assert torch.get_rng_state().equal(state), "scoring must not advance the generator of the main pass"
    assert [module.training for module in model.modules()] == modes
    assert difficulty.equal(CGGRScorer(copy.deepcopy(model).eval())(ids, targets=labels)[0])
    assert not difficulty.requires_grad
    with pytest.raises(RuntimeError):
        scorer(ids.float(), targets=labels)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("cut", [True, False])
def test_every_parameter_gets_a_gradient_under_autocast(cut: bool) -> None:
    model, (ids, labels) = build("llama"), batch_of()
    routed = CGGRModel(model, create_truncated_router(model, 1) if cut else None, warmup_steps=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = routed(ids, labels=labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_router_runs_outside_the_weight_cache() -> None:
    """Asserted on the switch itself: in torch 2.13 a cache filled without gradients does no harm."""
    seen = []

    class Probe(Plain):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            seen.append((torch.is_autocast_cache_enabled(), torch.is_grad_enabled(), self.training))
            return super().forward(input_ids)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        CGGRModel(Probe())(batch_of()[0], labels=batch_of()[1])
    assert seen == [(False, False, False), (True, True, True)]


def test_nothing_is_read_back_before_the_metrics() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for scoring in SCORINGS:
            for selection in SELECTIONS:
                loss = CGGRLoss(scoring, selection)(torch.empty(2, 8, 20), torch.zeros(2, 8, dtype=torch.long))
                assert loss.shape == ()
                scorer = CGGRScorer(Fixed(torch.empty(2, 8, 20)), scoring=scoring, selection=selection)
                ids = torch.zeros(2, 8, dtype=torch.long)
                assert scorer(ids, targets=ids)[1].shape == (2, 8)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_criterion_need_not_follow_the_data_to_its_device(selection: str, dynamic: bool) -> None:
    ids, logits = torch.empty(2, 8, dtype=torch.long, device="meta"), torch.empty(2, 8, 20, device="meta")
    assert CGGRLoss(selection=selection, dynamic_threshold=dynamic)(logits, ids).is_meta
    assert CGGRScorer(Fixed(logits), selection=selection, dynamic_threshold=dynamic)(ids, targets=ids)[1].is_meta


# --- the router ---


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bert", "mamba", "mixtral"])
def test_cut_model_equals_a_truncated_copy(name: str) -> None:
    architecture, model = ARCHITECTURES[name], build(name).eval()
    model.config.use_cache = True
    batch = token_batch(takes_mask=architecture.takes_mask)
    labels = batch.pop("labels")
    before = (model.config.to_dict(), list(model.state_dict()), model(**batch).logits)
    router = TruncatedRouter(model, 2)
    without_cache = {} if name == "bert" else {"use_cache": False}
    with torch.no_grad():
        expected = oracle.truncated(model, architecture, 2)(**batch, **without_cache).logits
        assert router(**batch).equal(expected)
    assert not router.passthrough
    after = (model.config.to_dict(), list(model.state_dict()), model(**batch).logits)
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])
    assert CGGRScorer(router)(targets=labels, **batch)[1].any()


def test_router_keeps_no_cache() -> None:
    model, (ids, _), caches = build("llama").eval(), batch_of(), []
    model.config.use_cache = True
    model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    TruncatedRouter(model)(ids)
    model(ids)
    assert caches[0] is None
    assert caches[1] is not None


@pytest.mark.parametrize("counted", [True, False])
def test_plain_modules_are_cut_too(counted: bool) -> None:
    model, (ids, _) = Plain(counted=counted), batch_of()
    x = model.tokens(ids)
    x = model.stack[0](x)
    assert create_truncated_router(model, 1)(ids).equal(model.out(x))
    assert (len(model.stack), model.num_layers) == (3, 3)


def test_model_is_put_back_after_an_error() -> None:
    model = build("llama")
    layers, config = model.model.layers, model.config.to_dict()
    with pytest.raises(RuntimeError):
        TruncatedRouter(model)(torch.zeros(2, 4))
    assert model.model.layers is layers
    assert model.config.to_dict() == config


class NoList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.tokens(input_ids),)


class TwoStacks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.stack)


class Indexed(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.stack[2](self.stack[0](self.tokens(input_ids))))


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (NoList(), "NoList cannot be cut: it has no list of layers of one class"),
        (TwoStacks(), "stack and other are equally long"),
        (Plain(blocks=2), "stack has no more than num_layers=2 layers"),
        (Indexed(), "its forward indexes stack"),
    ],
    ids=["no list", "two lists", "short list", "indexed list"],
)
def test_passthrough_with_a_warning(model: nn.Module, obstacle: str) -> None:
    ids, _ = batch_of()
    expected = model(ids)
    with pytest.warns(UserWarning, match=obstacle):
        logits = (router := create_truncated_router(model))(ids)
    assert router.passthrough is True
    assert logits.equal(expected[0] if isinstance(expected, tuple) else expected)
    assert router(ids).equal(logits)
    with pytest.raises(ValueError, match="use architecture='passthrough'"):
        TruncatedRouter(model, architecture="llama")(ids)


def test_an_index_error_of_the_ids_stays_one() -> None:
    router = TruncatedRouter(Plain())
    with pytest.raises(IndexError):
        router(torch.full((1, 2), VOCABULARY))
    assert not router.passthrough


def test_experts_inside_layers_are_not_the_layers() -> None:
    model = Plain(blocks=2)
    for block in model.stack:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    ids, _ = batch_of()
    assert TruncatedRouter(model, 1)(ids).equal(model.out(model.stack[0](model.tokens(ids))))


def test_explicit_passthrough_and_headless_models() -> None:
    model, (ids, _) = build("llama").eval(), batch_of()
    router = TruncatedRouter(model, architecture="passthrough")
    assert router.passthrough
    assert router(ids).equal(model(ids).logits)
    headless = TruncatedRouter(model.model, architecture="llama")
    assert headless(ids).shape == (6, 8, 32)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "best"}, "scoring is 'best', expected one of entropy, margin, loss, combined"),
        ({"selection": "best"}, "selection is 'best', expected one of topk"),
        ({"min_tokens_ratio": 0.0}, r"min_tokens_ratio is 0\.0, expected in \(0, 1\]"),
        ({"min_tokens_ratio": 1.1}, r"min_tokens_ratio is 1\.1"),
        ({"min_tokens_ratio": math.nan}, "min_tokens_ratio is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected at least 0"),
        ({"threshold_sensitivity": 1.5}, r"threshold_sensitivity is 1\.5, expected in \[0, 1\]"),
        ({"threshold_sensitivity": -0.1}, r"threshold_sensitivity is -0\.1"),
        ({"num_strata": 0}, "num_strata is 0, expected at least 1"),
        ({"min_tokens_per_sequence": 0}, "min_tokens_per_sequence is 0, expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for make in (CGGRLoss, lambda **o: CGGRScorer(Plain(), **o), lambda **o: CGGRModel(Plain(), **o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_bad_shapes() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    scorer, model = CGGRScorer(Plain()), CGGRModel(Plain())
    for bad in (ids[None], ids[0]):
        with pytest.raises(ValueError, match="input_ids has shape"):
            scorer(bad)
        with pytest.raises(ValueError, match="input_ids has shape"):
            model(bad, labels=bad)
    with pytest.raises(ValueError, match=r"targets must match input_ids: shapes \(2, 5\) and \(2, 6\)"):
        scorer(ids, targets=ids[:, 1:])
    with pytest.raises(ValueError, match="labels must match input_ids"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"Unsupported logits shape \(2, 3, 4, 5\)"):
        CGGRLoss()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"logits shape \(2, 6, 5\) does not match targets shape \(2, 5\)"):
        CGGRLoss()(torch.zeros(2, 6, 5), ids[:, 1:])
    with pytest.raises(ValueError, match=r"the router returned logits of shape \(2, 5\), expected \[B, S, V\]"):
        CGGRScorer(Fixed(torch.zeros(2, 5)))(ids)


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match=r"model is NoneType, expected a torch\.nn\.Module"):
        CGGRModel(None)
    with pytest.raises(ValueError, match="router is function"):
        CGGRModel(Plain(), router=lambda ids: ids)
    with pytest.raises(ValueError, match="router is str"):
        CGGRScorer("router")
    with pytest.raises(ValueError, match="model is NoneType"):
        create_truncated_router(None)
    with pytest.raises(ValueError, match="num_layers is 0, expected at least 1"):
        create_truncated_router(Plain(), 0)
    with pytest.raises(ValueError, match="architecture is 'rnn', expected one of auto, llama"):
        TruncatedRouter(Plain(), architecture="rnn")
