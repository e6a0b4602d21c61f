"""`cggr::score`: what the head says of each row, without logits in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cggr_compile.kernels.op.checks import (
    HEAD_OPERANDS,
    check_head,
    no_gradient,
    no_gradient_backward,
    register_autocast,
)
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def _check_score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, quantities: Sequence[str], *options: Any
) -> None:
    check_head("score", hidden, weight, bias, target)
    torch._check_value(
        bool(quantities) and all(name in reference.QUANTITIES for name in quantities),
        lambda: (
            f"cggr::score: quantities is {list(quantities)}, expected a non-empty list of {list(reference.QUANTITIES)}"
        ),
    )


def define_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `score` of a namespace: `reference.score` as computed by `implementation`.

    float32 [len(quantities), N], not differentiable; ValueError or TypeError by argument.
    """

    @operator(f"{namespace}::score", like=reference.score)
    def op(*args: Any, **options: Any) -> Tensor:
        _check_score(*args)
        return implementation(*args, **options)

    @op.register_fake
    def fake(*args: Any, **options: Any) -> Tensor:
        _check_score(*args)
        hidden, quantities = args[0], args[4]
        return hidden.new_empty((len(quantities), hidden.shape[0]), dtype=torch.float32)

    op.register_autograd(no_gradient_backward, setup_context=no_gradient)
    register_autocast(op._opoverload, HEAD_OPERANDS)
    return op


score = define_score("cggr", reference.score)
