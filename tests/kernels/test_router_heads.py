"""The router's cheap heads against float64 loops by definition, and samples against what they converge to."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from cggr_compile.kernels.op import router_heads as router_head_ops
from cggr_compile.kernels.reference import router_heads
from hypothesis import given, settings
from hypothesis import strategies as st
from router_head_oracle import IGNORED, OPTIONS, fp8_truth, logits, operands, sampled_truth
from torch import Tensor
from torch.library import opcheck

QUANTITIES = ["nll", "entropy", "margin", "confidence"]
SAMPLED = ["nll", "entropy"]
ops = torch.ops.cggr


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 7),
    width=st.integers(1, 6),
    classes=st.integers(1, 11),
    options=OPTIONS,
    with_bias=st.booleans(),
    ignored=st.integers(0, 2**7 - 1),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_shape_and_option(
    rows: int, width: int, classes: int, options: tuple, with_bias: bool, ignored: int, seed: int, data: st.DataObject
) -> None:
    hidden, weight, bias, target = operands(rows, width, classes, seed=seed)
    target[[bool(ignored >> row & 1) for row in range(rows)]] = IGNORED
    args = (hidden, weight, bias if with_bias else None, target)
    close = {"rtol": 1e-4, "atol": 1e-4}

    read = data.draw(st.integers(1, classes))
    columns = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[:read]
    times = 3 * torch.rand(read, generator=torch.Generator().manual_seed(seed))
    actual = ops.sampled_score(*args, columns, times, SAMPLED, *options).double()
    torch.testing.assert_close(actual, sampled_truth(args, columns, times, options), **close)

    actual = ops.fp8_score(*args, QUANTITIES, *options).double()
    torch.testing.assert_close(actual, fp8_truth(args, options), **close)


@pytest.mark.long
def test_inductor_compiles_the_sampled_head() -> None:
    args = operands(56, 64, 257, seed=0)
    columns, times = router_heads.sample_columns(args[3], torch.rand(1), 257, 16, 16)
    compiled = torch.compile(router_heads.sampled_score, fullgraph=True)
    actual = compiled(*args, columns, times, SAMPLED).double()
    truth = sampled_truth(args, columns, times)
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(1, 12),
    targets=st.lists(st.integers(-1, 11), max_size=12),
    frequent=st.integers(0, 8),
    sampled=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
def test_columns_are_the_most_frequent_and_then_a_systematic_sample(
    classes: int, targets: list[int], frequent: int, sampled: int, seed: int
) -> None:
    targets = [label if 0 <= label < classes else IGNORED for label in targets]
    noise = torch.rand(1, generator=torch.Generator().manual_seed(seed))
    columns, weight = ops.sample_columns(torch.tensor(targets, dtype=torch.int64), noise, classes, frequent, sampled)
    assert columns.dtype == torch.int64
    assert weight.dtype == torch.float32
    if frequent + sampled >= classes:
        assert columns.tolist() == list(range(classes))
        assert weight.tolist() == [1.0] * classes
        return
    counts = Counter(targets)
    top = sorted(range(classes), key=lambda label: (-counts[label], label))[:frequent]
    rest = sorted(set(range(classes)) - set(top))
    step, start = Fraction(classes - frequent, sampled), Fraction(noise.item())
    assert columns[:frequent].tolist() == sorted(top)
    assert columns[frequent:].tolist() == [rest[math.floor((j + start) * step)] for j in range(sampled)]
    torch.testing.assert_close(weight, torch.tensor([1.0] * frequent + [(classes - frequent) / sampled] * sampled))


def test_every_column_makes_the_sample_exact() -> None:
    args = operands()
    args[3][4] = IGNORED
    everything = ops.sample_columns(args[3], torch.rand(1), 13, 5, 8)
    torch.testing.assert_close(ops.sampled_score(*args, *everything, SAMPLED), ops.score(*args, SAMPLED))


@pytest.mark.parametrize(("frequent", "sampled"), [(0, 3), (4, 5), (11, 1)])
def test_z_is_unbiased_over_samples(frequent: int, sampled: int) -> None:
    args = operands(rows=5, classes=29)
    hidden, weight, bias, target = args
    x = logits(hidden, weight, bias)
    own = x.gather(1, target.unsqueeze(1))[:, 0]
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(500):
        columns = router_heads.sample_columns(target, torch.rand(1, generator=generator), 29, frequent, sampled)
        nll = router_heads.sampled_score(*args, *columns, ["nll"])[0].double()
        draws.append((nll + own).exp())
    samples = torch.stack(draws)
    error = (samples.mean(0) - x.exp().sum(1)).abs()
    assert (error <= 4.5 * samples.std(0) / math.sqrt(len(samples)) + 1e-4).all(), error
    assert (samples.std(0) > 0).any()


def test_nll_of_a_sample_is_never_negative() -> None:
    hidden, weight, _, target = operands(rows=40, classes=200)
    columns = ops.sample_columns(target, torch.rand(1), 200, 3, 3)
    assert (ops.sampled_score(20 * hidden, weight, None, target, *columns, ["nll"]) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_rows_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = (
        torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
        * 10.0 ** torch.arange(-3, 2).repeat(10)[:, None]
    )
    x = x.to(dtype)
    x[7] = 0
    values, scale = router_heads.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    back = values.double() * scale.double().unsqueeze(1)
    # Three bits of mantissa: half a step is 2⁻⁴ of a normal number, 2⁻¹⁰ of the scale of a subnormal one.
    bound = torch.maximum(x.double().abs() * 2**-4, scale.double().unsqueeze(1) * 2**-10)
    assert ((back - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(values.double().abs().amax(1)[x.abs().amax(1) > 0], torch.full((49,), 448.0).double())


def test_fp8_error_is_bounded_by_its_operands() -> None:
    args = operands(rows=30, width=64, classes=50)
    hidden, weight, _, _ = (x.double() for x in args)
    # |Δ(h·w)| ≤ Σ |h||w| (2·2⁻⁴ + 2⁻⁸) + subnormals; the nll moves by at most twice the largest |Δ|.
    product = (hidden.abs() @ weight.abs().T).amax(1) * (2 * 2**-4 + 2**-8)
    error = (ops.fp8_score(*args, ["nll"])[0] - ops.score(*args, ["nll"])[0]).abs()
    assert (error <= 2 * product + 1e-2).all()
    # Independent roundings add in squares: the expected error is far below that bound.
    expected = (2 * (hidden**2 @ (weight**2).T)).sqrt().mean() * 2**-4
    assert error.mean() <= expected


def calls(args: tuple, quantities: list[str] = SAMPLED) -> dict[str, Tensor]:
    """Every head on the same operands."""
    columns = ops.sample_columns(args[3], torch.rand(1, generator=torch.Generator().manual_seed(0)), 13, 4, 5)
    return {
        "sampled_score": ops.sampled_score(*args, *columns, quantities),
        "fp8_score": ops.fp8_score(*args, quantities),
    }


HEADS = ["sampled_score", "fp8_score"]


@pytest.mark.parametrize("head", HEADS)
def test_nan_stays_in_its_row_and_ignored_rows_hold_zero(head: str) -> None:
    args = operands()
    clean = calls(args)[head]
    args[0][3, 2] = math.nan
    args[0][5, 2] = math.nan
    args[3][5] = IGNORED
    actual = calls(args)[head]
    assert actual[:, 3].isnan().all()
    assert (actual[:, 5] == 0).all()
    if head != "sampled_score":  # another target changes which columns are frequent
        others = [0, 1, 2, 4, 6, 7, 8]
        torch.testing.assert_close(actual[:, others], clean[:, others])


@pytest.mark.parametrize("head", HEADS)
def test_autocast_casts_the_operands(head: str) -> None:
    args = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = calls(args)[head]
    low = tuple(x.bfloat16() if x.is_floating_point() else x for x in args)
    assert torch.equal(actual, calls(low)[head])


@pytest.mark.parametrize("bias", [True, False])
def test_the_lowered_sampled_reference_agrees_under_autocast(bias: bool) -> None:
    """The operator casts its operands and runs without autocast, its lowered reference runs in it: bitwise the same,
    but that a bias is added to the target's own logit in fp32 there and in bfloat16 here."""
    hidden, weight, offset, target = operands()
    args = (hidden, weight, offset if bias else None, target)
    columns = ops.sample_columns(target, torch.rand(1, generator=torch.Generator().manual_seed(0)), 13, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = router_heads.sampled_score(*args, *columns, SAMPLED)
        operator = ops.sampled_score(*args, *columns, SAMPLED)
    if not bias:
        assert torch.equal(lowered, operator)
        return
    # The sum and the bias, each rounded to bfloat16; |d nll / d x_t| = 1 - p_t <= 1.
    own, added = logits(hidden, weight, None).gather(1, target[:, None])[:, 0], offset[target]
    assert ((lowered - operator)[0].abs() <= (own.abs() + 2 * added.abs()) * 2**-8).all()
    assert not torch.equal(lowered, operator)


def test_the_lowered_fp8_reference_ignores_autocast() -> None:
    """It quantises what it is given: a product in the autocast dtype would round every logit."""
    args = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = router_heads.fp8_score(*args, QUANTITIES)
    assert torch.equal(lowered, ops.fp8_score(*args, QUANTITIES))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [(), (2.0, 3.0, 5.0, 1)])
