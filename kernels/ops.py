"""The operators that the passes insert: `cggr::score`, `select`, `gather`, `masked_loss` and `masked_loss_backward`.

Each has a schema, a check of its arguments that names the offending one, a fake implementation, an autograd rule and
the reference implementation, registered for every device. They stay opaque to tracing, so semantics survive every
pass until a provider is chosen.

Autocast is part of the dispatch: the autocast key casts the head's operands to the autocast dtype and runs the rest
without autocast. What autograd saves is then already cast, so `masked_loss_backward` recomputes with the operands of
the forward wherever it is called; and the casts never enter autocast's weight cache, through which a no-grad router
would take the gradient away from the main pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cggr_compile.kernels import reference
from torch import Tensor

_HEAD_OPTIONS = "float scale=1.0, float divisor=1.0, float softcap=0.0, int ignore_index=-100"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_shape(op: str, argument: str, tensor: Tensor, expected: Sequence[int], names: str) -> None:
    torch._check_value(
        tensor.dim() == len(expected),
        lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names}",
    )
    for size, wanted in zip(tensor.shape, expected, strict=True):
        torch._check_value(
            size == wanted,
            lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names} = {tuple(expected)}",
        )


def _check_dtype(op: str, argument: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    torch._check_type(
        tensor.dtype in expected,
        lambda: f"cggr::{op}: {argument} is {tensor.dtype}, expected {' or '.join(map(str, expected))}",
    )


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    for argument, tensor, names in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        torch._check_value(
            tensor.dim() == 2,
            lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names}",  # noqa: B023
        )
    torch._check_type(
        hidden.is_floating_point(), lambda: f"cggr::{op}: hidden is {hidden.dtype}, expected a floating dtype"
    )
    _check_shape(op, "weight", weight, (weight.shape[0], hidden.shape[1]), "[V, D]")
    _check_dtype(op, "weight", weight, (hidden.dtype,))
    if bias is not None:
        _check_shape(op, "bias", bias, (weight.shape[0],), "[V]")
        _check_dtype(op, "bias", bias, (hidden.dtype,))
    _check_shape(op, "target", target, (hidden.shape[0],), "[N]")
    _check_dtype(op, "target", target, _INTEGERS)


def _check_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
) -> None:
    _check_head("score", hidden, weight, bias, target)
    torch._check_value(
        bool(quantities) and all(name in reference.QUANTITIES for name in quantities),
        lambda: (
            f"cggr::score: quantities is {list(quantities)}, expected a non-empty list of {list(reference.QUANTITIES)}"
        ),
    )


@torch.library.custom_op(
    "cggr::score",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, str[] quantities, {_HEAD_OPTIONS}) -> Tensor",
)
def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`reference.score`: float32 [len(quantities), N], not differentiable; ValueError or TypeError by argument."""
    _check_score(hidden, weight, bias, target, quantities)
    return reference.score(hidden, weight, bias, target, quantities, scale, divisor, softcap, ignore_index)


@score.register_fake
def _score_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    _check_score(hidden, weight, bias, target, quantities)
    return hidden.new_empty((len(quantities), hidden.shape[0]), dtype=torch.float32)


def _check_select(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None) -> None:
    torch._check_value(scores.dim() >= 1, lambda: "cggr::select: scores has shape (), expected [..., N]")
    _check_dtype("select", "scores", scores, (torch.float32,))
    _check_shape("select", "valid", valid, scores.shape, "[..., N] as scores")
    _check_dtype("select", "valid", valid, (torch.bool,))
    torch._check_value(k >= 1, lambda: f"cggr::select: k is {k}, expected at least 1")
    torch._check_value(
        rule in reference.RANKINGS,
        lambda: f"cggr::select: rule is {rule!r}, expected one of {list(reference.RANKINGS)}",
    )
    if noise is not None:
        _check_shape("select", "noise", noise, scores.shape, "[..., N] as scores")
        _check_dtype("select", "noise", noise, (torch.float32,))


