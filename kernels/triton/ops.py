"""The Triton implementations as operators of the namespace `cggr_triton`, opaque to tracing like those of `cggr`.

Importing this module needs Triton; `providers` imports it when a Triton provider is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cggr_compile.kernels.op import experts as expert_ops
from cggr_compile.kernels.op import gather as gather_op
from cggr_compile.kernels.op import masked_loss as masked_loss_op
from cggr_compile.kernels.op import router_heads as router_head_ops
from cggr_compile.kernels.op import score as score_op
from cggr_compile.kernels.op import select as select_op
from cggr_compile.kernels.op.checks import HEAD_OPERANDS, register_autocast
from cggr_compile.kernels.op.define import by_fields, gradients_of, operator, save, saved, wanted_of
from cggr_compile.kernels.reference.experts import DIFFERENTIABLE, ExpertArguments
from cggr_compile.kernels.reference.rows import LossArguments
from cggr_compile.kernels.triton import blocks
from cggr_compile.kernels.triton import experts as expert_kernels
from cggr_compile.kernels.triton import gather as gather_kernels
from cggr_compile.kernels.triton import loss as loss_kernels
from cggr_compile.kernels.triton import score as score_kernels
from cggr_compile.kernels.triton import select as select_kernels
from cggr_compile.kernels.triton.loss import default_algorithm, why_not_one_pass
from torch import Tensor

score = score_op.define_score("cggr_triton", score_kernels.score)
select = select_op.define_select("cggr_triton", select_kernels.select)
gather = gather_op.define_gather("cggr_triton", gather_kernels.gather, gather_kernels.gather_backward)

sampled_score = router_head_ops.define_sampled_score("cggr_triton", score_kernels.sampled_score)
fp8_score = router_head_ops.define_fp8_score("cggr_triton", score_kernels.fp8_score)


@operator("cggr_triton::masked_loss")
def masked_loss_forward(
    loss: LossArguments, wanted: Sequence[bool], algorithm: str, summed: bool, measured: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`loss.forward`: the loss, what its backward needs, the gradients of an algorithm that has them by then, and,
    `measured`, the figures."""
    masked_loss_op.check_masked_loss("masked_loss", loss)
    return tuple(loss_kernels.forward(loss, wanted, algorithm, summed, measured))


