"""The Triton `score` as a registered operator: quantities, gradient, autocast, compilation, opcheck."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.providers import choose
from head_oracle import (
    DEVICE,
    SHAPE,
    draw,
    small_tiles,  # noqa: F401  a fixture
)
from torch import Tensor
from torch.library import opcheck
from triton_score import QUANTITIES, named, one_tile, score

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def test_quantities_in_any_order_subset_and_repetition() -> None:
    case = draw(5, 3, 7)
    everything = named(case)
    subsets = itertools.chain(*(itertools.permutations(QUANTITIES, size) for size in (1, 2)))
    repeated = [("nll", "nll"), ("margin", "nll", "margin", "confidence", "margin"), tuple(reversed(QUANTITIES))]
    for quantities in (*subsets, *repeated):
        found = score(case, list(quantities))
        assert torch.equal(found, torch.stack([everything[name] for name in quantities])), quantities


def test_result_carries_no_gradient() -> None:
    case = one_tile()
    leaves = case.leaves
    assert not score(case._replace(**leaves)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_fp32_weights_leaves_the_weight_cache_alone(dtype: torch.dtype) -> None:
    case = one_tile()
    weight = case.weight.clone().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        with torch.no_grad():
            found = score(case._replace(weight=weight))
        F.linear(case.hidden, weight, case.bias).sum().backward()
    low = case._replace(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype), bias=case.bias.to(dtype))
    assert torch.equal(found, score(low))
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def _compiled(backend: str) -> None:
    implementation = choose("score", DEVICE, torch.float32, "triton").implementation

    def scaled(*args: Tensor) -> Tensor:
        # Scales computed in double precision, and the result goes through one as well.
        return implementation(*args, QUANTITIES, 1 / 3, 0.7, 7.0) * (1 / 3)

    compiled = torch.compile(scaled, backend=backend, fullgraph=True, dynamic=True)
    for rows in (11, 20):
        args = draw(rows, 9, 19)[:4]
        found = compiled(*args)
        assert found.dtype == torch.float32
        assert torch.equal(found, scaled(*args))


def test_fp64_scalars_compiled_with_aot_eager_and_dynamic_rows() -> None:
    _compiled("aot_eager")


@pytest.mark.gpu
def test_fp64_scalars_compiled_with_inductor_and_dynamic_rows() -> None:
    _compiled("inductor")


def test_repeated_calls_are_bitwise_equal_so_nothing_tunes_into_accumulators() -> None:
    case = draw(*SHAPE, torch.bfloat16)
    first = score(case)
    assert all(torch.equal(score(case), first) for _ in range(10 if DEVICE.type == "cuda" else 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [(["nll"],), (QUANTITIES, 2.0, 3.0, 5.0, 1)])
def test_opcheck(bias: bool, options: tuple) -> None:
    case = draw(6, 8, 11, bias=bias)
    opcheck(torch.ops.cggr_triton.score.default, (*case[:4], *options))
