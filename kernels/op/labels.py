"""The operators `cggr::checked_target` and `cggr::checked_padding`: labels as they are, if the head has a class for
each, and if padding has none.

Eager's cross-entropy looks at every counted label. A routed step looks at those that it keeps, and its kernels at none
outside the vocabulary, so a wrong label would pass unnoticed in one step and not in the next. What is computed from
labels reads the result of this operator instead: dataflow, not a side effect, keeps the check in the graph and in
front of its readers.
"""

from __future__ import annotations

import torch
from cggr_compile.kernels.op.checks import INTEGERS, check_dtype, check_shape
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


@operator("cggr::checked_padding")
def checked_padding(labels: Tensor, attention_mask: Tensor, shift: int, ignore_index: int = -100) -> Tensor:
    """A copy of `labels` [B, S], of any integer dtype, where `attention_mask` [B, S] (integers or booleans, 0 at
    padding) has padding on the right alone, and no position of padding predicts a label: that `shift` places behind it
    is `ignore_index`.

    Otherwise it raises ValueError on the CPU; on CUDA an assertion fails on the device, and nothing is read back. Other
    devices do not check.
    """
    _check_padding(labels, attention_mask)
    real = attention_mask != 0
    right = real[:, :-1] | ~real[:, 1:]
    silent = real[:, : real.shape[1] - shift] | (labels[:, shift:] == ignore_index)
    instead = "not what padding='right' promises; leave it out, or pad behind the tokens with ignored labels"
    if labels.device.type == "cuda":
        what = "attention_mask: padding is in front of tokens or predicts a label"
        torch._assert_async(right.all() & silent.all(), f"{what}; {instead}")
    elif labels.device.type == "cpu":
        for problem, holds in (("is in front of tokens", right), ("predicts a label", silent)):
            if not holds.all():
                row, place = (~holds).nonzero()[0].tolist()
                raise ValueError(f"attention_mask: padding at place {place} of row {row} {problem}; {instead}")
    return labels.clone()


@checked_padding.register_fake
def _checked_padding_fake(labels: Tensor, attention_mask: Tensor, shift: int, ignore_index: int = -100) -> Tensor:
    _check_padding(labels, attention_mask)
    return torch.empty_like(labels)


def _check_padding(labels: Tensor, attention_mask: Tensor) -> None:
    check_dtype("checked_padding", "labels", labels, INTEGERS)
    torch._check_value(
        labels.dim() == 2, lambda: f"cggr::checked_padding: labels has shape {tuple(labels.shape)}, expected [B, S]"
    )
    check_shape("checked_padding", "attention_mask", attention_mask, labels.shape, "[B, S] as labels")
