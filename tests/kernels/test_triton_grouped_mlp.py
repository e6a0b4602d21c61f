"""The Triton `grouped_mlp` against pairs one at a time: no worse than plain torch in the same dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cggr_compile.kernels.providers import choose
from expert_oracle import (
    ACTIVATIONS,
    SHAPE,
    check,
    draw,
    poisoned,
    small_tiles,  # noqa: F401  a fixture
    step,
)
from head_oracle import DEVICE
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

ROUNDINGS = 2 if DEVICE.type == "cpu" else 10
"""What a case of few elements may differ by: a product and a sum, and a GPU's exponential and division, which are
within two units in the last place, four roundings each."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grouped_mlp(*args: Any) -> Tensor:
    return choose("grouped_mlp", DEVICE, torch.float32, "triton").implementation(*args)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("activation", "interleaved"), ACTIVATIONS)
def test_each_activation(activation: str, interleaved: bool) -> None:
    check(grouped_mlp, draw(activation=activation, interleaved=interleaved, bias=True, transposed=interleaved))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_each_dtype_and_layout(dtype: torch.dtype, transposed: bool) -> None:
    case = draw(dtype=dtype, transposed=transposed, keep=0.6, weights=dtype if transposed else torch.float32)
    found = check(grouped_mlp, case, roundings=0 if dtype == torch.float32 else 1)
    # Autograd copies a gradient that lies otherwise than its parameter.
    assert found["gate_up"].stride() == case.gate_up.stride()
    assert found["down"].stride() == case.down.stride()


@settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((1, 40), (1, 40), (1, 6), (1, 40), (1, 3)))),
    kind=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    keep=st.sampled_from([None, 0.0, 0.5]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_sizes(
    sizes: tuple[int, ...], kind: tuple[str, bool], bias: bool, keep: float | None, transposed: bool, seed: int
) -> None:
    case = draw(*sizes, activation=kind[0], interleaved=kind[1], bias=bias, keep=keep, transposed=transposed, seed=seed)
    check(grouped_mlp, case, ROUNDINGS)


@pytest.mark.sample(2)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_all_tokens_of_one_expert_leave_the_others_nothing(tokens: int) -> None:
    case = draw(tokens, choices=1)
    case = case._replace(experts=torch.full_like(case.experts, 2))
    found = check(grouped_mlp, case, ROUNDINGS)
    assert not found["gate_up"][[0, 1]].any()
    assert not found["down"][[0, 1]].any()


def test_nothing_is_chosen() -> None:
    case = draw(7, bias=True)
    found = step(lambda c: grouped_mlp(*c), case._replace(experts=case.experts * 0 - 1), torch.ones_like(case.hidden))
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("sizes", [(0, 8, 3, 4, 2), (5, 8, 3, 4, 0)])
def test_no_tokens_and_no_choices(sizes: tuple[int, ...]) -> None:
    case = draw(*sizes, bias=True)
    found = step(lambda c: grouped_mlp(*c), case, torch.ones_like(case.hidden))
    assert found["out"].shape == case.hidden.shape
    assert not any(x.any() for x in found.values())


def test_infinite_tokens_that_are_not_kept_reach_nothing() -> None:
    case = draw(5, keep=0.5)
    grad = torch.ones_like(case.hidden)
    expected, found = (step(lambda c: grouped_mlp(*c), x, grad) for x in (case, poisoned(case)))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_dropped_tokens_have_no_tile() -> None:
    from cggr_compile.kernels.triton import experts as kernels

    for keep in (0.0, 0.5, 1.0):
        case = draw(keep=keep)
        order = kernels.sort_pairs(kernels.ExpertArguments(*case))
        launches = kernels._Launches(kernels.ExpertArguments(*case), order)
        _, _, count = launches.schedule
        kept = (case.experts < SHAPE[2]) & case.keep[:, None]
        pairs = torch.stack([((case.experts == e) & kept).sum() for e in range(SHAPE[2])])
        assert count.item() == (-(-pairs // launches.tile.rows)).sum().item()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["hidden", "gate_up", "down", "weights", "gate_up_bias", "down_bias"])
def test_one_gradient_alone_is_the_one_of_all(name: str) -> None:
    case = draw(5, bias=True)
    grad = torch.ones_like(case.hidden)
    expected = step(lambda c: grouped_mlp(*c), case, grad)[name]
    leaf = getattr(case, name).clone().requires_grad_()
    (found,) = torch.autograd.grad(grouped_mlp(*case._replace(**{name: leaf})), leaf, grad)
    assert torch.equal(found, expected)


def test_repeated_calls_are_bitwise_equal_and_backward_runs_twice() -> None:
    case = draw(17, dtype=torch.bfloat16)
    leaves = case.leaves
    out, again = grouped_mlp(*case._replace(**leaves)), grouped_mlp(*case)
    grad = torch.ones_like(out)
    first, second = (torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True) for _ in range(2))
    assert torch.equal(out, again)
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused() -> None:
    case = draw(3)
    leaves = case.leaves
    out = grouped_mlp(*case._replace(**leaves))
    (first,) = torch.autograd.grad(out.square().sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


@pytest.mark.long
def test_compiles_with_dynamic_tokens() -> None:
    compiled = torch.compile(grouped_mlp, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        case = draw(tokens, 16, 3, 8, keep=0.5)
        grad = torch.ones_like(case.hidden)
        found, expected = (step(lambda c, f=f: f(*c), case, grad) for f in (compiled, grouped_mlp))
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_opcheck() -> None:
    case = draw(3, 16, 2, 8, 1, bias=True, activation="clamped_gated", interleaved=True)
    choose("grouped_mlp", DEVICE, torch.float32, "triton").load()
    opcheck(torch.ops.cggr_triton.grouped_mlp.default, (*case._replace(**case.leaves), True))


@pytest.mark.long
def test_kernels_compile_for_hopper_without_one() -> None:
    # In a process of its own: this one interprets kernels.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_grouped.py"
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["up_kernel", "down_kernel", "down_backward_kernel", "tables_kernel"]


@pytest.mark.gpu
def test_rows_beyond_32_bits_on_cuda() -> None:
    # First products of 2^17 pairs, 2^15 wide each, are 2^32 numbers.
    tokens, width, features = 2**17, 128, 2**14
    case = draw(tokens, width, 2, features, 1, torch.bfloat16)
    case = case._replace(experts=torch.zeros_like(case.experts))
    last = case._replace(hidden=case.hidden[-3:], weights=case.weights[-3:], experts=case.experts[-3:])
    grad = torch.zeros_like(case.hidden)
    grad[-3:] = 1
    found = step(lambda c: grouped_mlp(*c), case, grad)
    expected = step(lambda c: grouped_mlp(*c), last, grad[-3:])
    # Three tokens are a case for smaller tiles, whose sums may round otherwise.
    for name, x in (("out", found["out"][-3:]), ("hidden", found["hidden"][-3:]), ("gate_up", found["gate_up"])):
        torch.testing.assert_close(x, expected[name])
