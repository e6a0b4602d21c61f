"""`cggr::grouped_mlp` and its provider `torch`: against pairs one at a time, and transformers' own experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from cggr_compile.kernels.op import experts as expert_ops
from cggr_compile.kernels.op import grouped_mm
from cggr_compile.kernels.providers import choose
from expert_oracle import ACTIVATIONS, Case, by_pair, check, draw, poisoned, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


def operator(*args: Any) -> Tensor:
    return torch.ops.cggr.grouped_mlp(*args)


IMPLEMENTATIONS = [operator, grouped_mm.grouped_mlp]


def cpu(case: Case) -> Case:
    return case._replace(**{n: x.cpu() for n, x in case._asdict().items() if isinstance(x, Tensor)})


def double(case: Case) -> Case:
    floating = {n: x.double() for n, x in case._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}
    return cpu(case._replace(**floating))


def assert_close(implementation: Callable[..., Tensor], case: Case) -> None:
    grad = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(1)).double()
    found, expected = (step(f, case, grad) for f in (lambda case: implementation(*case), by_pair))
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("activation", "interleaved"), ACTIVATIONS)
def test_results_and_gradients_are_those_of_the_pairs(
    implementation: Callable[..., Tensor], activation: str, interleaved: bool
) -> None:
    for bias, keep in ((False, None), (True, 0.5)):
        case = draw(activation=activation, interleaved=interleaved, bias=bias, keep=keep, transposed=bias)
        assert_close(implementation, double(case))


@settings(deadline=None, max_examples=15)
@given(
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((1, 9), (1, 6), (1, 5), (1, 5), (1, 3)))),
    bias=st.booleans(),
    keep=st.sampled_from([None, 0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_any_sizes(sizes: tuple[int, ...], bias: bool, keep: float | None, seed: int) -> None:
    case = double(draw(*sizes, bias=bias, keep=keep, seed=seed))
    for implementation in IMPLEMENTATIONS:
        assert_close(implementation, case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_that_is_chosen_twice_counts_twice(implementation: Callable[..., Tensor]) -> None:
    case = draw(5, choices=3)
    assert_close(implementation, double(case._replace(experts=torch.ones_like(case.experts))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_are_no_worse_than_models(implementation: Callable[..., Tensor], dtype: torch.dtype) -> None:
    # Few tokens: torch adds up a bias's gradients in the half dtype, one after the other, on the CPU.
    case = cpu(draw(25, 20, 3, 18, 2, dtype, bias=True, keep=0.7))
    check(lambda *args: implementation(*args), case, roundings=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_tokens_that_are_not_kept_reach_nothing(implementation: Callable[..., Tensor]) -> None:
    case = cpu(draw(keep=0.5))
    grad = torch.ones_like(case.hidden)
    expected, found = (step(lambda case: implementation(*case), x, grad) for x in (case, poisoned(case)))
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert not found["out"][~case.keep].any()
    assert not found["hidden"][~case.keep].any()


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_provider_torch_is_transformers_grouped_experts_bit_for_bit(clamped: bool, seed: int) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 4}
    config = T.GptOssConfig(**sizes, swiglu_limit=1.5) if clamped else T.MixtralConfig(**sizes)
    config._experts_implementation = "grouped_mm"
    module = GptOssExperts(config) if clamped else MixtralExperts(config)
    case = draw(
        32,
        24,
        4,
        20,
        3,
        activation="clamped_gated" if clamped else "silu_gated",
        interleaved=clamped,
        bias=clamped,
        seed=seed,
    )
    case = cpu(case._replace(experts=case.experts % 4))
    parameters = {"gate_up_proj": case.gate_up, "down_proj": case.down}
    if clamped:
        parameters = {n: x.transpose(1, 2).contiguous() for n, x in parameters.items()}
        parameters |= {"gate_up_proj_bias": case.gate_up_bias, "down_proj_bias": case.down_bias}
        case = case._replace(
            gate_up=parameters["gate_up_proj"].transpose(1, 2),
            down=parameters["down_proj"].transpose(1, 2),
            limit=module.limit,
        )
    module.load_state_dict(parameters)
    grad = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(2))
    hidden, weights = case.hidden.clone().requires_grad_(), case.weights.clone().requires_grad_()
    out = module(hidden, case.experts, weights)
    out.backward(grad)
    found = step(lambda case: grouped_mm.grouped_mlp(*case), case, grad)
    assert torch.equal(found["out"], out)
    assert torch.equal(found["hidden"], hidden.grad)
    assert torch.equal(found["weights"], weights.grad)
    for name, gradient in ((n, p.grad) for n, p in module.named_parameters()):
        ours = found[name.replace("_proj", "")]
        assert torch.equal(ours.transpose(1, 2) if clamped and ours.dim() == 3 else ours, gradient), name


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_torch_is_the_choice_where_triton_cannot_run(device: str) -> None:
    assert choose("grouped_mlp", torch.device(device), torch.float32).name == "torch"
    assert choose("grouped_mlp", torch.device(device), torch.float32, "reference").name == "reference"


def test_a_second_derivative_is_refused() -> None:
    case = cpu(draw(3))
    leaves = case.leaves
    for implementation in IMPLEMENTATIONS:
        out = implementation(*case._replace(**leaves))
        (first,) = torch.autograd.grad(out.square().sum(), leaves["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            first.sum().backward()


def test_backward_twice_gives_the_same() -> None:
    case = cpu(draw(6))
    leaves = case.leaves
    out = operator(*case._replace(**leaves))
    grad = torch.ones_like(out)
    first, second = (torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_one_gradient_alone_is_the_one_of_all() -> None:
    case = cpu(draw(6, bias=True))
    grad = torch.ones_like(case.hidden)
    for implementation in IMPLEMENTATIONS:
        for name, expected in step(lambda case, f=implementation: f(*case), case, grad).items():
            if name != "out":
                leaf = getattr(case, name).clone().requires_grad_()
                (found,) = torch.autograd.grad(implementation(*case._replace(**{name: leaf})), leaf, grad)
                assert torch.equal(found, expected), name


def test_traces_with_symbolic_tokens() -> None:
    case = cpu(draw(5, keep=0.5))
    for implementation in IMPLEMENTATIONS:
        traced = make_fx(lambda *a, f=implementation: f(*a, case.activation), tracing_mode="symbolic")(*case[:8])
        other = cpu(draw(11, keep=0.5, seed=3))
        assert torch.equal(traced(*other[:8]), implementation(*other[:8], case.activation))


@pytest.mark.parametrize(
    ("argument", "replacement", "error"),
    [
        ("hidden", torch.zeros(2, 5, 24), ValueError),
        ("hidden", torch.zeros(5, 24, dtype=torch.int64), TypeError),
        ("gate_up", torch.zeros(4, 20, 24), ValueError),
        ("gate_up", torch.zeros(4, 40, 24, dtype=torch.float16), TypeError),
        ("down", torch.zeros(4, 20), ValueError),
        ("weights", torch.zeros(5, 3), ValueError),
        ("experts", torch.zeros(5, 2), TypeError),
        ("gate_up_bias", torch.zeros(4, 20), ValueError),
        ("down_bias", torch.zeros(4, 24, dtype=torch.float16), TypeError),
        ("keep", torch.zeros(5), TypeError),
        ("keep", torch.zeros(4, dtype=torch.bool), ValueError),
        ("activation", "gelu", ValueError),
        ("limit", 0.0, ValueError),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument(argument: str, replacement: object, error: type[Exception], device: str) -> None:
    arguments = cpu(draw(5, 24, 4, 20, 2, bias=True, keep=0.5))._replace(**{argument: replacement})
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    with pytest.raises(error, match=f"cggr::grouped_mlp: {argument} "):
        operator(*moved)


@pytest.mark.sample(1)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    case = cpu(draw(5, bias=bias, keep=0.5 if bias else None))
    opcheck(expert_ops.grouped_mlp, case._replace(**case.leaves))
    wanted = [True, False, True, True, bias, False]
    opcheck(expert_ops.grouped_mlp_backward, (torch.ones_like(case.hidden), wanted, *case))
    rows, ends = torch.randn(7, 4, requires_grad=True), torch.tensor([2, 2, 6], dtype=torch.int32)
    opcheck(grouped_mm.grouped_mm, (rows, torch.randn(3, 4, 5, requires_grad=True), ends))
