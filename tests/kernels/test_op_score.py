"""`cggr::score` against float64 loops over rows and classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.op import score as score_op
from cggr_compile.kernels.reference import rows as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

QUANTITIES = ["nll", "entropy", "margin", "confidence"]
IGNORED = -100


def truth(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
) -> Tensor:
    """[4, N] float64, by the definitions: one row and one class at a time, in Python floats."""
    columns = []
    for row, label in zip(hidden.tolist(), target.tolist(), strict=True):
        if label == ignore_index:
            columns.append([0.0] * 4)
            continue
        x = []
        for number, classifier in enumerate(weight.tolist()):
            logit = math.fsum(a * b for a, b in zip(row, classifier, strict=True))
            logit = (logit + (0.0 if bias is None else bias[number].item())) * scale / divisor
            x.append(softcap * math.tanh(logit / softcap) if softcap else logit)
        peak = max(x)
        lse = peak + math.log(math.fsum(math.exp(logit - peak) for logit in x))
        p = [math.exp(logit - lse) for logit in x]
        first, second = (*sorted(p, reverse=True), 0.0)[:2]
        entropy = lse - math.fsum(q * logit for q, logit in zip(p, x, strict=True) if q > 0)
        columns.append([lse - x[label], entropy, 1 - (first - second), first])
    return torch.tensor(columns, dtype=torch.float64).reshape(-1, 4).T


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The same in torch's own functions, everything in the dtype of the inputs."""
    p = F.softmax(F.linear(hidden, weight, bias), -1)
    log_p = F.log_softmax(F.linear(hidden, weight, bias), -1)
    best = p.topk(2, -1).values
    nll = -log_p.gather(1, target[:, None])[:, 0]
    return torch.stack([nll, -(p * log_p).sum(-1), 1 - (best[:, 0] - best[:, 1]), best[:, 0]])


def operands(
    rows: int, width: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (classes, width), (classes,))
    )
    return hidden, weight, bias, torch.randint(0, classes, (rows,), generator=generator)


def score(*args: object) -> Tensor:
    return torch.ops.cggr.score(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7, 3), (17, 33, 129)])
def test_error_is_at_most_that_of_same_dtype_torch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    args = operands(*shape, dtype)
    expected = truth(*args)
    error = (score(*args, QUANTITIES) - expected).abs().amax(1)
    allowed = (plain(*args) - expected).abs().amax(1) + torch.finfo(dtype).eps * expected.abs().amax(1)
    assert (error <= allowed).all(), (error, allowed)


@pytest.mark.parametrize(
    ("scale", "divisor", "softcap"), [(0.25, 1.0, 0.0), (1.0, 8.0, 0.0), (1.0, 1.0, 3.0), (6.0, 0.5, 2.0)]
)
def test_scale_divisor_and_softcap_in_this_order(scale: float, divisor: float, softcap: float) -> None:
    args = operands(6, 8, 11)
    torch.testing.assert_close(
        score(*args, QUANTITIES, scale, divisor, softcap).double(),
        truth(*args, scale, divisor, softcap),
        rtol=1e-5,
        atol=1e-5,
    )


def test_softcap_rounds_as_gemma2_does() -> None:
    hidden, weight, _, _ = operands(6, 16, 11, torch.bfloat16)
    expected = F.linear(hidden, weight) / 30.0
    expected = torch.tanh(expected) * 30.0
    assert torch.equal(reference.logits(hidden, weight, softcap=30.0), expected)


def test_quantities_come_in_the_order_asked() -> None:
    args = operands(6, 8, 11)
    everything = score(*args, QUANTITIES)
    assert torch.equal(score(*args, ["confidence", "nll"]), everything[[3, 0]])


@pytest.mark.parametrize("ignore_index", [IGNORED, 3, -1])
def test_ignored_rows_hold_zero(ignore_index: int) -> None:
    hidden, weight, bias, target = operands(9, 8, 11)
    target[::2] = ignore_index
    actual = score(hidden, weight, bias, target, QUANTITIES, 1.0, 1.0, 0.0, ignore_index)
    torch.testing.assert_close(
        actual.double(), truth(hidden, weight, bias, target, ignore_index=ignore_index), rtol=1e-5, atol=1e-5
    )
    assert (actual[:, target == ignore_index] == 0).all()


def test_all_rows_ignored() -> None:
    hidden, weight, bias, target = operands(4, 8, 11)
    hidden[2] = math.nan
    assert torch.equal(score(hidden, weight, bias, target.fill_(IGNORED), QUANTITIES), torch.zeros(4, 4))


