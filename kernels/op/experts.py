"""`cggr::grouped_mlp` and its backward: the experts of a mixture on the tokens that chose them.

Registered as the others are (`ops`), but for autocast, which grouped products of torch do not follow either: the
operator runs in the dtype of its operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape
from cggr_compile.kernels.op.define import (
    autograd_inside_operator,
    by_fields,
    gradients_of,
    operator,
    save,
    saved,
    wanted_of,
)
from cggr_compile.kernels.reference import experts as reference
from cggr_compile.kernels.reference.experts import ACTIVATIONS, DIFFERENTIABLE, ExpertArguments
from torch import Tensor


def check_grouped_mlp(arguments: ExpertArguments) -> None:
    """Raises ValueError or TypeError, naming the argument, for what `reference.grouped_mlp` does not define."""
    op, (hidden, gate_up, down) = "grouped_mlp", arguments[:3]
    for argument, tensor, rank, names in (
        ("hidden", hidden, 2, "[T, D]"),
        ("gate_up", gate_up, 3, "[E, 2F, D]"),
        ("down", down, 3, "[E, D, F]"),
        ("experts", arguments.experts, 2, "[T, K]"),
    ):
        torch._check_value(
            tensor.dim() == rank,
            lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names}",  # noqa: B023
        )
    torch._check_type(
        hidden.is_floating_point(), lambda: f"cggr::{op}: hidden is {hidden.dtype}, expected a floating dtype"
    )
    torch._check_value(
        arguments.activation in ACTIVATIONS,
        lambda: f"cggr::{op}: activation is {arguments.activation!r}, expected one of {list(ACTIVATIONS)}",
    )
    torch._check_value(
        arguments.limit > 0, lambda: f"cggr::{op}: limit is {arguments.limit}, expected a positive number"
    )
    count, width = down.shape[0], down.shape[2]
    rows, of_rows = (width, "F") if arguments.activation == "silu" else (2 * width, "2F")
    check_shape(op, "gate_up", gate_up, (count, rows, hidden.shape[1]), f"[E, {of_rows}, D]")
    check_shape(op, "down", down, (count, hidden.shape[1], width), "[E, D, F]")
    check_shape(op, "experts", arguments.experts, (hidden.shape[0], arguments.experts.shape[1]), "[T, K]")
    check_dtype(op, "experts", arguments.experts, (torch.int64,))
    check_shape(op, "weights", arguments.weights, tuple(arguments.experts.shape), "[T, K]")
    torch._check_type(
        arguments.weights.is_floating_point(),
        lambda: f"cggr::{op}: weights is {arguments.weights.dtype}, expected a floating dtype",
    )
    for argument, bias, size, names in (
        ("gate_up_bias", arguments.gate_up_bias, rows, f"[E, {of_rows}]"),
        ("down_bias", arguments.down_bias, hidden.shape[1], "[E, D]"),
    ):
        if bias is not None:
            check_shape(op, argument, bias, (count, size), names)
            check_dtype(op, argument, bias, (hidden.dtype,))
    for argument, tensor in (("gate_up", gate_up), ("down", down)):
        check_dtype(op, argument, tensor, (hidden.dtype,))
    if arguments.keep is not None:
        check_shape(op, "keep", arguments.keep, (hidden.shape[0],), "[T]")
        check_dtype(op, "keep", arguments.keep, (torch.bool,))


@operator("cggr::grouped_mlp")
def grouped_mlp(arguments: ExpertArguments) -> Tensor:
    """`reference.grouped_mlp`, differentiable in DIFFERENTIABLE, once."""
    check_grouped_mlp(arguments)
    return reference.grouped_mlp(*arguments)


@grouped_mlp.register_fake
@by_fields
def _grouped_mlp_fake(arguments: ExpertArguments) -> Tensor:
    check_grouped_mlp(arguments)
    return arguments.hidden.new_empty(arguments.hidden.shape)


@operator("cggr::grouped_mlp_backward")
def grouped_mlp_backward(grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments) -> list[Tensor]:
    """`reference.grouped_mlp_backward`."""
    check_grouped_mlp(arguments)
    with autograd_inside_operator():
        return reference.grouped_mlp_backward(grad, wanted, arguments)


@grouped_mlp_backward.register_fake
@by_fields
def _grouped_mlp_backward_fake(grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments) -> list[Tensor]:
    check_grouped_mlp(arguments)
    inputs = (getattr(arguments, name) for name in DIFFERENTIABLE)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, ExpertArguments(*inputs))


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments, _outputs = saved(ctx, ExpertArguments)
    wanted = wanted_of(ctx, ExpertArguments._fields, DIFFERENTIABLE)
    found = torch.ops.cggr.grouped_mlp_backward(grad, wanted, *arguments)
    return tuple(gradients_of(ctx, ExpertArguments._fields, DIFFERENTIABLE, found))


grouped_mlp.register_autograd(_autograd, setup_context=_context)
