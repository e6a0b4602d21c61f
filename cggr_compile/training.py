"""Plain training loops: counting optimiser steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cggr_compile.api import handle


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Counts every `optimizer.step()` as a step of the routed model; returns what removes the hook again.

    Steps that a gradient scaler skips do not count, since the optimiser does not step. `optimizer` may be Accelerate's
    wrapper. `CGGRCallback` counts by itself and does not need this.

    Raises:
        CannotOptimize: the model is not optimised (call `cggr.optimize` first).
        TypeError: `optimizer` is not a torch optimiser.
    """
    routed = handle(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    own = optimizer
    # Accelerate's wrapper is an optimiser in name; the one inside takes the steps and runs the hooks.
    while isinstance(getattr(own, "optimizer", None), torch.optim.Optimizer):
        own = own.optimizer
    return own.register_step_post_hook(lambda *_: routed.step())
