"""The Triton `masked_loss` as a registered operator: autocast, compilation, repeated calls, opcheck."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from cggr_compile.kernels.triton import loss as loss_kernels
from head_oracle import (
    DEVICE,
    IGNORED,
    SHAPE,
    draw,
    small_tiles,  # noqa: F401  a fixture
    step,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from triton_loss import (
    assert_same,
    both,
    implementation,
    loss_of,
    one_tile,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@both
def test_autocast_with_fp32_weights(algorithm: str) -> None:
    case = one_tile(weighted=True)
    low = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = steps(algorithm, case)
    expected = steps(algorithm, low)
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_same(found, {name: x.float() for name, x in expected.items()})


def test_autocast_to_float16_picks_recompute_and_one_pass_refuses_it() -> None:
    case = one_tile()
    low = case._replace(hidden=case.hidden.half(), weight=case.weight.half(), bias=case.bias.half())
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        with pytest.raises(ValueError, match="float16"):
            loss_of("triton_one_pass", case)
        found = steps("triton", case)
    assert_same(found, {name: x.float() for name, x in steps("triton_recompute", low).items()})


def _compiled(algorithm: str, backend: str) -> None:
    function = implementation(algorithm)
    for items in (torch.tensor(7.5, dtype=torch.float64), torch.tensor(7)):
        case = one_tile()._replace(num_items=items.to(DEVICE))

        def scaled(*args: Tensor, function: Callable = function, **tensors: Tensor) -> Tensor:
            # The scale is computed in double precision, and the result goes through it as well.
            return function(*args, **tensors, reduction="num_items", scale=1 / 3, divisor=0.7, softcap=7.0) * (1 / 3)

        found = step(torch.compile(scaled, backend=backend, fullgraph=True), case)
        assert found["loss"].dtype == torch.float32
        assert_same(found, step(scaled, case))


@pytest.mark.sample(1)
@both
def test_fp64_scalars_compiled_with_aot_eager(algorithm: str) -> None:
    _compiled(algorithm, "aot_eager")


@both
def test_code_for_sizes_that_are_not_known_serves_any_number_of_blocks(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 rows each: what is decided by their number would be a guard, and a compilation for each side of it."""
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass", 16 * 19 * 2)
    function = implementation(algorithm, torch.bfloat16)

    def gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = function(*leaves, None, target)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    case = draw(8, 9, 19, torch.bfloat16)
    traced = make_fx(gradients, tracing_mode="symbolic")(case.hidden, case.weight, case.target)
    (symbol,) = next(iter(traced.graph.nodes)).meta["val"].shape[0].node.expr.free_symbols
    for rows in (8, 16, 33, 90):
        assert all(
            guard.expr.xreplace({symbol: sympy.Integer(rows)}) == sympy.true for guard in traced.shape_env.guards
        )
        case = draw(rows, 9, 19, torch.bfloat16, seed=rows)
        leaves = [x.detach().float().requires_grad_() for x in (case.hidden, case.weight)]
        loss = F.cross_entropy(leaves[0] @ leaves[1].T, case.target, ignore_index=IGNORED)
        expected = loss.detach(), *torch.autograd.grad(loss, leaves)
        for found, wanted in zip(traced(case.hidden, case.weight, case.target), expected, strict=True):
            torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=2**-7 * wanted.abs().max().item())


@pytest.mark.gpu
@both
def test_fp64_scalars_compiled_with_inductor(algorithm: str) -> None:
    _compiled(algorithm, "inductor")


@both
def test_repeated_calls_are_bitwise_equal_so_nothing_tunes_into_accumulators(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(*SHAPE, torch.bfloat16, weighted=True)
    rows = torch.arange(SHAPE[0], device=DEVICE) // 2
    case = case._replace(rows=rows)
    first = steps(algorithm, case)
    for _ in range(5 if DEVICE.type == "cuda" else 1):
        assert_same(steps(algorithm, case), first)


@pytest.mark.sample(2)
@both
@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_opcheck(algorithm: str, with_options: bool, summed: bool) -> None:
    case = draw(5, 6, 7, bias=with_options, weighted=with_options)
    leaves = case.leaves
    rows = torch.tensor([1, 1, 0, 4, 2], device=DEVICE) if with_options else None
    items = torch.tensor(3.0, device=DEVICE) if with_options else None
    numbers = (1.0, 1.0, 0.0, IGNORED, "mean")
    if with_options:
        numbers = (2.0, 1.0, 3.0, IGNORED, "num_items")
    operands = [leaves.get(name) for name in ("hidden", "weight", "bias")]
    wanted = [x is not None for x in operands]
    loss = (*operands, case.target, leaves.get("row_weight"), *numbers, rows, items)
    opcheck(
        torch.ops.cggr_triton.masked_loss.default, (*loss, wanted, algorithm.removeprefix("triton_"), summed, False)
    )
