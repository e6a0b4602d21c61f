"""The Triton implementations as operators of the namespace `cggr_triton`, opaque to tracing like those of `cggr`.

Importing this module needs Triton; `providers` imports it when a Triton provider is first asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from cggr_compile.kernels.op import gather as gather_op
from cggr_compile.kernels.op import masked_loss as masked_loss_op
from cggr_compile.kernels.op import router_heads as router_head_ops
from cggr_compile.kernels.op import score as score_op
from cggr_compile.kernels.op import select as select_op
from cggr_compile.kernels.op.checks import HEAD_OPERANDS, register_autocast
from cggr_compile.kernels.triton import blocks
from cggr_compile.kernels.triton import gather as gather_kernels
from cggr_compile.kernels.triton import loss as loss_kernels
from cggr_compile.kernels.triton import score as score_kernels
from cggr_compile.kernels.triton import select as select_kernels
from cggr_compile.kernels.triton.loss import Options, default_algorithm, why_not_one_pass
from torch import Tensor

score = score_op.define_score("cggr_triton", score_kernels.score)
select = select_op.define_select("cggr_triton", select_kernels.select)
gather = gather_op.define_gather("cggr_triton", gather_kernels.gather, gather_kernels.gather_backward)

sampled_score = router_head_ops.define_sampled_score("cggr_triton", score_kernels.sampled_score)
fp8_score = router_head_ops.define_fp8_score("cggr_triton", score_kernels.fp8_score)

_OPTIONS = "float scale, float divisor, float softcap, int ignore_index, str reduction"
_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight, Tensor? rows"


@torch.library.custom_op(
    "cggr_triton::masked_loss",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor? num_items, {_OPTIONS}, bool[3] wanted, str algorithm) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def masked_loss_forward(*args: Any) -> tuple[Tensor, ...]:
    """`loss.forward`: the loss, what its backward needs, and the gradients of an algorithm that has them by then."""
    tensors, options, wanted, algorithm = _checked(args)
    operands: list[Any] = [*tensors, options, wanted, algorithm]
    return tuple(loss_kernels.forward(*operands))


def _checked(args: tuple[Any, ...]) -> tuple[Any, Options, tuple[bool, bool, bool], str]:
    """The operator's arguments, checked: seven tensors, the options, which gradients are wanted, the algorithm."""
    tensors, numbers, (wanted, algorithm) = args[:7], args[7:12], args[12:]
    *operands, rows, num_items = tensors
    arguments: list[Any] = [*operands, *numbers, rows, num_items]
    masked_loss_op.check_masked_loss("masked_loss", *arguments)
    return tensors, Options(*numbers), tuple(wanted), algorithm


