"""Confidence-gated gradient routing as a compiler pass: `model = cggr.optimize(model)`."""

from cggr_compile.checking.check import Check, check
from cggr_compile.checking.eager_layers import LayerStackNotFound
from cggr_compile.checking.eager_tokens import TokensNotTold
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, VerificationError
from cggr_compile.front.api import explain, handle, optimize, restore
from cggr_compile.front.attach import attach
from cggr_compile.front.handle import Handle
from cggr_compile.original.loss import CGGRLoss, CGGRScorer
from cggr_compile.original.model import CGGRModel
from cggr_compile.original.router import TruncatedRouter, create_truncated_router
from cggr_compile.run.metrics import METRICS
from cggr_compile.values import ConfigError

__all__ = [
    "METRICS",
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
        from cggr_compile.front import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
