"""Confidence-gated gradient routing as a compiler pass: `model = cggr.optimize(model)`."""

from cggr_compile.api import explain, handle, optimize, restore
from cggr_compile.config import ConfigError, RoutingConfig
from cggr_compile.contract import Check, check
from cggr_compile.eager_layers import LayerStackNotFound
from cggr_compile.eager_tokens import TokensNotTold
from cggr_compile.errors import CannotOptimize, VerificationError
from cggr_compile.handle import Handle
from cggr_compile.original import CGGRLoss, CGGRScorer
from cggr_compile.original_model import CGGRModel
from cggr_compile.original_router import TruncatedRouter, create_truncated_router
from cggr_compile.training import attach

__all__ = [
    "CGGRCallback",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "CannotOptimize",
    "Check",
    "ConfigError",
    "Handle",
    "LayerStackNotFound",
    "ModelLossMixin",
    "RoutingConfig",
    "TokensNotTold",
    "TruncatedRouter",
    "VerificationError",
    "attach",
    "check",
    "create_truncated_router",
    "explain",
    "handle",
    "optimize",
    "restore",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # They need transformers' Trainer, whose import takes seconds that most programs never need.
    if name in ("CGGRCallback", "ModelLossMixin"):
        from cggr_compile import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
