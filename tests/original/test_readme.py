"""The integrations of the original's README, unchanged but for the import, and its signatures."""

from __future__ import annotations

import inspect
import math
import operator

import pytest
import torch
from architectures import build
from original_models import INFO, MODEL_METRICS, Plain, batch_of, logits_of
from torch import nn

import cggr_compile as cggr
from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer, create_truncated_router


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
        "PersistentTRMLP": {
            "hidden_dim": required,
            "intermediate_dim": required,
            "num_experts": 8,
            "top_k": 2,
            "config": None,
        },
        # `mask` is not the original's.
        "PersistentTRMLP.forward": {"self": required, "x": required, "use_persistent": True, "mask": None},
        "create_persistent_tr_mlp": {
            "hidden_dim": required,
            "intermediate_dim": None,
            "num_experts": 8,
            "top_k": 2,
            "kwargs": required,
        },
        "persistent_grouped_gemm": {"inputs": required, "weights": required, "config": None},
        "PersistentKernelConfig": {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 32,
            "num_stages": 3,
            "num_warps": 8,
            "producer_warps": 2,
            "consumer_warps": 6,
            "use_cooperative_groups": True,
            "grid_sync_frequency": 4,
            "use_async_copy": True,
            "prefetch_distance": 2,
        },
    }
    for name, parameters in expected.items():
        found = inspect.signature(operator.attrgetter(name)(cggr)).parameters
        # In their order, which positional arguments follow.
        assert [(key, p.default) for key, p in found.items()] == list(parameters.items()), name
        assert name.partition(".")[0] in cggr.__all__
