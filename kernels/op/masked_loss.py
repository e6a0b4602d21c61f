"""`cggr::masked_loss` and its backward: head and cross-entropy over some rows, without logits in the graph; and
`cggr::measured_loss`, which also says what each row adds and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cggr_compile.kernels.op.checks import HEAD_OPERANDS, check_dtype, check_head, check_shape, register_autocast
from cggr_compile.kernels.op.define import (
    autograd_inside_operator,
    by_fields,
    gradients_of,
    operator,
    save,
    saved,
    wanted_of,
)
from cggr_compile.kernels.reference import rows as reference
from cggr_compile.kernels.reference.rows import DIFFERENTIABLE, LossArguments
from torch import Tensor


def check_masked_loss(op: str, loss: LossArguments) -> None:
    """Raises ValueError or TypeError, naming the argument, for what `reference.masked_loss` does not define."""
    rows, row_weight, reduction, num_items = loss.rows, loss.row_weight, loss.reduction, loss.num_items
    check_head(op, loss.hidden, loss.weight, loss.bias, loss.target)
    if rows is not None:
        check_shape(op, "rows", rows, (rows.numel(),), "[M]")
        check_dtype(op, "rows", rows, (torch.int64, torch.int32))
    if row_weight is not None:
        counted, name = (loss.hidden, "[N]") if rows is None else (rows, "[M] as rows")
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


@operator("cggr::masked_loss")
def masked_loss(loss: LossArguments) -> Tensor:
    """`reference.masked_loss`: 0-d float32, differentiable in hidden, weight, bias and row_weight."""
    check_masked_loss("masked_loss", loss)
    return reference.masked_loss(*loss)


@masked_loss.register_fake
@by_fields
def _masked_loss_fake(loss: LossArguments) -> Tensor:
    check_masked_loss("masked_loss", loss)
    return loss.hidden.new_empty((), dtype=torch.float32)


@operator("cggr::measured_loss")
def measured_loss(loss: LossArguments, figures: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.measured_loss`: the loss, differentiable as `masked_loss`, and float32 [M] and [3], which are not."""
    check_masked_loss("measured_loss", loss)
    return reference.measured_loss(*loss, figures)


@measured_loss.register_fake
@by_fields
def _measured_loss_fake(loss: LossArguments, figures: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_masked_loss("measured_loss", loss)
    size = (loss.target if loss.rows is None else loss.rows).shape[0]
    shapes = (), (size,), (3 if figures else 0,)
    scalar, of_rows, found = (loss.hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return scalar, of_rows, found


@operator("cggr::masked_loss_backward")
def masked_loss_backward(grad: Tensor, wanted: Sequence[bool], loss: LossArguments) -> list[Tensor]:
    """`reference.masked_loss_backward`: the gradients of the wanted of DIFFERENTIABLE, in order."""
    check_masked_loss("masked_loss_backward", loss)
    with autograd_inside_operator():
        return reference.masked_loss_backward(grad, wanted, loss)


@masked_loss_backward.register_fake
@by_fields
def _masked_loss_backward_fake(grad: Tensor, wanted: Sequence[bool], loss: LossArguments) -> list[Tensor]:
    check_masked_loss("masked_loss_backward", loss)
    inputs = (getattr(loss, name) for name in DIFFERENTIABLE)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


def place(name: str) -> int:
    """Where an argument stands."""
    return LossArguments._fields.index(name)


def _masked_loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
    save(ctx, LossArguments(*inputs[: len(LossArguments._fields)]))


def _masked_loss_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    loss, _outputs = saved(ctx, LossArguments)
    wanted = wanted_of(ctx, LossArguments._fields, DIFFERENTIABLE)
    found = torch.ops.cggr.masked_loss_backward(grad, wanted, *loss)
    return tuple(gradients_of(ctx, LossArguments._fields, DIFFERENTIABLE, found))


for _op in (masked_loss, measured_loss):
    _op.register_autograd(_masked_loss_autograd, setup_context=_masked_loss_context)
    register_autocast(_op._opoverload, HEAD_OPERANDS)


register_autocast(masked_loss_backward._opoverload, 0)
