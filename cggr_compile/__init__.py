"""Confidence-gated gradient routing as a compiler pass: `model = cggr.optimize(model)`."""

from cggr_compile.api import explain, handle, optimize, restore
from cggr_compile.config import ConfigError, RoutingConfig
from cggr_compile.errors import CannotOptimize, VerificationError
from cggr_compile.handle import Handle

__all__ = [
    "CannotOptimize",
    "ConfigError",
    "Handle",
    "RoutingConfig",
    "VerificationError",
    "explain",
    "handle",
    "optimize",
    "restore",
]
__version__ = "0.1.0"
