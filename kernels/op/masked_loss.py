"""`cggr::masked_loss` and its backward: head and cross-entropy over some rows, without logits in the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from cggr_compile.kernels.op.checks import (
    HEAD_OPERANDS,
    HEAD_OPTIONS,
    check_dtype,
    check_head,
    check_shape,
    register_autocast,
)
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor

_LOSS_OPTIONS = f'{HEAD_OPTIONS}, str reduction="mean", Tensor? rows=None, Tensor? num_items=None'


def check_masked_loss(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | None = None,
    num_items: Tensor | None = None,
) -> None:
    """Raises ValueError or TypeError, naming the argument, for what `reference.masked_loss` does not define."""
    check_head(op, hidden, weight, bias, target)
    if rows is not None:
        check_shape(op, "rows", rows, (rows.numel(),), "[M]")
        check_dtype(op, "rows", rows, (torch.int64, torch.int32))
    if row_weight is not None:
        counted, name = (hidden, "[N]") if rows is None else (rows, "[M] as rows")
        check_shape(op, "row_weight", row_weight, (counted.shape[0],), name)
        torch._check_type(
            row_weight.is_floating_point(),
            lambda: f"cggr::{op}: row_weight is {row_weight.dtype}, expected a floating dtype",
        )
    torch._check_value(
        reduction in reference.REDUCTIONS,
        lambda: f"cggr::{op}: reduction is {reduction!r}, expected one of {list(reference.REDUCTIONS)}",
    )
    torch._check_value(
        (reduction == "num_items") == (num_items is not None),
        lambda: (
            f"cggr::{op}: num_items is {num_items} with reduction {reduction!r}; 'num_items', and no other, needs it"
        ),
    )
    if num_items is not None:
        check_shape(op, "num_items", num_items, (), "()")


@torch.library.custom_op(
    "cggr::masked_loss",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight=None, "
        f"{_LOSS_OPTIONS}) -> Tensor"
    ),
)
def masked_loss(*args: Any, **options: Any) -> Tensor:
    """`reference.masked_loss`: 0-d float32, differentiable in hidden, weight, bias and row_weight."""
    check_masked_loss("masked_loss", *args, **options)
    return reference.masked_loss(*args, **options)


@masked_loss.register_fake
def _masked_loss_fake(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
    check_masked_loss("masked_loss", hidden, *args, **options)
    return hidden.new_empty((), dtype=torch.float32)


@contextlib.contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Lets an operator's body use autograd, whose keys the dispatcher excludes below the autograd kernel."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


@torch.library.custom_op(
    "cggr::masked_loss_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight, "
        f"bool[4] wanted, {_LOSS_OPTIONS}) -> Tensor[]"
    ),
)
def masked_loss_backward(grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """`reference.masked_loss_backward`: the gradients of the wanted of (hidden, weight, bias, row_weight), in order."""
    operands, _, given = args[:5], args[5], args[6:]
    check_masked_loss("masked_loss_backward", *operands, *given, **options)
    with _autograd_inside_operator():
        return reference.masked_loss_backward(grad, *args, **options)


@masked_loss_backward.register_fake
def _masked_loss_backward_fake(grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    (hidden, weight, bias, target, row_weight), wanted, given = args[:5], args[5], args[6:]
    check_masked_loss("masked_loss_backward", hidden, weight, bias, target, row_weight, *given, **options)
    inputs = (hidden, weight, bias, row_weight)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


# hidden, weight, bias, target, row_weight, then five numbers and strings, rows, num_items.
_OPERANDS, _ROWS, _NUM_ITEMS = 5, 10, 11


_DIFFERENTIABLE = (0, 1, 2, 4)


def _masked_loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_OPERANDS], inputs[_ROWS], inputs[_NUM_ITEMS])
    ctx.options = inputs[_OPERANDS:_ROWS]


def _masked_loss_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *operands, rows, num_items = ctx.saved_tensors
    # The dispatcher drops trailing arguments equal to their defaults: row_weight has no place when it is None.
    given = len(ctx.needs_input_grad)
    wanted = [place < given and ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
    gradients: list[Tensor | None] = [None] * given
    found = torch.ops.cggr.masked_loss_backward(grad, *operands, wanted, *ctx.options, rows, num_items)
    sought = (place for place, want in zip(_DIFFERENTIABLE, wanted, strict=True) if want)
    for place, gradient in zip(sought, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


masked_loss.register_autograd(_masked_loss_autograd, setup_context=_masked_loss_context)


register_autocast(masked_loss._opoverload, HEAD_OPERANDS)


register_autocast(masked_loss_backward._opoverload, 0)
