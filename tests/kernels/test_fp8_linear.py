"""`cggr::fp8_linear` and its gradients against float64 products of rows that are quantised entry by entry, and its
provider's calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.op import fp8_linear as module
from cggr_compile.kernels.providers import Place, choose, passed_over
from functorch.compile import default_partition, make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given
from hypothesis import strategies as st
from router_head_oracle import quantised
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
linear = torch.ops.cggr.fp8_linear


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [..., O], and the sizes of the terms that each entry is the sum of."""
    rows, table = quantised(x.reshape(-1, x.shape[-1])), quantised(weight)
    offset = torch.zeros(len(weight)) if bias is None else bias.double()
    shape = (*x.shape[:-1], len(weight))
    return (rows @ table.T + offset).view(shape), (rows.abs() @ table.abs().T + offset.abs()).view(shape)


def assert_is_the_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sums: float = 2**-20) -> None:
    """Within one rounding to the result's dtype, and `sums` of the terms."""
    expected, terms = truth(x, weight, bias)
    assert actual.shape == expected.shape
    bound = torch.finfo(actual.dtype).eps * expected.abs() + sums * terms + torch.finfo(actual.dtype).tiny
    assert ((actual.double() - expected).abs() <= bound).all()


LAYOUTS = {
    "dense": lambda x: x,
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    width=st.integers(1, 20),
    outputs=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    weight_layout=st.sampled_from(list(LAYOUTS)),
    with_bias=st.booleans(),
    magnitude=st.integers(-3, 2),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_and_layout(
    lead: list[int],
    width: int,
    outputs: int,
    dtype: torch.dtype,
    layout: str,
    weight_layout: str,
    with_bias: bool,
    magnitude: int,
    seed: int,
) -> None:
    x = LAYOUTS[layout](10.0**magnitude * drawn(*lead, width, seed=seed)).to(dtype)
    weight = LAYOUTS[weight_layout](drawn(outputs, width, seed=seed + 1)).to(dtype)
    bias = drawn(outputs, seed=seed + 2, dtype=dtype) if with_bias else None
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_is_the_product(actual, x, weight, bias)
    assert torch.equal(module.fp8_linear(x, weight, bias), actual)


@given(rows=st.integers(1, 6), width=st.integers(2, 24), outputs=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_what_float8_holds_is_multiplied_exactly(rows: int, width: int, outputs: int, seed: int) -> None:
    """Small whole numbers beside a 448, times a power of two for each row: the scale is that power."""
    generator = torch.Generator().manual_seed(seed)

    def exact(count: int) -> Tensor:
        x = torch.randint(-15, 16, (count, width), generator=generator).float()
        x[:, 0] = 448.0
        return x * 2.0 ** torch.randint(-9, 9, (count, 1), generator=generator)

    x, weight = exact(rows), exact(outputs)
    assert torch.equal(linear(x, weight).double(), x.double() @ weight.double().T)


IMPLEMENTATIONS = [linear, module.fp8_linear]


def gradients(implementation: Any, args: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """Of the operands that require one, in order; None for the others."""
    wanted = [x for x in args if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(implementation(*args), wanted, grad))
    return [next(found) if x is not None and x.requires_grad else None for x in args]


def assert_are_the_gradients(
    found: list[Tensor | None], args: tuple[Tensor | None, ...], grad: Tensor, sums: float = 2**-20
) -> None:
    """The input's is the product of quantised rows of the gradient and quantised columns of the weight; the others' are
    sums over the rows in the operands' dtype, in some order."""
    x, weight, _ = args
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.detach().reshape(-1, x.shape[-1])
    if found[0] is not None:
        assert_is_the_product(found[0], grad, weight.detach().T, None, sums)
    exact = {1: (rows.double().T, inputs.double()), 2: (rows.double().T, torch.ones(len(rows), dtype=torch.float64))}
    for place, (left, right) in exact.items():
        if found[place] is not None:
            bound = len(rows) * torch.finfo(grad.dtype).eps * (left.abs() @ right.abs()) + torch.finfo(grad.dtype).tiny
            assert found[place].dtype == args[place].dtype
            assert ((found[place].double() - left @ right).abs() <= bound).all()


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    width=st.integers(1, 20),
    outputs=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    with_bias=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(lambda wanted: any(wanted[:2])),
    magnitude=st.integers(-3, 2),
    seed=st.integers(0, 2**20),
)
def test_gradients_of_those_that_train(
    lead: list[int],
    width: int,
    outputs: int,
    dtype: torch.dtype,
    layout: str,
    with_bias: bool,
    trained: tuple[bool, bool, bool],
    magnitude: int,
    seed: int,
) -> None:
    x, weight = drawn(*lead, width, seed=seed, dtype=dtype), LAYOUTS[layout](drawn(outputs, width, seed=seed + 1))
    args = x, weight.to(dtype), drawn(outputs, seed=seed + 2, dtype=dtype) if with_bias else None
    for operand, wanted in zip(args, trained, strict=True):
        if operand is not None:
            operand.requires_grad_(wanted)
    grad = LAYOUTS[layout](10.0**magnitude * drawn(*lead, outputs, seed=seed + 3)).to(dtype)
    found = gradients(linear, args, grad)
    assert_are_the_gradients(found, args, grad)
    for one, other in zip(gradients(module.fp8_linear, args, grad), found, strict=True):
        assert one is other is None or torch.equal(one, other)


def exact_both_ways(rows: int, columns: int, seed: int) -> Tensor:
    """Small whole numbers and a 448 in every row and every column: float8 holds rows and columns as they are."""
    x = torch.randint(-15, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    place = torch.arange(max(rows, columns))
    x[place % rows, place % columns] = 448.0
    return x


@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 12),
    outputs=st.integers(1, 12),
    powers=st.tuples(st.integers(-9, 8), st.integers(-9, 8), st.integers(-9, 8)),
    seed=st.integers(0, 2**20),
)
def test_of_what_float8_holds_everything_is_the_linears(
    rows: int, width: int, outputs: int, powers: tuple[int, int, int], seed: int
) -> None:
    """All sums are of whole numbers below 2²⁴, so fp32 has them exactly, in any order."""
    shapes = (rows, width), (outputs, width), (rows, outputs)
    x, weight, grad = (
        exact_both_ways(*shape, seed + place) * 2.0**power
        for place, (shape, power) in enumerate(zip(shapes, powers, strict=True))
    )
    args = x.requires_grad_(), weight.requires_grad_(), None
    for implementation in IMPLEMENTATIONS:
        assert torch.equal(implementation(*args), F.linear(*args))
        for one, other in zip(gradients(implementation, args, grad)[:2], gradients(F.linear, args, grad), strict=False):
            assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_row_and_zeros_give_zeros(implementation: Any, bad: float) -> None:
    args = drawn(5, 16).requires_grad_(), drawn(6, 16, seed=1).requires_grad_(), drawn(6, seed=2).requires_grad_()
    grad = drawn(5, 6, seed=3)
    grad[3] = 0
    clean = gradients(implementation, args, grad)
    assert (clean[0][3] == 0).all()
    grad[1, 2] = bad
    of_input, of_weight, of_bias = gradients(implementation, args, grad)
    assert of_input[1].isnan().all()
    assert torch.equal(of_input[[0, 2, 3, 4]], clean[0][[0, 2, 3, 4]])
    kept = [0, 1, 3, 4, 5]
    assert not of_weight[2].isfinite().any()
    assert torch.equal(of_weight[kept], clean[1][kept])
    assert torch.equal(of_bias[kept], clean[2][kept])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_autocast_gradients_come_back_in_the_operands_dtypes(implementation: Any) -> None:
    """Of operands cast to bfloat16, then cast: as a linear's, to the bit where nothing is in float8."""
    args = drawn(3, 16).requires_grad_(), drawn(32, 16, seed=1).requires_grad_(), drawn(32, seed=2).requires_grad_()
    grad = drawn(3, 32, seed=3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = (gradients(each, args, grad) for each in (implementation, F.linear))
    cast = tuple(x.detach().bfloat16().requires_grad_() for x in args)
    expected = gradients(linear, cast, grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="Dynamo of torch 2.11 cannot ask whether a device has autocast"
)
@pytest.mark.parametrize(
    ("partition", "expected"),
    [(default_partition, [2, 2]), (min_cut_rematerialization_partition, [3, 1])],
    ids=["default", "min cut"],
)
def test_compilers_see_through_it(partition: Any, expected: list[int]) -> None:
    """Four operands are rounded, once each: rows of x and W, rows of the gradient and columns of W. Inductor's
    partitioner rounds the latter in the forward, and keeps them."""
    rounded = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        casts = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
        rounded.append(sum(node.meta["val"].dtype == torch.float8_e4m3fn for node in casts))
        return make_boxed_func(graph)

    args = drawn(6, 16).requires_grad_(), drawn(32, 16, seed=1).requires_grad_(), drawn(32, seed=2).requires_grad_()
    grad, backend = drawn(6, 32, seed=3), aot_autograd(fw_compiler=counting, partition_fn=partition)
    compiled = torch.compile(module.fp8_linear, backend=backend, fullgraph=True)
    for one, other in zip(gradients(compiled, args, grad), gradients(module.fp8_linear, args, grad), strict=True):
        assert torch.equal(one, other)
    assert rounded == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_bounded_by_the_operands(dtype: torch.dtype) -> None:
    x, weight = drawn(30, 64, dtype=dtype), drawn(50, 64, seed=1, dtype=dtype)
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    error = (linear(x, weight).double() - exact).abs()
    # Half a step is 2⁻⁴ of either operand, or 2⁻¹⁰ of the scale of a subnormal one.
    subnormal = 2 * 64 * 2**-10 * (x.abs().amax() * weight.abs().amax()).double() / 448
    assert (error <= terms * (2 * 2**-4 + 2**-8) + subnormal + exact.abs() * torch.finfo(dtype).eps).all()
    assert error.mean() > 1e-3  # it is not the exact product


@pytest.mark.parametrize("implementation", [linear, module.fp8_linear])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row_and_zeros_give_the_bias(implementation: Any, bad: float) -> None:
    x, weight, bias = drawn(5, 16), drawn(6, 16, seed=1), drawn(6, seed=2)
    x[3] = 0
    clean = implementation(x, weight, bias)
    assert torch.equal(clean[3], bias)
    x[1, 7], weight[2, 3] = bad, bad
    spoilt = implementation(x, weight, bias)
    others = [0, 2, 3, 4]
    assert spoilt[1].isnan().all()
    assert spoilt[:, 2].isnan().all()
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[others][:, kept], clean[others][:, kept])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("implementation", [linear, module.fp8_linear])
def test_autocast_casts_what_it_casts_of_a_linear(implementation: Any, dtype: torch.dtype) -> None:
    args = drawn(2, 3, 16, dtype=dtype), drawn(8, 16, seed=1, dtype=dtype), drawn(8, seed=2, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, exact = implementation(*args), F.linear(*args)
    assert actual.dtype == exact.dtype
    assert torch.equal(actual, linear(*(x.to(exact.dtype) for x in args)))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_opcheck(with_bias: bool, lead: tuple[int, ...]) -> None:
    x, weight = drawn(*lead, 16).requires_grad_(), drawn(8, 16, seed=1).requires_grad_()
    bias = drawn(8, seed=2).requires_grad_() if with_bias else None
    opcheck(module.fp8_linear_op, (x, weight, bias))
    for implementation in (linear, module.fp8_linear):
        with torch.no_grad():
            assert not implementation(x, weight, bias).requires_grad
        (gradient,) = torch.autograd.grad(implementation(x, weight, bias).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((drawn(3, 15), drawn(8, 16)), ValueError, r"input has shape \(3, 15\), expected .* D = 16"),
        ((drawn(3, 16), drawn(8, 2, 16)), ValueError, "weight has shape"),
        ((drawn(3, 0), drawn(8, 0)), ValueError, r"weight has shape \(8, 0\)"),
        ((drawn(3, 16), drawn(0, 16)), ValueError, r"weight has shape \(0, 16\), expected .* at least 1"),
        ((drawn(3, 16).long(), drawn(8, 16).long()), TypeError, "input is torch.int64"),
        ((drawn(3, 16), drawn(8, 16).bfloat16()), TypeError, "weight is torch.bfloat16"),
        ((drawn(3, 16), drawn(8, 16), drawn(7)), ValueError, r"bias has shape \(7,\), expected \[O\] = \(8,\)"),
        ((drawn(3, 16), drawn(8, 16), drawn(8).double()), TypeError, "bias is torch.float64"),
    ],
)
def test_errors_name_the_argument(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cggr::fp8_linear: {message}"):
        linear(*args)


# The provider on torch._scaled_mm


def row_wise(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """What torch documents of `_scaled_mm` with a scale a row, by definition, for what CUDA takes."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.stride() == (a.shape[1], 1)
    assert b.stride() == (1, b.shape[0])
    assert options["scale_a"].shape == (a.shape[0], 1)
    assert options["scale_b"].shape == (1, b.shape[1])
    assert options["scale_a"].is_contiguous()
    assert options["scale_b"].is_contiguous()
    result = (a.double() @ b.double()) * options["scale_a"].double() * options["scale_b"].double()
    result = result if options["bias"] is None else result + options["bias"].double()
    return result.to(options["out_dtype"])


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    width=st.sampled_from([16, 32, 48]),
    outputs=st.sampled_from([16, 64]),
    layout=st.sampled_from(["dense", "reversed", "every other"]),
    weight_layout=st.sampled_from(["dense", "reversed", "every other"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_scaled_mm_hands_over_rows_scales_and_bias(
    lead: list[int], width: int, outputs: int, layout: str, weight_layout: str, with_bias: bool, seed: int
) -> None:
    x = LAYOUTS[layout](drawn(*lead, width, seed=seed, dtype=torch.bfloat16))
    weight = LAYOUTS[weight_layout](drawn(outputs, width, seed=seed + 1, dtype=torch.bfloat16))
    bias = drawn(outputs, seed=seed + 2, dtype=torch.bfloat16) if with_bias else None
    args = tuple(None if operand is None else operand.requires_grad_() for operand in (x, weight, bias))
    grad = LAYOUTS[layout](drawn(*lead, outputs, seed=seed + 3, dtype=torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", row_wise)
        actual, found = module.scaled_mm(*args), gradients(module.scaled_mm, args, grad)
    assert actual.dtype == torch.bfloat16
    assert_is_the_product(actual.detach(), *(None if operand is None else operand.detach() for operand in args))
    assert_are_the_gradients(found, args, grad)


@pytest.mark.parametrize("lead", [(), (7,), (2, 5)])
def test_scaled_mm_on_fakes_of_a_gpu(lead: tuple[int, ...]) -> None:
    """torch's own checks of sizes and strides, and the operator's fake."""
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    with FakeTensorMode():
        x, weight, bias = (torch.empty(*shape, **like) for shape in ((*lead, 32), (48, 32), (48,)))
        for found in (module.scaled_mm(x, weight, bias), linear(x, weight, bias), module.fp8_linear(x, weight, bias)):
            assert (found.shape, found.dtype) == ((*lead, 48), torch.bfloat16)
            assert found.stride() == torch.empty(*lead, 48, device="cuda").stride()
            assert found.device.type == "cuda"


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "is for CUDA, not cpu"),
        ("cuda", torch.float16, "gives bfloat16, not torch.float16"),
        ("cuda", torch.float32, "gives bfloat16, not torch.float32"),
    ],
)
def test_scaled_mm_says_where_it_cannot_run(device: str, dtype: torch.dtype, reason: str) -> None:
    place = torch.device(device), dtype
    assert choose("fp8_linear", *place).implementation is module.fp8_linear
    assert reason in passed_over("fp8_linear", Place(*place))["scaled_mm"]
    with pytest.raises(ValueError, match=f"fp8_linear: provider 'scaled_mm' is unavailable on .*{reason}"):
        choose("fp8_linear", *place, forced="scaled_mm")


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((8, 9), None, "compute capability 9.0"), ((9, 4), "6.0", "ROCm"), ((9, 0), None, None), ((10, 0), None, None)],
)
def test_scaled_mm_asks_for_the_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = passed_over("fp8_linear", Place(torch.device("cuda"), torch.bfloat16)).get("scaled_mm")
    assert found is None if reason is None else reason in found


def held_by_float8(*shape: int, seed: int) -> Tensor:
    """Rows of float8_e4m3fn's values with a 448, each times a power of two: no rounding of theirs is near a tie, which
    devices that divide differently decide differently."""
    x = (100 * drawn(*shape, seed=seed)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    x[..., seed] = 448.0
    return x * 2.0 ** torch.randint(-9, 9, (*shape[:-1], 1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("autocast", "compiled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("lead", "width", "outputs", "with_bias"),
    [((1,), 16, 16, True), ((3, 5), 64, 48, False), ((3, 5), 64, 48, True), ((2, 65), 512, 128, True)],
)
def test_scaled_mm_on_a_gpu(
    lead: tuple[int, ...], width: int, outputs: int, with_bias: bool, autocast: bool, transposed: bool, compiled: bool
) -> None:
    """Values and gradients, weights as a linear and as GPT-2 keep them; the tensor cores' sums keep fewer bits than
    fp32. Not compiled under autocast: inductor leaves out the rounding to bfloat16 between two operations that it
    fuses."""
    provider = choose("fp8_linear", torch.device("cuda"), torch.bfloat16)
    assert provider.name == "scaled_mm"
    dtype = torch.float32 if autocast else torch.bfloat16
    args = [held_by_float8(*lead, width, seed=0).to(dtype), exact_both_ways(outputs, width, seed=1).to(dtype)]
    args.append(drawn(outputs, seed=2, dtype=dtype) if with_bias else None)
    grad = held_by_float8(*lead, outputs, seed=3).bfloat16()
    run = torch.compile(provider.implementation) if compiled else provider.implementation
    x, table, bias = (None if operand is None else operand.cuda() for operand in args)
    operands = x, table.t().contiguous().t() if transposed else table, bias
    for operand in operands:
        if operand is not None:
            operand.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        actual, found = run(*operands), gradients(run, operands, grad.cuda())
    assert actual.dtype == torch.bfloat16
    rounded = tuple(None if x is None else x.bfloat16() for x in args)
    assert_is_the_product(actual.detach().cpu(), *rounded, sums=2**-10)
    assert [None if x is None else x.dtype for x in found] == [None if x is None else x.dtype for x in args]
    back = [None if x is None else x.cpu().bfloat16() for x in found]
    assert_are_the_gradients(back, rounded, grad, sums=2**-10)