@torch.library.custom_op(
    "cggr::select",
    mutates_args=(),
    schema="(Tensor scores, Tensor valid, SymInt k, str rule, Tensor? noise=None) -> (Tensor, Tensor)",
)
def select(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.select`: index int64 [..., k] and weight float32 [..., k], neither differentiable."""
    _check_select(scores, valid, k, rule, noise)
    return reference.select(scores, valid, k, rule, noise)


@select.register_fake
def _select_fake(
    scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_select(scores, valid, k, rule, noise)
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradient_backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


score.register_autograd(_no_gradient_backward, setup_context=_no_gradient)
select.register_autograd(_no_gradient_backward, setup_context=_no_gradient)


def _check_gather(x: Tensor, index: Tensor, dim: int) -> None:
    torch._check_value(
        -x.dim() <= dim < x.dim(),
        lambda: f"cggr::gather: dim is {dim}, out of range for x of shape {tuple(x.shape)}",
    )
    _check_shape("gather", "index", index, (index.numel(),), "[k]")
    _check_dtype("gather", "index", index, (torch.int64, torch.int32))


@torch.library.custom_op("cggr::gather", mutates_args=(), schema="(Tensor x, Tensor index, int dim) -> Tensor")
def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`reference.gather`: slices `index` [k] of `x` along `dim`; gradients of repeated slices add up."""
    _check_gather(x, index, dim)
    return reference.gather(x, index, dim)


@gather.register_fake
def _gather_fake(x: Tensor, index: Tensor, dim: int) -> Tensor:
    _check_gather(x, index, dim)
    shape = list(x.shape)
    shape[dim] = index.shape[0]
    return x.new_empty(shape)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    (index,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).index_add(ctx.dim, index, grad), None, None


gather.register_autograd(_gather_backward, setup_context=_gather_context)


def _check_masked_loss(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    reduction: str,
) -> None:
    _check_head(op, hidden, weight, bias, target)
    if row_weight is not None:
        _check_shape(op, "row_weight", row_weight, (hidden.shape[0],), "[N]")
        torch._check_type(
            row_weight.is_floating_point(),
            lambda: f"cggr::{op}: row_weight is {row_weight.dtype}, expected a floating dtype",
        )
    torch._check_value(
        reduction in reference.REDUCTIONS,
        lambda: f"cggr::{op}: reduction is {reduction!r}, expected one of {list(reference.REDUCTIONS)}",
    )


@torch.library.custom_op(
    "cggr::masked_loss",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight=None, "
        f'{_HEAD_OPTIONS}, str reduction="mean") -> Tensor'
    ),
)
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
) -> Tensor:
    """`reference.masked_loss`: 0-d float32, differentiable in hidden, weight, bias and row_weight."""
    _check_masked_loss("masked_loss", hidden, weight, bias, target, row_weight, reduction)
    return reference.masked_loss(
        hidden, weight, bias, target, row_weight, scale, divisor, softcap, ignore_index, reduction
    )


@masked_loss.register_fake
def _masked_loss_fake(
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
) -> Tensor:
    _check_masked_loss("masked_loss", hidden, weight, bias, target, row_weight, reduction)
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
        "float scale, float divisor, float softcap, int ignore_index, str reduction, bool[4] wanted) -> Tensor[]"
    ),
)
def masked_loss_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    scale: float,
    divisor: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """`reference.masked_loss_backward`: the gradients of the wanted of (hidden, weight, bias, row_weight), in order."""
    _check_masked_loss("masked_loss_backward", hidden, weight, bias, target, row_weight, reduction)
    with _autograd_inside_operator():
        return reference.masked_loss_backward(
            grad,
            hidden,
            weight,
            bias,
            target,
            row_weight,
            scale,
            divisor,
            softcap,
            ignore_index,
            reduction,
            wanted,
        )


@masked_loss_backward.register_fake
def _masked_loss_backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    scale: float,
    divisor: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    _check_masked_loss("masked_loss_backward", hidden, weight, bias, target, row_weight, reduction)
    inputs = (hidden, weight, bias, row_weight)
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want and x is not None]


def _masked_loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _masked_loss_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, row_weight = ctx.saved_tensors
    # The dispatcher drops trailing arguments equal to their defaults: row_weight has no place when it is None.
    places = (0, 1, 2, 4)
    wanted = [place < len(ctx.needs_input_grad) and ctx.needs_input_grad[place] for place in places]
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    found = torch.ops.cggr.masked_loss_backward(grad, hidden, weight, bias, target, row_weight, *ctx.options, wanted)
    for place, gradient in zip((p for p, want in zip(places, wanted, strict=True) if want), found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


masked_loss.register_autograd(_masked_loss_autograd, setup_context=_masked_loss_context)


def _register_autocast(op: torch._ops.OpOverload, cast: int) -> None:
    """Under autocast, casts the first `cast` arguments as for a linear and runs `op` without autocast."""
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        name = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
        _library.impl(op, _autocast_kernel(op, device_type, getattr(torch._C.DispatchKey, name), cast), name)


def _autocast_kernel(
    op: torch._ops.OpOverload, device_type: str, key: torch._C.DispatchKey, cast: int
) -> Callable[..., Any]:
    def operand(x: Tensor | None) -> Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device_type)) if eligible else x  # type: ignore[union-attr]

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*map(operand, args[:cast]), *args[cast:])

    return kernel


_library = torch.library.Library("cggr", "FRAGMENT")
_HEAD_OPERANDS = 3  # hidden, weight, bias
_register_autocast(torch.ops.cggr.score.default, _HEAD_OPERANDS)
_register_autocast(torch.ops.cggr.masked_loss.default, _HEAD_OPERANDS)
_register_autocast(torch.ops.cggr.masked_loss_backward.default, 0)
