"""`cggr::masked_loss` as a registered operator: autocast, tracing, compilation, argument checks, opcheck."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.op import masked_loss as masked_loss_op
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.operator_schemas import get_signature_for_torch_op
from torch.library import opcheck

IGNORED = -100


def masked_loss(*args: object) -> Tensor:
    return torch.ops.cggr.masked_loss(*args)


def operands(
    rows: int = 9, width: int = 8, classes: int = 11, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (leaves) and targets, of which about a third are ignored but never the first."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1:][torch.rand(max(rows - 1, 0), generator=generator) < 0.3] = IGNORED
    return hidden, weight, bias, target


def weights(rows: int = 9, seed: int = 1) -> Tensor:
    return (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1).requires_grad_()


def with_gradients(function: Callable[..., Tensor], *args: object, grad: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    loss = function(*args)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    return loss, list(torch.autograd.grad(loss, leaves, torch.full_like(loss, grad)))


@pytest.mark.parametrize("backward_under_autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_weight", [None, weights()])
def test_autocast_with_fp32_weights(
    backward_under_autocast: bool, dtype: torch.dtype, row_weight: Tensor | None
) -> None:
    args = (*operands(33, 17, 129), weights(33) if row_weight is not None else None)
    leaves = [x for x in args if x is not None and x.requires_grad]
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = masked_loss(*args), reference.masked_loss(*args)
        by_hand = F.cross_entropy(F.linear(*args[:3]).float(), args[3])
    with torch.autocast("cpu", dtype=dtype, enabled=backward_under_autocast):
        gradients = torch.autograd.grad(actual, leaves)
    by_reference = torch.autograd.grad(expected, leaves)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * len(leaves)
    assert all(map(torch.equal, gradients, by_reference))
    if row_weight is None:
        assert torch.equal(actual, by_hand)
        assert all(map(torch.equal, gradients, torch.autograd.grad(by_hand, leaves)))


def test_backward_under_autocast_recomputes_without_it_what_ran_without_it() -> None:
    args = operands()
    loss = masked_loss(*args)
    expected = torch.autograd.grad(loss, args[:3], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(loss, args[:3]), expected))


def test_autocast_takes_keywords_and_leaves_float64_alone() -> None:
    hidden, weight, bias, target = operands()
    double = [x.detach().double() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = torch.ops.cggr.masked_loss(target=target, hidden=hidden, weight=weight, bias=bias, reduction="sum")
        high = masked_loss(*double, target)
    expected = masked_loss(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), target, None, 1, 1, 0, -100, "sum")
    assert torch.equal(low, expected)
    by_hand = F.cross_entropy(F.linear(*double), target)
    assert high.item() == pytest.approx(by_hand.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_compiles_forward_and_backward_with_dynamic_rows(autocast: bool) -> None:
    compiled = torch.compile(masked_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        args = (*operands(rows), weights(rows))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            actual, expected = compiled(*args), masked_loss(*args)
        leaves = [args[0], args[1], args[2], args[4]]
        assert torch.equal(actual, expected)
        found = torch.autograd.grad(actual, leaves)
        assert all(map(torch.equal, found, torch.autograd.grad(expected, leaves)))


def test_reference_traces_with_symbolic_rows_and_runs_on_meta() -> None:
    traced = make_fx(lambda *args: reference.masked_loss(*args), tracing_mode="symbolic")(*operands(5), weights(5))
    assert not any("local_scalar_dense" in str(node.target) for node in traced.graph.nodes)
    args = (*operands(8), weights(8))
    nll = F.cross_entropy(F.linear(*args[:3]), args[3], reduction="none")
    by_hand = (nll * args[4]).sum() / args[4][args[3] != IGNORED].sum()
    assert traced(*args).item() == pytest.approx(by_hand.item(), rel=1e-5)
    # A meta tensor has no values: anything read back to the host would raise.
    meta = [x.detach().to("meta").requires_grad_(x.is_floating_point()) for x in args]
    loss, gradients = with_gradients(reference.masked_loss, *meta)
    assert loss.shape == ()
    assert [gradient.shape for gradient in gradients] == [x.shape for x in meta if x.requires_grad]


@pytest.mark.parametrize(
    ("argument", "replacement", "error"),
    [
        ("hidden", torch.zeros(2, 9, 8), ValueError),
        ("weight", torch.zeros(11, 9), ValueError),
        ("weight", torch.zeros(11, 8, dtype=torch.bfloat16), TypeError),
        ("bias", torch.zeros(10), ValueError),
        ("target", torch.zeros(5, dtype=torch.int64), ValueError),
        ("target", torch.zeros(9), TypeError),
        ("row_weight", torch.zeros(8), ValueError),
        ("row_weight", torch.zeros(9, dtype=torch.int64), TypeError),
        ("reduction", "none", ValueError),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument(argument: str, replacement: object, error: type[Exception], device: str) -> None:
    names = ("hidden", "weight", "bias", "target", "row_weight", "scale", "divisor", "softcap", "ignore_index")
    values = (*operands(), weights(), 1.0, 1.0, 0.0, IGNORED)
    arguments = dict(zip(names, values, strict=True)) | {"reduction": "mean"} | {argument: replacement}
    moved = [x.detach().to(device) if isinstance(x, Tensor) else x for x in arguments.values()]
    with pytest.raises(error, match=f"cggr::masked_loss: {argument} "):
        masked_loss(*moved)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), (weights(), 2.0, 3.0, 5.0, 1, "sum"), (weights().detach(),)])
def test_opcheck(with_bias: bool, dtype: torch.dtype, options: tuple) -> None:
    hidden, weight, bias, target = operands(dtype=dtype)
    target[target == IGNORED] = options[4] if len(options) > 1 else IGNORED
    opcheck(masked_loss_op.masked_loss, (hidden, weight, bias if with_bias else None, target, *options))


@pytest.mark.parametrize("wanted", [[True] * 4, [True, False, False, False], [False, True, True, False]])
@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck_of_the_backward(wanted: list[bool], transposed: bool) -> None:
    hidden, weight, bias, target = (x.detach() for x in operands())
    if transposed:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    args = (hidden, weight, bias, target, weights().detach(), 2.0, 3.0, 5.0, IGNORED, "mean")
    opcheck(masked_loss_op.masked_loss_backward, (torch.tensor(0.7), wanted, *args))


def test_every_operator_has_a_signature_that_inductor_can_bind() -> None:
    pytest.importorskip("triton")
    importlib.import_module("cggr_compile.kernels.triton.ops")
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith(("cggr::", "cggr_triton::"))}
    assert {"cggr::draw", "cggr_triton::masked_loss_backward"} <= names
    for name in names:
        namespace, operator = name.split("::")
        # Raises for an argument named twice, as a list of inputs and an option can be.
        assert get_signature_for_torch_op(getattr(getattr(torch.ops, namespace), operator).default)
