"""The operators of the router's cheap heads: `cggr::sample_columns`, `sampled_score`, `fp8_score`.

The last two are defined as `cggr::score` is; the semantics are those of `router_heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cggr_compile.kernels.op.checks import INTEGERS, check_dtype, check_shape, no_gradient, no_gradient_backward
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.op.score import define_statistics
from cggr_compile.kernels.reference import router_heads
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def _check_sample_columns(
    target: Tensor, noise: Tensor, classes: int, frequent: int, sampled: int, ignore_index: int = -100
) -> None:
    check_shape("sample_columns", "target", target, (target.numel(),), "[N]")
    check_dtype("sample_columns", "target", target, INTEGERS)
    check_shape("sample_columns", "noise", noise, (1,), "[1]")
    check_dtype("sample_columns", "noise", noise, (torch.float32,))
    torch._check_value(frequent >= 0, lambda: f"cggr::sample_columns: frequent is {frequent}, expected at least 0")
    torch._check_value(sampled >= 1, lambda: f"cggr::sample_columns: sampled is {sampled}, expected at least 1")


@operator("cggr::sample_columns", like=router_heads.sample_columns)
def sample_columns(*args: Any) -> tuple[Tensor, Tensor]:
    """`router_heads.sample_columns`: columns int64 [C] and weights float32 [C], neither differentiable."""
    _check_sample_columns(*args)
    return router_heads.sample_columns(*args)


@sample_columns.register_fake
def _sample_columns_fake(
    target: Tensor, noise: Tensor, classes: int, frequent: int, sampled: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    _check_sample_columns(target, noise, classes, frequent, sampled, ignore_index)
    read = min(frequent + sampled, classes)
    return noise.new_empty(read, dtype=torch.int64), noise.new_empty(read)


sample_columns.register_autograd(no_gradient_backward, setup_context=no_gradient)


def _check_columns(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, columns: Tensor, column_weight: Tensor, *_: Any
) -> None:
    check_shape("sampled_score", "columns", columns, (columns.numel(),), "[C]")
    check_dtype("sampled_score", "columns", columns, (torch.int64, torch.int32))
    check_shape("sampled_score", "column_weight", column_weight, columns.shape, "[C] as columns")
    check_dtype("sampled_score", "column_weight", column_weight, (torch.float32,))


def define_sampled_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `sampled_score` of a namespace: `router_heads.sampled_score` as computed by `implementation`."""
    name, known = f"{namespace}::sampled_score", router_heads.SAMPLED_QUANTITIES
    return define_statistics(name, implementation, router_heads.sampled_score, known, _check_columns)


def define_fp8_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `fp8_score` of a namespace: `router_heads.fp8_score` as computed by `implementation`."""
    return define_statistics(f"{namespace}::fp8_score", implementation, router_heads.fp8_score, reference.QUANTITIES)


sampled_score = define_sampled_score("cggr", router_heads.sampled_score)
fp8_score = define_fp8_score("cggr", router_heads.fp8_score)
