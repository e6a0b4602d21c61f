"""The operator `cggr::checked_target`: labels as they are, if the head has a class for each.

Eager's cross-entropy looks at every counted label. A routed step looks at those that it keeps, and its kernels at none
outside the vocabulary, so a wrong label would pass unnoticed in one step and not in the next. What is computed from
labels reads the result of this operator instead: dataflow, not a side effect, keeps the check in the graph and in
front of its readers.
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.op.checks import INTEGERS, check_dtype
from cggr_compile.kernels.op.define import operator
from torch import Tensor


@operator("cggr::checked_target")
def checked_target(target: Tensor, classes: int, ignore_index: int = -100) -> Tensor:
    """A copy of `target` [N], of any integer dtype, each in [0, classes) or `ignore_index`.

    Where one is not, it raises as torch's cross-entropy does: IndexError on the CPU; on CUDA an assertion fails on the
    device, and nothing is read back. Other devices do not check, as torch does not there.
    """
    check_dtype("checked_target", "target", target, INTEGERS)
    label = target.long()
    inside = (label.clamp(0, classes - 1) == label) | (label == ignore_index)
    if target.device.type == "cuda":
        torch._assert_async(inside.all(), f"Target out of bounds: a label is neither in [0, {classes}) nor ignored")
    elif target.device.type == "cpu" and not inside.all():
        raise IndexError(f"Target {label[~inside][0].item()} is out of bounds.")
    return target.clone()


@checked_target.register_fake
def _checked_target_fake(target: Tensor, classes: int, ignore_index: int = -100) -> Tensor:
    check_dtype("checked_target", "target", target, INTEGERS)
    return torch.empty_like(target)