def test_opcheck(bias: bool, options: tuple) -> None:
    hidden, weight, offset, target = operands()
    target[1] = 1
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), offset if bias else None, target)
    drawn = (target, torch.rand(1), 13, 4, 5)
    columns = ops.sample_columns(*drawn)
    opcheck(router_head_ops.sample_columns, drawn)
    opcheck(router_head_ops.sampled_score, (*leaves, *columns, SAMPLED, *options))
    opcheck(router_head_ops.fp8_score, (*leaves, QUANTITIES, *options))
    assert not any(result.requires_grad for result in calls(leaves).values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: ops.sample_columns(a[3], torch.rand(1), 13, 4, 0), ValueError, "sampled is 0"),
        (lambda a: ops.sample_columns(a[3].float(), torch.rand(1), 13, 4, 1), TypeError, "target is torch.float32"),
        (
            lambda a: ops.sampled_score(*a, torch.arange(3), torch.ones(2), ["nll"]),
            ValueError,
            "column_weight has shape",
        ),
        (lambda a: ops.sampled_score(*a, torch.arange(3), torch.ones(3), ["margin"]), ValueError, "quantities is"),
        (lambda a: ops.fp8_score(*a, []), ValueError, "quantities is"),
        (lambda a: ops.fp8_score(a[0], a[1][:, 1:], *a[2:], ["nll"]), ValueError, "weight has shape"),
    ],
)
def test_errors_name_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(operands())
