"""`cggr::masked_loss` and its backward against the derivative written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.reference import rows as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

IGNORED = -100
NAMES = ("hidden", "weight", "bias", "row_weight")


def masked_loss(*args: object) -> Tensor:
    return torch.ops.cggr.masked_loss(*args)


def float64(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def truth(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
) -> tuple[float, list[np.ndarray]]:
    """The loss and its gradients by hidden, weight, bias and row_weight, a row at a time.

    With p = softmax(x): d nll / d x = p - onehot(target); through x = c·tanh(a / c): · (1 - tanh²); through
    a = (h·W + b)·scale / divisor: · scale / divisor.
    """
    h, w = float64(hidden), float64(weight)
    b = np.zeros(len(w)) if bias is None else float64(bias)
    v = np.ones(len(h)) if row_weight is None else float64(row_weight)
    counted = [row for row, label in enumerate(target.tolist()) if label != ignore_index]
    amount = sum(v[row] for row in counted) if reduction == "mean" else 1.0
    share = 1 / amount if amount else 0.0
    loss, nll = 0.0, np.zeros(len(h))
    dh, dw, db, dv = np.zeros_like(h), np.zeros_like(w), np.zeros_like(b), np.zeros_like(v)
    for row in counted:
        a = (w @ h[row] + b) * scale / divisor
        x = softcap * np.tanh(a / softcap) if softcap else a
        lse = x.max() + math.log(np.exp(x - x.max()).sum())
        label = int(target[row])
        nll[row] = lse - x[label]
        dx = np.exp(x - lse)
        dx[label] -= 1
        da = dx * (1 - np.tanh(a / softcap) ** 2) if softcap else dx
        dz = da * scale / divisor * v[row] * share
        dh[row] = dz @ w
        dw += np.outer(dz, h[row])
        db += dz
        loss += v[row] * nll[row] * share
    for row in counted:
        # d (Σ v·nll / Σ v) / d v_i = (nll_i - loss) / Σ v.
        dv[row] = (nll[row] - (loss if reduction == "mean" else 0.0)) * share
    return loss, [dh, dw, db, dv]


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


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def assert_close_to_truth(args: tuple, options: tuple = (), tolerance: float = 2e-6) -> None:
    loss, gradients = with_gradients(masked_loss, *args, *options)
    expected, derivatives = truth(*args, *options)
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    present = [x is not None for x in (*args[:3], (*args, None)[4])]
    wanted = [d for d, there in zip(derivatives, present, strict=True) if there]
    for gradient, derivative in zip(gradients, wanted, strict=True):
        size = max(1.0, np.abs(derivative).max(initial=0.0))
        np.testing.assert_allclose(float64(gradient), derivative, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5, 3), (33, 17, 129)])
def test_error_is_at_most_that_of_same_dtype_torch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    args = operands(*shape, dtype)
    loss, gradients = truth(*args)
    actual, expected = with_gradients(masked_loss, *args), with_gradients(plain, *args)
    eps = torch.finfo(dtype).eps
    assert abs(actual[0].item() - loss) <= abs(expected[0].item() - loss) + eps * abs(loss)
    for found, same_dtype, derivative in zip(actual[1], expected[1], gradients[:3], strict=True):
        error, allowed = (np.abs(float64(x) - derivative).max() for x in (found, same_dtype))
        assert error <= allowed + eps * np.abs(derivative).max()


@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 16, 33), (64, 32, 1000), (257, 17, 301)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("function", [masked_loss, reference.masked_loss])
def test_mean_is_bitwise_that_of_cross_entropy(
    shape: tuple[int, int, int], with_bias: bool, function: Callable[..., Tensor]
) -> None:
    hidden, weight, bias, target = operands(*shape)
    args = (hidden, weight, bias if with_bias else None, target)
    actual = with_gradients(function, *args, grad=1.7)
    expected = with_gradients(lambda h, w, b, t: F.cross_entropy(F.linear(h, w, b).float(), t), *args, grad=1.7)
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("scale", "divisor", "softcap"),
    [(1.0, 1.0, 0.0), (0.25, 1.0, 0.0), (1.0, 8.0, 0.0), (1.0, 1.0, 3.0), (6.0, 0.5, 2.0)],
)
@pytest.mark.parametrize("row_weight", [None, weights()])
def test_scale_divisor_and_softcap_in_this_order(
    scale: float, divisor: float, softcap: float, reduction: str, row_weight: Tensor | None
) -> None:
    assert_close_to_truth((*operands(), row_weight), (scale, divisor, softcap, IGNORED, reduction), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_and_autograd_of_the_reference_agree_bitwise(dtype: torch.dtype) -> None:
    args = (*operands(dtype=dtype), weights(), 2.0, 3.0, 4.0, IGNORED, "mean")
    actual, expected = (with_gradients(function, *args, grad=0.3) for function in (masked_loss, reference.masked_loss))
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("row_weight", [None, weights()])
@pytest.mark.parametrize("with_bias", [True, False])
def test_all_rows_ignored_is_zero_and_connected(reduction: str, row_weight: Tensor | None, with_bias: bool) -> None:
    hidden, weight, bias, target = operands()
    args = (hidden, weight, bias if with_bias else None, target.fill_(IGNORED), row_weight)
    loss, gradients = with_gradients(masked_loss, *args, 1.0, 1.0, 2.0, IGNORED, reduction)
    assert loss.item() == 0
    assert loss.requires_grad
    assert len(gradients) == 2 + with_bias + (row_weight is not None)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("label", [11, -1, 2**31])
@pytest.mark.parametrize("row_weight", [None, weights()])
def test_label_out_of_range_raises(label: int, row_weight: Tensor | None) -> None:
    hidden, weight, bias, target = operands()
    target[2] = label
    with pytest.raises((IndexError, RuntimeError)):
        masked_loss(hidden, weight, bias, target, row_weight)


@pytest.mark.parametrize("ignore_index", [3, -1, 10])
def test_other_ignore_index(ignore_index: int) -> None:
    hidden, weight, bias, target = operands()
    target[target == IGNORED] = ignore_index
    target[0] = (ignore_index + 1) % 11
    assert_close_to_truth((hidden, weight, bias, target, None), (1.0, 1.0, 0.0, ignore_index))


def test_row_weights_of_zero_and_of_zero_sum() -> None:
    hidden, weight, bias, target = operands()
    some = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.0]).requires_grad_()
    assert_close_to_truth((hidden, weight, bias, target, some))
    for none in (torch.zeros(9), torch.where(target == IGNORED, 1.0, 0.0)):
        loss, gradients = with_gradients(masked_loss, hidden, weight, bias, target, none)
        assert loss.item() == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_row_weights_of_one_change_nothing() -> None:
    args = operands()
    for reduction in ("mean", "sum"):
        options = (1.0, 1.0, 0.0, IGNORED, reduction)
        weighted = with_gradients(masked_loss, *args, torch.ones(9), *options)
        unweighted = with_gradients(masked_loss, *args, None, *options)
        torch.testing.assert_close(weighted, unweighted)


@pytest.mark.parametrize("row_weight", [None, weights()])
def test_ignored_rows_with_any_finite_hidden_take_no_part(row_weight: Tensor | None) -> None:
    hidden, weight, bias, target = operands()
    other = hidden.detach().clone()
    other[target == IGNORED] = 1e3
    actual = with_gradients(masked_loss, other.requires_grad_(), weight, bias, target, row_weight)
    torch.testing.assert_close(actual, with_gradients(masked_loss, hidden, weight, bias, target, row_weight))
    assert (actual[1][0][target == IGNORED] == 0).all()


def test_minus_infinity_logits() -> None:
    hidden, weight, bias, target = operands()
    allowed = torch.tensor([0, 2, 3, 7])
    masked = torch.full((11,), -math.inf)
    masked[allowed] = bias.detach()[allowed]
    target = torch.randint(0, 4, (9,))
    loss, (by_hidden, by_weight) = with_gradients(masked_loss, hidden, weight, masked, allowed[target])
    few = (hidden, weight.detach()[allowed].requires_grad_(), masked[allowed], target)
    expected, (few_by_hidden, few_by_weight) = with_gradients(masked_loss, *few)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(by_hidden, few_by_hidden)
    torch.testing.assert_close(by_weight[allowed], few_by_weight)
    assert by_weight.count_nonzero() == few_by_weight.count_nonzero()
    assert masked_loss(hidden, weight, masked, torch.ones_like(target)).item() == math.inf


def test_nan_logits_give_nan() -> None:
    hidden, weight, bias, target = operands()
    with torch.no_grad():
        hidden[0, 3] = math.nan
    loss, (by_hidden, *_) = with_gradients(masked_loss, hidden, weight, bias, target)
    assert loss.isnan()
    assert by_hidden[0].isnan().all()
    assert by_hidden[1:].isfinite().all()


def test_gradient_of_the_true_class_survives_p_near_one_in_bf16() -> None:
    bias = torch.tensor([8.0, 0.0, 0.0], dtype=torch.bfloat16).requires_grad_()
    hidden, weight = torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16)
    masked_loss(hidden, weight, bias, torch.tensor([0])).backward()
    # p = 0.99933 rounds to 1 in bf16, where p - 1 would be 0.
    expected = math.exp(8) / (math.exp(8) + 2) - 1
    assert bias.grad is not None
    assert bias.grad[0].item() == pytest.approx(expected, rel=2**-8)


def test_bf16_loss_is_fp32_over_a_large_vocabulary() -> None:
    hidden, weight = torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(50_000, 1, dtype=torch.bfloat16)
    loss = masked_loss(hidden, weight, None, torch.tensor([0, 49_999]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(50_000), rel=1e-6)


def test_backward_twice_and_grad_output_other_than_one() -> None:
    args = (*operands(), weights())
    leaves = [args[0], args[1], args[2], args[4]]
    loss = masked_loss(*args)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for factor in (1.0, 2.5, -3.0):
        scaled = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        torch.testing.assert_close(scaled, tuple(gradient * factor for gradient in once))
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * gradient for gradient in once])


def test_double_backward_raises() -> None:
    hidden, weight, bias, target = operands()
    (first,) = torch.autograd.grad(masked_loss(hidden, weight, bias, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cggr.masked_loss_backward"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (("hidden", "weight", "bias", "row_weight"), 2),
        (("hidden",), 1),
        (("weight",), 1),
        (("bias",), 0),
        (("row_weight",), 0),
        (("hidden", "bias"), 1),
    ],
)
def test_frozen_inputs_cost_nothing(trained: tuple[str, ...], products: int) -> None:
    hidden, weight, bias, target = operands()
    args = dict(zip(NAMES, (hidden, weight, bias, weights()), strict=True))
    for name, x in args.items():
        x.requires_grad_(name in trained)
    loss = masked_loss(hidden, weight, bias, target, args["row_weight"])
    with profile() as events:
        loss.backward()
    # The recomputed logits are one addmm; each of hidden and weight adds one product.
    assert sum(event.count for event in events.key_averages() if event.key == "aten::mm") == products
    assert sum(event.count for event in events.key_averages() if event.key == "aten::addmm") == 1
    _, derivatives = truth(hidden, weight, bias, target, args["row_weight"])
    for name, derivative in zip(NAMES, derivatives, strict=True):
        gradient = args[name].grad
        assert (gradient is None) == (name not in trained)
        if gradient is not None:
            np.testing.assert_allclose(float64(gradient), derivative, rtol=0, atol=2e-6)


def test_everything_frozen_takes_no_gradient() -> None:
    hidden, weight, bias, target = operands()
    assert not masked_loss(hidden.detach(), weight.detach(), bias.detach(), target).requires_grad
    with torch.no_grad():
        assert not masked_loss(hidden, weight, bias, target).requires_grad


def test_strided_expanded_and_transposed_operands() -> None:
    hidden, weight, bias, target = (x.detach() for x in operands())
    row_weight = weights().detach()
    apart = [torch.stack([x, x], -1)[..., 0] for x in (hidden, weight, bias, target, row_weight)]
    transposed = [hidden.T.contiguous().T, weight.T.contiguous().T, bias, target, row_weight]
    expanded = [hidden[:1].expand(9, 8), weight, bias[:1].expand(11), target[:1].expand(9), row_weight[:1].expand(9)]
    for layout in (apart, transposed, expanded):
        for x in layout:
            x.requires_grad_(x.is_floating_point())
        assert_close_to_truth(tuple(layout))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_narrow_labels(dtype: torch.dtype) -> None:
    hidden, weight, bias, target = operands()
    actual = with_gradients(masked_loss, hidden, weight, bias, target.to(dtype))
    expected = with_gradients(masked_loss, hidden, weight, bias, target)
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("classes", [1, 11])
@pytest.mark.parametrize("weighted", [True, False])
def test_zero_rows_one_row_and_one_class(rows: int, classes: int, weighted: bool) -> None:
    assert_close_to_truth((*operands(rows, 8, classes), weights(rows) if weighted else None))


@settings(deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 7),
    classes=st.integers(1, 13),
    options=st.tuples(st.sampled_from([1.0, 0.3, 2.0]), st.sampled_from([1.0, 4.0]), st.sampled_from([0.0, 1.5, 30.0])),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    ignored=st.integers(0, 2**9 - 1),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_option(
    rows: int,
    width: int,
    classes: int,
    options: tuple[float, float, float],
    with_bias: bool,
    weighted: bool,
    ignored: int,
    reduction: str,
    seed: int,
) -> None:
    hidden, weight, bias, target = operands(rows, width, classes, seed=seed)
    target[[bool(ignored >> row & 1) for row in range(rows)]] = IGNORED
    args = (hidden, weight, bias if with_bias else None, target, weights(rows, seed) if weighted else None)
    assert_close_to_truth(args, (*options, IGNORED, reduction), 2e-5)


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(2, 40)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_low_precision_is_plain_torch_with_the_loss_in_fp32(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    args = operands(*shape, dtype, seed)
    actual = with_gradients(masked_loss, *args)
    expected = with_gradients(lambda h, w, b, t: F.cross_entropy(F.linear(h, w, b).float(), t), *args)
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))