@pytest.mark.parametrize("label", [11, -1, 2**31])
def test_label_out_of_range_raises(label: int) -> None:
    hidden, weight, bias, target = operands(4, 8, 11)
    target[1] = label
    with pytest.raises((IndexError, RuntimeError)):
        score(hidden, weight, bias, target, ["nll"])


@pytest.mark.parametrize("tied", [(0, 1), (0, 10), (4, 5), (3, 6, 10)])
def test_margin_of_tied_classes_is_exactly_one(tied: tuple[int, ...]) -> None:
    hidden, weight, _, target = operands(3, 8, 11)
    bias = torch.zeros(11)
    bias[list(tied)] = 40.0
    actual = score(hidden, torch.zeros_like(weight), bias, target, ["margin", "confidence"])
    assert torch.equal(actual[0], torch.ones(3))
    torch.testing.assert_close(actual[1], torch.full((3,), 1 / len(tied)))


def test_minus_infinity_logits_contribute_nothing() -> None:
    hidden, weight, bias, target = operands(5, 8, 11)
    allowed = torch.tensor([0, 2, 3, 7])
    masked = torch.full((11,), -math.inf)
    masked[allowed] = bias[allowed]
    target = torch.randint(0, 4, (5,))
    torch.testing.assert_close(
        score(hidden, weight, masked, allowed[target], QUANTITIES),
        score(hidden, weight[allowed], bias[allowed], target, QUANTITIES),
    )
    impossible = score(hidden, weight, masked, torch.ones_like(target), QUANTITIES)
    assert torch.equal(impossible[0], torch.full((5,), math.inf))


def test_nan_logits_give_nan_in_their_row_only() -> None:
    hidden, weight, bias, target = operands(5, 8, 11)
    clean = score(hidden, weight, bias, target, QUANTITIES)
    hidden[3, 2] = math.nan
    actual = score(hidden, weight, bias, target, QUANTITIES)
    assert actual[:, 3].isnan().all()
    others = [0, 1, 2, 4]
    torch.testing.assert_close(actual[:, others], clean[:, others])


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_costs_no_precision(offset: float) -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, -3.0]])
    shifted = score(torch.ones(1, 1), (x + offset).T, None, torch.tensor([1]), QUANTITIES)
    torch.testing.assert_close(
        shifted.double(), truth(torch.ones(1, 1), x.T, None, torch.tensor([1])), rtol=1e-5, atol=1e-5
    )


