"""Confidence-gated gradient routing as a compiler pass: `model = cggr.optimize(model)`."""

from cggr_compile.checking.check import Check, check
from cggr_compile.checking.eager_layers import LayerStackNotFound
from cggr_compile.checking.eager_tokens import TokensNotTold
from cggr_compile.config import RoutingConfig
from cggr_compile.data.loader import FilteredLoader
from cggr_compile.errors import CannotOptimize, VerificationError
from cggr_compile.front.api import explain, handle, optimize, restore
from cggr_compile.front.attach import attach
from cggr_compile.front.handle import Handle
from cggr_compile.original.attention import (
    benchmark_attention_backends,
    enable_flash_attention,
    get_flash_attention_info,
    load_model_with_flash_attention,
)
from cggr_compile.original.checkpointing import (
    CGGRCheckpointedModel,
    SelectiveCheckpointWrapper,
    apply_selective_checkpointing,
)
from cggr_compile.original.dataloader import (
    AsyncDifficultyFilteredDataLoader,
    DifficultyFilteredDataLoader,
    NanoRouter,
)
from cggr_compile.original.experts import (
    PersistentKernelConfig,
    PersistentTRMLP,
    create_persistent_tr_mlp,
    persistent_grouped_gemm,
)
from cggr_compile.original.loss import CGGRLoss, CGGRScorer
from cggr_compile.original.model import CGGRModel
from cggr_compile.original.prefetching import AsyncCGGRModel, AsyncCGGRScorer, create_prefetching_iterator
from cggr_compile.original.router import TruncatedRouter, create_truncated_router
from cggr_compile.run.metrics import METRICS
from cggr_compile.values import ConfigError

__all__ = [
    "METRICS",
    "AsyncCGGRModel",
    "AsyncCGGRScorer",
    "AsyncDifficultyFilteredDataLoader",
    "CGGRCallback",
    "CGGRCheckpointedModel",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "CannotOptimize",
    "Check",
    "ConfigError",
    "DifficultyFilteredDataLoader",
    "FilteredLoader",
    "Handle",
    "LayerStackNotFound",
    "NanoRouter",
    "PersistentKernelConfig",
    "PersistentTRMLP",
    "RoutingConfig",
    "SelectiveCheckpointWrapper",
    "TokensNotTold",
    "TruncatedRouter",
    "VerificationError",
    "apply_selective_checkpointing",
    "attach",
    "benchmark_attention_backends",
    "check",
    "create_persistent_tr_mlp",
    "create_prefetching_iterator",
    "create_truncated_router",
    "enable_flash_attention",
    "explain",
    "get_flash_attention_info",
    "handle",
    "load_model_with_flash_attention",
    "optimize",
    "persistent_grouped_gemm",
    "restore",
    "route",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # They need transformers' Trainer, whose import takes seconds that most programs never need.
    if name in ("CGGRCallback", "route"):
        from cggr_compile.front import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