@masked_loss_forward.register_fake
@by_fields
def _masked_loss_fake(
    loss: LossArguments, wanted: Sequence[bool], algorithm: str, summed: bool, measured: bool
) -> tuple[Tensor, ...]:
    masked_loss_op.check_masked_loss("masked_loss", loss)
    hidden, weight = loss.hidden, loss.weight
    with_gradients = algorithm in loss_kernels.ONE_PASS_BYTES and any(wanted)
    size = (loss.target if loss.rows is None else loss.rows).shape[0]

    def single(*shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    of_hidden, of_weight, of_bias = (hidden.new_empty(0) for _ in range(3))
    if with_gradients and size > 0:
        of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else of_hidden
        summed = (
            summed or loss_kernels.one_pass_rows(algorithm, size, weight.shape[0], hidden.dtype, hidden.device) < size
        )
        dtype = torch.float32 if summed else weight.dtype
        of_weight = weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else of_weight
        of_bias = single(weight.shape[0]) if wanted[2] else of_bias
    gradients = of_hidden, of_weight, of_bias
    kept = 0 if with_gradients else size
    figures = single(3 if measured else 0)
    return single(), single(size), single(), single(kept), single(kept), *gradients, figures


@operator("cggr_triton::masked_loss_backward")
def masked_loss_backward(
    grad: Tensor, loss: LossArguments, total_weight: Tensor, log_total: Tensor, missed: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss.backward`."""
    return loss_kernels.backward(grad, loss, total_weight, log_total, missed, wanted)


@masked_loss_backward.register_fake
@by_fields
def _masked_loss_backward_fake(
    grad: Tensor, loss: LossArguments, total_weight: Tensor, log_total: Tensor, missed: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape) if want and x is not None else loss.hidden.new_empty(0)
        for x, want in zip((loss.hidden, loss.weight, loss.bias), wanted, strict=True)
    )


@operator("cggr_triton::scaled")
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`blocks.scaled`."""
    return blocks.scaled(x, factor, dtype)


@scaled.register_fake
def _scaled_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise autograd makes zeros of the size of the gradients that came with the loss.
    ctx.set_materialize_grads(False)
    *arguments, ctx.wanted, ctx.algorithm, _, _ = inputs
    save(ctx, LossArguments(*arguments), *output[:-1])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(gradients)
    loss, (value, row_loss, divisor, log_total, missed, *in_one_pass) = saved(ctx, LossArguments)
    if ctx.algorithm in loss_kernels.ONE_PASS_BYTES:
        found = [
            torch.ops.cggr_triton.scaled(x, grad, loss.hidden.dtype) if want else None
            for x, want in zip(in_one_pass, ctx.wanted, strict=True)
        ]
    else:
        found = torch.ops.cggr_triton.masked_loss_backward(grad, *loss, divisor, log_total, missed, ctx.wanted)
    for name, gradient, want in zip(("hidden", "weight", "bias"), found, ctx.wanted, strict=True):
        gradients[masked_loss_op.place(name)] = gradient if want else None
    at = masked_loss_op.place("row_weight")
    if ctx.needs_input_grad[at] and loss.row_weight is not None:
        # d (Σ w·l / Σ w) / d w = (l - loss) / Σ w, of counted rows; a sum over constants has no second term.
        target = loss.target if loss.rows is None else loss.target.index_select(0, loss.rows)
        mean = value if loss.reduction == "mean" else 0.0
        of_row = torch.where(target != loss.ignore_index, (row_loss - mean) / divisor, 0.0)
        gradients[at] = (grad * of_row).to(loss.row_weight.dtype)
    return tuple(gradients)


masked_loss_forward.register_autograd(_autograd, setup_context=_context)
register_autocast(masked_loss_forward._opoverload, HEAD_OPERANDS)
register_autocast(masked_loss_backward._opoverload, 0)


def masked_loss(*args: Any, algorithm: str | None = None, **options: Any) -> Tensor:
    """`reference.masked_loss`, except that logits stay in fp32 and that a label outside [0, V) makes the loss NaN.

    `algorithm` is `"one_pass"`, `"one_pass_small"` or `"recompute"` (see `loss`); None takes `one_pass` where it
    applies. Raises ValueError for the first two where they do not.
    """
    return _masked_loss(LossArguments(*args, **options), algorithm, False)[0]


def measured_loss(*args: Any, algorithm: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.measured_loss`, with the exceptions and the algorithms of `masked_loss`."""
    *arguments, wanted = args
    loss, of_rows, *_, figures = _masked_loss(LossArguments(*arguments), algorithm, wanted)
    return loss, of_rows, figures


def _masked_loss(loss: LossArguments, algorithm: str | None, measured: bool) -> tuple[Tensor, ...]:
    device_type, dtype = loss.hidden.device.type, loss.hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    obstacle = why_not_one_pass(dtype)
    if algorithm in loss_kernels.ONE_PASS_BYTES and obstacle:
        raise ValueError(f"masked_loss: algorithm {algorithm!r} does not apply: {obstacle}; use 'recompute'")
    algorithm = algorithm or default_algorithm(dtype)
    operands = (loss.hidden, loss.weight, loss.bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands]
    if algorithm in loss_kernels.ONE_PASS_BYTES and not any(wanted):
        algorithm = "recompute"
    size = (loss.target if loss.rows is None else loss.rows).shape[0]
    summed = not isinstance(size, int)  # code for sizes that are not known serves any number of blocks
    return torch.ops.cggr_triton.masked_loss(*loss, wanted, algorithm, summed, measured)


def masked_loss_one_pass(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"one_pass"`."""
    return masked_loss(*args, **{**options, "algorithm": "one_pass"})


def masked_loss_one_pass_small(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"one_pass_small"`."""
    return masked_loss(*args, **{**options, "algorithm": "one_pass_small"})


def masked_loss_recompute(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"recompute"`."""
    return masked_loss(*args, **{**options, "algorithm": "recompute"})


def measured_loss_one_pass(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`measured_loss` with the algorithm `"one_pass"`."""
    return measured_loss(*args, algorithm="one_pass")


def measured_loss_one_pass_small(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`measured_loss` with the algorithm `"one_pass_small"`."""
    return measured_loss(*args, algorithm="one_pass_small")


def measured_loss_recompute(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`measured_loss` with the algorithm `"recompute"`."""
    return measured_loss(*args, algorithm="recompute")


@operator("cggr_triton::grouped_mlp")
def grouped_mlp_forward(arguments: ExpertArguments, saving: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`experts.forward`."""
    expert_ops.check_grouped_mlp(arguments)
    return expert_kernels.forward(arguments, saving)


@grouped_mlp_forward.register_fake
@by_fields
def _grouped_mlp_fake(arguments: ExpertArguments, saving: bool) -> tuple[Tensor, ...]:
    expert_ops.check_grouped_mlp(arguments)
    hidden, gate_up, pairs = arguments.hidden, arguments.gate_up, arguments.experts.numel()
    per_line = 16 // hidden.element_size()
    products = hidden.new_empty(0, 0)
    if saving and hidden.shape[1] > 0:
        products = hidden.new_empty(pairs, (gate_up.shape[1] + per_line - 1) // per_line * per_line)
    place, bound = arguments.experts.new_empty(pairs), arguments.experts.new_empty(gate_up.shape[0] + 1)
    return hidden.new_empty(hidden.shape), products, place, bound.to(torch.int32)


@operator("cggr_triton::grouped_mlp_backward")
def grouped_mlp_backward(
    grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments, products: Tensor, place: Tensor, bound: Tensor
) -> list[Tensor]:
    """`experts.backward`."""
    return expert_kernels.backward(grad, wanted, arguments, products, expert_kernels.Order(place, bound))


@grouped_mlp_backward.register_fake
@by_fields
def _grouped_mlp_backward_fake(
    grad: Tensor, wanted: Sequence[bool], arguments: ExpertArguments, products: Tensor, place: Tensor, bound: Tensor
) -> list[Tensor]:
    inputs = (getattr(arguments, name) for name in DIFFERENTIABLE)
    return [torch.empty_like(x) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


def _grouped_mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, ExpertArguments(*inputs[:-1]), *output[1:])


def _grouped_mlp_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    arguments, outputs = saved(ctx, ExpertArguments)
    wanted = wanted_of(ctx, ExpertArguments._fields, DIFFERENTIABLE)
    found = torch.ops.cggr_triton.grouped_mlp_backward(grad, wanted, *arguments, *outputs)
    return tuple(gradients_of(ctx, ExpertArguments._fields, DIFFERENTIABLE, found))


grouped_mlp_forward.register_autograd(_grouped_mlp_autograd, setup_context=_grouped_mlp_context)


def grouped_mlp(*args: Any) -> Tensor:
    """`reference.grouped_mlp`, products rounded where they are stored alone."""
    arguments = ExpertArguments(*args)
    leaves = (getattr(arguments, name) for name in DIFFERENTIABLE)
    saving = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    return torch.ops.cggr_triton.grouped_mlp(*arguments, saving)[0]


def scratch_bytes(target: Any, args: Sequence[Any]) -> int:
    """Bytes that an operator of this namespace holds at most beside its arguments and its results, statistics of rows
    left out; `args` are tensors of the sizes in question, and all else that it is called with."""
    size = len(LossArguments._fields)
    if target is masked_loss_forward._opoverload:
        return loss_kernels.forward_scratch(LossArguments(*args[:size]), *args[size : size + 2])
    if target is masked_loss_backward._opoverload:
        return loss_kernels.backward_scratch(LossArguments(*args[1 : size + 1]))
    if target in (score._opoverload, sampled_score._opoverload):
        return args[0].nbytes  # its rows, counted ones first
    if target is fp8_score._opoverload:
        return args[0].nbytes + args[0].numel() + args[1].numel()
    return 0
