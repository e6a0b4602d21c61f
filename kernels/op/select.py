"""`cggr::select`: the rows that a rule takes by their scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape, no_gradient, no_gradient_backward
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def _check_select(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None) -> None:
    torch._check_value(scores.dim() >= 1, lambda: "cggr::select: scores has shape (), expected [..., N]")
    check_dtype("select", "scores", scores, (torch.float32,))
    check_shape("select", "valid", valid, scores.shape, "[..., N] as scores")
    check_dtype("select", "valid", valid, (torch.bool,))
    torch._check_value(k >= 1, lambda: f"cggr::select: k is {k}, expected at least 1")
    torch._check_value(
        rule in reference.RANKINGS,
        lambda: f"cggr::select: rule is {rule!r}, expected one of {list(reference.RANKINGS)}",
    )
    if noise is not None:
        check_shape("select", "noise", noise, scores.shape, "[..., N] as scores")
        check_dtype("select", "noise", noise, (torch.float32,))


def define_select(namespace: str, implementation: Callable[..., tuple[Tensor, Tensor]]) -> CustomOpDef:
    """The operator `select` of a namespace: `reference.select` as computed by `implementation`.

    index int64 [..., k] and weight float32 [..., k], neither differentiable.
    """

    @operator(f"{namespace}::select")
    def op(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_select(scores, valid, k, rule, noise)
        return implementation(scores, valid, k, rule, noise)

    @op.register_fake
    def fake(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_select(scores, valid, k, rule, noise)
        shape = (*scores.shape[:-1], k)
        return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)

    op.register_autograd(no_gradient_backward, setup_context=no_gradient)
    return op


select = define_select("cggr", reference.select)
