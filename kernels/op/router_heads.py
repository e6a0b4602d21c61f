"""The operators of the router's cheap heads: `cggr::sample_columns`, `sampled_score`, `fp8_score`.

Registered as `cggr::score` is (`ops`): schema, checks that name the argument, fake, no gradient, and autocast as part
of the dispatch; the semantics are those of `router_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cggr_compile.kernels.op.checks import (
    HEAD_OPERANDS,
    INTEGERS,
    check_dtype,
    check_head,
    check_shape,
    no_gradient,
    no_gradient_backward,
    register_autocast,
)
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import router_heads
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def _check_quantities(op: str, quantities: Sequence[str], known: Sequence[str]) -> None:
    torch._check_value(
        bool(quantities) and all(name in known for name in quantities),
        lambda: f"cggr::{op}: quantities is {list(quantities)}, expected a non-empty list of {list(known)}",
    )


def _new_statistics(hidden: Tensor, quantities: Sequence[str]) -> Tensor:
    return hidden.new_empty((len(quantities), hidden.shape[0]), dtype=torch.float32)


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
def sample_columns(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`router_heads.sample_columns`: columns int64 [C] and weights float32 [C], neither differentiable."""
    _check_sample_columns(*args, **options)
    return router_heads.sample_columns(*args, **options)


@sample_columns.register_fake
def _sample_columns_fake(
    target: Tensor, noise: Tensor, classes: int, frequent: int, sampled: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    _check_sample_columns(target, noise, classes, frequent, sampled, ignore_index)
    read = min(frequent + sampled, classes)
    return noise.new_empty(read, dtype=torch.int64), noise.new_empty(read)


def _check_sampled_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    columns: Tensor,
    column_weight: Tensor,
    quantities: Sequence[str],
    *_: float,
    **__: float,
) -> None:
    check_head("sampled_score", hidden, weight, bias, target)
    check_shape("sampled_score", "columns", columns, (columns.numel(),), "[C]")
    check_dtype("sampled_score", "columns", columns, (torch.int64, torch.int32))
    check_shape("sampled_score", "column_weight", column_weight, columns.shape, "[C] as columns")
    check_dtype("sampled_score", "column_weight", column_weight, (torch.float32,))
    _check_quantities("sampled_score", quantities, router_heads.SAMPLED_QUANTITIES)


def define_sampled_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `sampled_score` of a namespace: `router_heads.sampled_score` as computed by `implementation`.

    float32 [Q, N], not differentiable; ValueError or TypeError by argument.
    """

    @operator(f"{namespace}::sampled_score", like=router_heads.sampled_score)
    def op(*args: Any, **options: Any) -> Tensor:
        _check_sampled_score(*args, **options)
        return implementation(*args, **options)

    @op.register_fake
    def fake(*args: Any, **options: Any) -> Tensor:
        _check_sampled_score(*args, **options)
        return _new_statistics(args[0], args[6])

    return _without_gradient(op, HEAD_OPERANDS)


def _check_fp8_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    *_: float,
    **__: float,
) -> None:
    check_head("fp8_score", hidden, weight, bias, target)
    _check_quantities("fp8_score", quantities, list(reference.QUANTITIES))


def define_fp8_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `fp8_score` of a namespace: `router_heads.fp8_score` as computed by `implementation`.

    float32 [Q, N], not differentiable; ValueError or TypeError by argument.
    """

    @operator(f"{namespace}::fp8_score", like=router_heads.fp8_score)
    def op(*args: Any, **options: Any) -> Tensor:
        _check_fp8_score(*args, **options)
        return implementation(*args, **options)

    @op.register_fake
    def fake(*args: Any, **options: Any) -> Tensor:
        _check_fp8_score(*args, **options)
        return _new_statistics(args[0], args[4])

    return _without_gradient(op, HEAD_OPERANDS)


def _without_gradient(op: CustomOpDef, cast: int) -> CustomOpDef:
    op.register_autograd(no_gradient_backward, setup_context=no_gradient)
    if cast:
        register_autocast(op._opoverload, cast)
    return op


_without_gradient(sample_columns, 0)
sampled_score = define_sampled_score("cggr", router_heads.sampled_score)
fp8_score = define_fp8_score("cggr", router_heads.fp8_score)
