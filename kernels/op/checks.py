"""What the operators share: checks of arguments that name the offending one, autocast, and having no gradient.

An operator has a schema, such checks, a fake implementation, an autograd rule and the reference implementation,
registered for every device. It stays opaque to tracing, so its semantics survive every pass until a provider is chosen.

Autocast is part of the dispatch: the autocast key casts the head's operands to the autocast dtype and runs the rest
without autocast. What autograd saves is then already cast, so `masked_loss_backward` recomputes with the operands of
the forward wherever it is called; and the casts never enter autocast's weight cache, through which a no-grad router
would take the gradient away from the main pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
HEAD_OPERANDS = 3  # hidden, weight, bias


def no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def no_gradient_backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    return (None,) * len(ctx.needs_input_grad)


# A library takes its registrations along when it is collected.
_libraries: list[torch.library.Library] = []


def register_autocast(op: OpOverload, cast: int) -> None:
    """Under autocast, casts the first `cast` arguments as for a linear and runs `op` without autocast."""
    library = torch.library.Library(op.namespace, "FRAGMENT")
    _libraries.append(library)
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        name = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
        library.impl(op, _autocast_kernel(op, device_type, getattr(torch._C.DispatchKey, name), cast), name)


def _autocast_kernel(op: OpOverload, device_type: str, key: torch._C.DispatchKey, cast: int) -> Callable[..., Any]:
    def operand(x: Tensor | None) -> Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device_type)) if eligible else x  # type: ignore[union-attr]

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*map(operand, args[:cast]), *args[cast:])

    return kernel


def check_shape(op: str, argument: str, tensor: Tensor, expected: Sequence[int], names: str) -> None:
    torch._check_value(
        tensor.dim() == len(expected),
        lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names}",
    )
    for size, wanted in zip(tensor.shape, expected, strict=True):
        torch._check_value(
            size == wanted,
            lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names} = {tuple(expected)}",
        )


def check_dtype(op: str, argument: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    torch._check_type(
        tensor.dtype in expected,
        lambda: f"cggr::{op}: {argument} is {tensor.dtype}, expected {' or '.join(map(str, expected))}",
    )


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    for argument, tensor, names in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        torch._check_value(
            tensor.dim() == 2,
            lambda: f"cggr::{op}: {argument} has shape {tuple(tensor.shape)}, expected {names}",  # noqa: B023
        )
    torch._check_type(
        hidden.is_floating_point(), lambda: f"cggr::{op}: hidden is {hidden.dtype}, expected a floating dtype"
    )
    check_shape(op, "weight", weight, (weight.shape[0], hidden.shape[1]), "[V, D]")
    check_dtype(op, "weight", weight, (hidden.dtype,))
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "[V]")
        check_dtype(op, "bias", bias, (hidden.dtype,))
    check_shape(op, "target", target, (hidden.shape[0],), "[N]")
    check_dtype(op, "target", target, INTEGERS)
