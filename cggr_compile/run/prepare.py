"""Compiles, in the first step of a capture, what the schedule will run later, and records as much of it as fits: the
loop does not wait for it.

Training does not notice: gradients are computed and dropped, torch's generators are restored, and autocast's weight
cache is neither read nor filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.run.cuda_graphs import RECORDED_AT
from cggr_compile.run.variant import Variant
from cggr_compile.torch_internals.autograd import beside_saved_tensor_hooks


def run_aside(run: Variant, inputs: Sequence[Any], loss: int, device: torch.device) -> None:
    """Forward and backward with the inputs of a step, as often as compiling and recording for their sizes take; `loss`
    is the output's number. Nothing else is left of it.

    What has a gradient is stood in for by others in the same memory, on which nobody has registered hooks.
    """
    stand_ins = [_stand_in(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    trained = [x for x in stand_ins if isinstance(x, Tensor) and x.requires_grad]
    with beside_saved_tensor_hooks(), undisturbed(device, inputs):
        for _ in range(1 if run.replays is None else RECORDED_AT):
            found = run(*stand_ins)[loss]
            if found.requires_grad:
                # Not by `autograd.grad`: autograd's thread holds what that returns until it goes on, and the next run
                # would take the memory for held (`graph_memory`).
                found.backward(inputs=trained)
            for x in trained:
                x.grad = None


def _stand_in(x: Tensor) -> Tensor:
    return nn.Parameter(x.detach()) if isinstance(x, nn.Parameter) else x.detach().requires_grad_()


@contextmanager
def undisturbed(device: torch.device, inputs: Sequence[Any]) -> Iterator[None]:
    """Restores torch's generators afterwards and keeps autocast's weight cache out of it.

    A cast of a weight made here would otherwise be found by the step, with a graph that is freed already.
    """
    used = {tensor.device for tensor in inputs if isinstance(tensor, Tensor) and tensor.device.type == device.type}
    others = {} if device.type == "cpu" else {"device_type": device.type}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(used) if others else [], **others))
        if torch.amp.is_autocast_available(device.type):
            dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
            stack.enter_context(torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False))
        yield
