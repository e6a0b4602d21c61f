"""`cggr::score`: what the head says of each row, without logits in the graph; and what operators like it share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
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


def define_statistics(
    name: str,
    implementation: Callable[..., Tensor],
    like: Callable[..., Tensor],
    known: Collection[str],
    check: Callable[..., None] = lambda *_: None,
) -> CustomOpDef:
    """The operator `name`, `like` a reference that gives `quantities` of the rows, as computed by `implementation`.

    float32 [len(quantities), N], not differentiable; ValueError or TypeError by argument, `check` saying what is asked
    of more than head, target and quantities.
    """
    short, place = name.partition("::")[2], list(inspect.signature(like).parameters).index("quantities")

    def check_all(*args: Any) -> None:
        check_head(short, *args[:4])
        check(*args)
        torch._check_value(
            bool(args[place]) and all(quantity in known for quantity in args[place]),
            lambda: f"cggr::{short}: quantities is {list(args[place])}, expected a non-empty list of {list(known)}",
        )

    @operator(name, like=like)
    def op(*args: Any) -> Tensor:
        check_all(*args)
        return implementation(*args)

    @op.register_fake
    def fake(*args: Any) -> Tensor:
        check_all(*args)
        hidden, quantities = args[0], args[place]
        return hidden.new_empty((len(quantities), hidden.shape[0]), dtype=torch.float32)

    op.register_autograd(no_gradient_backward, setup_context=no_gradient)
    register_autocast(op._opoverload, HEAD_OPERANDS)
    return op


def define_score(namespace: str, implementation: Callable[..., Tensor]) -> CustomOpDef:
    """The operator `score` of a namespace: `reference.score` as computed by `implementation`."""
    return define_statistics(f"{namespace}::score", implementation, reference.score, reference.QUANTITIES)


score = define_score("cggr", reference.score)