def test_strided_expanded_and_transposed_operands() -> None:
    hidden, weight, bias, target = operands(6, 8, 11)
    expected = score(hidden, weight, bias, target, QUANTITIES)
    apart = [torch.stack([x, x], -1)[..., 0] for x in (hidden, weight, bias, target)]
    torch.testing.assert_close(score(*apart, QUANTITIES), expected)
    transposed = (hidden.T.contiguous().T, weight.T.contiguous().T, bias, target)
    torch.testing.assert_close(score(*transposed, QUANTITIES), expected)
    one = (hidden[:1].expand(6, 8), weight, bias[:1].expand(11), target[:1].expand(6))
    torch.testing.assert_close(score(*one, QUANTITIES), score(*(x.contiguous() for x in one), QUANTITIES))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_narrow_labels(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = operands(6, 8, 11)
    target[2] = IGNORED
    expected = score(hidden, weight, bias, target, QUANTITIES)
    assert torch.equal(score(hidden, weight, bias, target.to(dtype), QUANTITIES), expected)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("classes", [1, 2, 11])
def test_zero_rows_one_row_and_one_class(rows: int, classes: int) -> None:
    args = operands(rows, 8, classes)
    torch.testing.assert_close(score(*args, QUANTITIES).double(), truth(*args), rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = operands(23, 8, 11)
    args[3][5] = IGNORED
    whole = score(*args, QUANTITIES)
    seen = []
    linear = reference.logits
    monkeypatch.setattr(reference, "logits", lambda hidden, *rest: seen.append(len(hidden)) or linear(hidden, *rest))
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 50)
    torch.testing.assert_close(score(*args, QUANTITIES), whole)
    assert seen == [4, 4, 4, 4, 4, 3]
    assert score(*operands(0, 8, 11), QUANTITIES).shape == (4, 0)


def test_bf16_statistics_are_fp32_over_a_large_vocabulary() -> None:
    hidden, weight, bias, target = operands(2, 1, 50_000, torch.bfloat16)
    actual = score(hidden * 0, weight, bias * 0, target, QUANTITIES)
    torch.testing.assert_close(actual[:2], torch.full((2, 2), math.log(50_000)), rtol=1e-5, atol=0)


def test_result_carries_no_gradient() -> None:
    hidden, weight, bias, target = operands(4, 8, 11)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for function in (score, reference.score):
        actual = function(*leaves, target, QUANTITIES)
        assert not actual.requires_grad
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("function", [score, reference.score])
def test_autocast_casts_the_linear_and_leaves_the_weight_cache_alone(function: object) -> None:
    hidden, weight, bias, target = operands(4, 8, 11)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            actual = function(hidden, weight, bias, target, QUANTITIES)
        F.linear(hidden, weight, bias).sum().backward()
    low = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    assert torch.equal(actual, score(*low, target, QUANTITIES))
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_autocast_is_part_of_a_traced_call() -> None:
    args = operands(4, 8, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = score(*args, QUANTITIES)
        traced = make_fx(lambda *args: score(*args, QUANTITIES), tracing_mode="symbolic")(*args)
    assert torch.equal(traced(*args), expected)


def test_reference_traces_with_symbolic_rows_and_runs_on_meta() -> None:
    def of(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return reference.score(hidden, weight, bias, target, QUANTITIES)

    traced = make_fx(of, tracing_mode="symbolic")(*operands(5, 8, 11))
    other = operands(9, 8, 13)
    torch.testing.assert_close(traced(*other), of(*other))
    # A meta tensor has no values: anything read back to the host would raise.
    assert of(*(x.to("meta") for x in other)).shape == (4, 9)


def test_compiles_with_dynamic_rows() -> None:
    compiled = torch.compile(lambda *args: score(*args, QUANTITIES), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 9):
        args = operands(rows, 8, 11)
        assert torch.equal(compiled(*args), score(*args, QUANTITIES))


@pytest.mark.parametrize(
    ("argument", "replacement", "error"),
    [
        ("hidden", torch.zeros(2, 4, 8), ValueError),
        ("hidden", torch.zeros(4, 8, dtype=torch.int64), TypeError),
        ("weight", torch.zeros(11, 9), ValueError),
        ("weight", torch.zeros(11), ValueError),
        ("weight", torch.zeros(11, 8, dtype=torch.float64), TypeError),
        ("bias", torch.zeros(10), ValueError),
        ("bias", torch.zeros(11, dtype=torch.bfloat16), TypeError),
        ("target", torch.zeros(5, dtype=torch.int64), ValueError),
        ("target", torch.zeros(4), TypeError),
        ("quantities", ["nll", "surprise"], ValueError),
        ("quantities", [], ValueError),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument(argument: str, replacement: object, error: type[Exception], device: str) -> None:
    names = ("hidden", "weight", "bias", "target", "quantities")
    arguments = dict(zip(names, (*operands(4, 8, 11), ["nll"]), strict=True)) | {argument: replacement}
    arguments = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    with pytest.raises(error, match=f"cggr::score: {argument} "):
        score(*arguments.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(["nll"],), (QUANTITIES, 2.0, 3.0, 5.0, 1)])
def test_opcheck(bias: bool, dtype: torch.dtype, options: tuple) -> None:
    hidden, weight, offset, target = operands(6, 8, 11, dtype)
    target[1] = 1
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), offset if bias else None]
    opcheck(score_op.score, (*leaves, target, *options))


@settings(deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 7),
    classes=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.tuples(st.sampled_from([1.0, 0.3, 2.0]), st.sampled_from([1.0, 4.0]), st.sampled_from([0.0, 1.5, 30.0])),
    with_bias=st.booleans(),
    ignored=st.integers(0, 2**9 - 1),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_and_option(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    options: tuple[float, float, float],
    with_bias: bool,
    ignored: int,
    seed: int,
) -> None:
    hidden, weight, bias, target = operands(rows, width, classes, dtype, seed)
    target[[bool(ignored >> row & 1) for row in range(rows)]] = IGNORED
    args = (hidden, weight, bias if with_bias else None, target)
    actual = score(*args, QUANTITIES, *options).double()
    # A logit is off by a few roundings of the sum of its absolute terms M; a statistic by at most (1 + M) times that.
    size = (hidden.double().abs() @ weight.double().abs().T + bias.double().abs()) * options[0] / options[1]
    bound = 1 + (size.max().item() if rows else 0.0)
    tolerance = 8 * torch.finfo(dtype).eps * bound**2
    torch.testing.assert_close(actual, truth(*args, *options), rtol=0, atol=tolerance)