@masked_loss_forward.register_fake
def _masked_loss_fake(*args: Any) -> tuple[Tensor, ...]:
    (hidden, weight, _, target, _, rows, _), _, wanted, algorithm = _checked(args)
    with_gradients = algorithm in loss_kernels.ONE_PASS_BYTES and any(wanted)
    size = target.shape[0] if rows is None else rows.shape[0]

    def single(*shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    of_hidden, of_weight, of_bias = (hidden.new_empty(0) for _ in range(3))
    if with_gradients and size > 0:
        once = loss_kernels.one_pass_rows(algorithm, size, weight.shape[0], hidden.dtype, hidden.device) >= size
        of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else of_hidden
        of_weight = (
            weight.new_empty(weight.shape, dtype=weight.dtype if once else torch.float32) if wanted[1] else of_weight
        )
        of_bias = single(weight.shape[0]) if wanted[2] else of_bias
    gradients = of_hidden, of_weight, of_bias
    kept = 0 if with_gradients else size
    return single(), single(size), single(), single(kept), single(kept), *gradients


@torch.library.custom_op(
    "cggr_triton::masked_loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, {_TENSORS}, Tensor total_weight, Tensor log_total, Tensor missed, {_OPTIONS}, bool[3] wanted) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def masked_loss_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`loss.backward`."""
    operands: list[Any] = [grad, *args[:9], Options(*args[9:-1]), args[-1]]
    return loss_kernels.backward(*operands)


@masked_loss_backward.register_fake
def _masked_loss_backward_fake(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    wanted = args[-1]
    return tuple(
        x.new_empty(x.shape) if want and x is not None else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


@torch.library.custom_op(
    "cggr_triton::scaled", mutates_args=(), schema="(Tensor x, Tensor factor, ScalarType dtype) -> Tensor"
)
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
    tensors, ctx.numbers, (ctx.wanted, ctx.algorithm) = inputs[:7], inputs[7:12], inputs[12:]
    ctx.save_for_backward(*output, *tensors[:6])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    loss, row_loss, divisor, log_total, missed, *rest = ctx.saved_tensors
    gradients, tensors = rest[:3], rest[3:]
    hidden = tensors[0]
    if ctx.algorithm in loss_kernels.ONE_PASS_BYTES:
        found = [
            torch.ops.cggr_triton.scaled(x, grad, hidden.dtype) if want else None
            for x, want in zip(gradients, ctx.wanted, strict=True)
        ]
    else:
        found = torch.ops.cggr_triton.masked_loss_backward(
            grad, *tensors, divisor, log_total, missed, *ctx.numbers, ctx.wanted
        )
    of_operands = [x if want else None for x, want in zip(found, ctx.wanted, strict=True)]
    of_weights = None
    row_weight = tensors[4]
    if ctx.needs_input_grad[4] and row_weight is not None:
        options = Options(*ctx.numbers)
        # d (Σ w·l / Σ w) / d w = (l - loss) / Σ w, of counted rows; a sum over constants has no second term.
        counted = tensors[3] if tensors[5] is None else tensors[3].index_select(0, tensors[5])
        mean = loss if options.reduction == "mean" else 0.0
        of_row = torch.where(counted != options.ignore_index, (row_loss - mean) / divisor, 0.0)
        of_weights = (grad * of_row).to(row_weight.dtype)
    none_of_the_options = (None,) * (len(ctx.needs_input_grad) - 5)
    return (*of_operands, None, of_weights, *none_of_the_options)


masked_loss_forward.register_autograd(_autograd, setup_context=_context)
register_autocast(masked_loss_forward._opoverload, HEAD_OPERANDS)
register_autocast(masked_loss_backward._opoverload, 0)


def masked_loss(
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
    algorithm: str | None = None,
) -> Tensor:
    """`reference.masked_loss`, except that logits stay in fp32 and that a label outside [0, V) makes the loss NaN.

    `algorithm` is `"one_pass"`, `"one_pass_small"` or `"recompute"` (see `loss`); None takes `one_pass` where it
    applies. Raises ValueError for the first two where they do not.
    """
    numbers = (scale, divisor, softcap, ignore_index, reduction)
    autocasts = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocasts else hidden.dtype
    obstacle = why_not_one_pass(dtype)
    if algorithm in loss_kernels.ONE_PASS_BYTES and obstacle:
        raise ValueError(f"masked_loss: algorithm {algorithm!r} does not apply: {obstacle}; use 'recompute'")
    algorithm = algorithm or default_algorithm(dtype)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if algorithm in loss_kernels.ONE_PASS_BYTES and not any(wanted):
        algorithm = "recompute"
    return torch.ops.cggr_triton.masked_loss(
        hidden, weight, bias, target, row_weight, rows, num_items, *numbers, wanted, algorithm
    )[0]


def masked_loss_one_pass(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"one_pass"`."""
    return masked_loss(*args, **{**options, "algorithm": "one_pass"})


def masked_loss_one_pass_small(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"one_pass_small"`."""
    return masked_loss(*args, **{**options, "algorithm": "one_pass_small"})


def masked_loss_recompute(*args: Any, **options: Any) -> Tensor:
    """`masked_loss` with the algorithm `"recompute"`."""
    return masked_loss(*args, **{**options, "algorithm": "recompute"})
