"""Hooks on an optimised model that refuse training steps which would pass the routed forward by, unnoticed.

Trainers and wrappers patch `forward` after `optimize` did. Most call what they found, as Accelerate's autocast does.
Some compute the loss themselves and call only the model's backbone (TRL's trainers), and `torch.nn.DataParallel` runs
replicas whose patched forward is still bound to the first model. Neither fails by itself; the step is only not routed,
or not computed with the replica's parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cggr_compile.errors import CannotOptimize

if TYPE_CHECKING:
    from cggr_compile.handle import Handle


class Guard:
    """One model's two hooks; copied and pickled with the model."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises `CannotOptimize` in a replica."""
        if getattr(module, "_is_replica", False):
            raise CannotOptimize(
                "a replica of torch.nn.DataParallel would run the first device's model",
                hint="use DistributedDataParallel (accelerate launch, torchrun), or make one device visible",
            )

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Raises `CannotOptimize` where a training call with labels came back without the routed forward's part."""
        if self.handle.reached() or not module.training or not torch.is_grad_enabled() or kwargs.get("labels") is None:
            return
        code = getattr(module.forward, "__code__", None)
        self.handle.refuse(
            CannotOptimize(
                "the forward of the optimized model was patched by one that computes training steps without it",
                source=f"{code.co_filename}:{code.co_firstlineno}: {code.co_name}" if code else None,
                hint="let the trainer use the model's own loss (TRL: derive from cggr.ModelLossMixin and its trainer)",
            )
        )


def watch(handle: Handle) -> tuple[RemovableHandle, RemovableHandle]:
    """Installs both hooks on the handle's model; returns what removes them."""
    guard = Guard(handle)
    return (
        handle.model.register_forward_pre_hook(guard.before, with_kwargs=True),
        handle.model.register_forward_hook(guard.after, with_kwargs=True),
    )
