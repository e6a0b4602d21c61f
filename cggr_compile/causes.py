"""What Dynamo stops at, in the user's terms."""

from __future__ import annotations

import os

import torch
from torch._dynamo.exc import InternalTorchDynamoError, TorchRuntimeError, Unsupported, UserError

from cggr_compile.errors import CannotOptimize


def refusal_of(error: Unsupported | UserError | TorchRuntimeError | InternalTorchDynamoError) -> CannotOptimize:
    """What to tell the user about an error of Dynamo's."""
    first_line = str(error).splitlines()[0]
    if isinstance(error, TorchRuntimeError):
        return CannotOptimize(
            f"the model fails while Dynamo traces it ({first_line})",
            hint="check that the same call works without cggr, and that all inputs are on one device",
        )
    if isinstance(error, InternalTorchDynamoError):
        return CannotOptimize(
            f"Dynamo itself fails while it traces the model ({first_line})",
            hint="report it to PyTorch if torch.compile fails alike; fallback='eager' trains without routing",
        )
    stack = getattr(error, "real_stack", None) or []
    inside_torch = os.path.dirname(torch.__file__)
    frame = next((frame for frame in reversed(stack) if not frame.filename.startswith(inside_torch)), None)
    return CannotOptimize(
        f"the model breaks Dynamo's graph ({first_line})",
        source=f"{frame.filename}:{frame.lineno}: {frame.line}" if frame else None,
        hint="rewrite that line, or pass fallback='eager' to train without routing",
    )
