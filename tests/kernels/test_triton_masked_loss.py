"""The Triton `masked_loss`, by either algorithm, against its derivative in float64 and no further from it than torch.

Under Triton's interpreter on the CPU, compiled on CUDA. The measure of `head_oracle` is used throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.providers import choose
from cggr_compile.kernels.triton import loss as loss_kernels
from cggr_compile.kernels.triton import tiles
from head_oracle import (
    DEVICE,
    IGNORED,
    SHAPE,
    Case,
    check_loss,
    double,
    draw,
    loss_truth,
    plain_loss,
    shrink_tiles,
    step,
    whole_blocks,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.profiler import profile

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

ALGORITHMS = ["triton_one_pass", "triton_recompute"]
TRAINED = [names for size in range(3) for names in itertools.combinations(("hidden", "weight", "bias"), size)]
# Factors and sums that an algorithm rounds to the dtype: entries, scaled rows of hidden, the result.
ROUNDINGS = 3
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


def implementation(name: str, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return choose("masked_loss", DEVICE, dtype, name).implementation


def both(test: Callable) -> Callable:
    return pytest.mark.parametrize("algorithm", ALGORITHMS)(test)


def check(algorithm: str, case: Case, grad: float = 1.0, roundings: int = 0, **options: object) -> None:
    check_loss(implementation(algorithm, case.hidden.dtype), case, grad, roundings, **options)


def steps(algorithm: str, case: Case, grad: float = 1.0, **options: object) -> dict[str, Tensor]:
    return step(implementation(algorithm, case.hidden.dtype), case, grad, **options)


def loss_of(algorithm: str, case: Case, **options: object) -> Tensor:
    tensors = {"row_weight": case.row_weight, "rows": case.rows, "num_items": case.num_items}
    return implementation(algorithm, case.hidden.dtype)(*case[:4], **tensors, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def one_tile(dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """A case of two tiles at most in each dimension, for what does not depend on tiles."""
    return draw(11, 9, 19, dtype, **options)


# Tiles.


@pytest.mark.sample(4)
@both
@pytest.mark.parametrize("blocks", ["blocks of a tile", "one block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_work_done_once_per_tile_over_three_ragged_tiles_in_each_dimension(
    algorithm: str, blocks: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (algorithm, dtype) == ("triton_one_pass", torch.float16):
        pytest.skip("one_pass refuses float16; see the test of it")
    if blocks == "one block":
        whole_blocks(monkeypatch)
    check(algorithm, draw(*SHAPE, dtype, weighted=True), scale=2.0, softcap=5.0)
    if blocks == "one block":
        check(algorithm, draw(*SHAPE, dtype, seed=1))


@pytest.mark.sample(1)
@both
def test_work_done_once_per_tile_of_a_fixed_size(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three ragged tiles of kernels whose tiles are constants of at most 128: target logits, sums of columns, scores.
    whole_blocks(monkeypatch)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tiles, "FULL", (tiles.Tile(64, 64, 128, 4, 2),))
    check(algorithm, draw(131, 300, 131))


@pytest.mark.sample(6)
@both
@pytest.mark.parametrize("classes", [1, 15, 16, 33])
@pytest.mark.parametrize("level", [-60.0, 0.0])
def test_vocabulary_tail_is_masked_to_minus_infinity(algorithm: str, classes: int, level: float) -> None:
    # Columns of zeros beyond the vocabulary would outweigh logits of -60, and join those of 0.
    case = one_tile()
    case = case._replace(
        weight=torch.zeros(classes, 9, device=DEVICE),
        bias=torch.full((classes,), level, device=DEVICE),
        target=torch.arange(11, device=DEVICE) % classes,
    )
    found = steps(algorithm, case)
    assert found["loss"].item() == pytest.approx(math.log(classes), abs=1e-5)
    expected = loss_truth(case).values["bias"]
    torch.testing.assert_close(double(found["bias"]), expected, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_of_one_and_two(algorithm: str, classes: int, dtype: torch.dtype) -> None:
    check(algorithm, draw(11, 9, classes, dtype, weighted=True), roundings=ROUNDINGS)


@both
@pytest.mark.skipif(DEVICE.type == "cuda", reason="on CUDA the tests of real sizes do it")
def test_int64_offsets_into_a_block_with_huge_rows(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The block of exponentials gets rows of 2^27 elements, of which only the first are touched: virtual memory.
    stride = 2**27 + 8
    try:
        torch.empty(32, stride, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 8 GiB of virtual memory")
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass", 2**50)
    monkeypatch.setattr(loss_kernels, "RECOMPUTE_BYTES", 2**50)
    monkeypatch.setattr(loss_kernels, "aligned", lambda columns, x: stride)
    check(algorithm, draw(19, 9, 11, torch.bfloat16, ignored=0), roundings=ROUNDINGS)


@pytest.mark.gpu
@both
def test_int64_offsets_beyond_32_bits_on_cuda(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, classes = 16384, 64, 151936
    assert rows * classes > 2**31
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass", 2**40)
    monkeypatch.setattr(loss_kernels, "RECOMPUTE_BYTES", 2**40)
    case = draw(rows, width, classes, torch.bfloat16, ignored=0)
    found = steps(algorithm, case, reduction="sum")
    # A row's gradient by hidden is its own; of the weights' only a sum over all rows is known without them all.
    sample = torch.tensor([0, 1, 127, 128, 14134, 14135, rows - 2, rows - 1], device=DEVICE)
    few = case._replace(hidden=case.hidden[sample], target=case.target[sample])
    truth = loss_truth(few, reduction="sum")
    expected = truth.values["hidden"]
    error = (double(found["hidden"][sample]) - expected).abs()
    assert (error <= ROUNDINGS * HALF_UNIT[torch.bfloat16] * truth.terms["hidden"] + 1e-6 * truth.sizes["hidden"]).all()
    with torch.no_grad():
        total, (by_bias, terms) = 0.0, torch.zeros((2, classes), device=DEVICE, dtype=torch.float64)
        for part in range(0, rows, 1024):
            x = case.hidden[part : part + 1024].float() @ case.weight.float().T + case.bias.float()
            target = case.target[part : part + 1024]
            total += F.cross_entropy(x, target, reduction="sum").item()
            mass, hits = x.softmax(-1).sum(0, dtype=torch.float64), torch.bincount(target, minlength=classes)
            by_bias, terms = by_bias + mass - hits, terms + mass + hits
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)
    error = (found["bias"].double() - by_bias).abs()
    assert (error <= ROUNDINGS * HALF_UNIT[torch.bfloat16] * terms + 1e-6 * terms.amax()).all()


# Precision.


@both
@pytest.mark.parametrize("gap", [8.0, 12.0, 20.0])
def test_true_class_gradient_where_p_is_nearly_one_in_bf16(algorithm: str, gap: float) -> None:
    # From a gap of 6 on, p rounds to 1 in bf16, where p - 1 would be 0; from 17 on it does in fp32.
    case = one_tile(torch.bfloat16, ignored=0)
    case.hidden[:, 0] = 1.0
    case.hidden[:, 1:] *= 0.1
    case.weight[:, 0] = 0.0
    case.weight[5, 0] = gap
    case = case._replace(bias=torch.zeros_like(case.bias), target=torch.full((11,), 5, device=DEVICE))
    found, truth = steps(algorithm, case, reduction="sum"), loss_truth(case, reduction="sum").values
    # Relative to the value itself: the roundings of its factors and of the result.
    allowed = 2 * ROUNDINGS * HALF_UNIT[torch.bfloat16]
    assert found["bias"][5].item() == pytest.approx(truth["bias"][5].item(), rel=allowed)
    assert found["weight"][5, 0].item() == pytest.approx(truth["weight"][5, 0].item(), rel=allowed)
    torch.testing.assert_close(double(found["hidden"][:, 0]), truth["hidden"][:, 0], rtol=allowed, atol=0)


@pytest.mark.sample(1)
@both
def test_bf16_accumulation_over_a_large_vocabulary_is_fp32(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tiles, "HALF", (tiles.Tile(16, 32, 16, 4, 2),))
        monkeypatch.setattr(loss_kernels, "RECOMPUTE_BYTES", 1000)
    # More than 128 tiles of columns: what the tiles leave is itself summed by 64.
    classes = 4096 + 37
    case = Case(
        torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE),
        torch.ones(classes, 1, dtype=torch.bfloat16, device=DEVICE),
        None,
        torch.tensor([0, classes - 1], device=DEVICE),
    )
    case.weight[case.target] = -1.0
    found = steps(algorithm, case, reduction="sum")
    assert found["loss"].dtype == torch.float32
    assert found["loss"].item() == pytest.approx(2 * math.log(classes), rel=1e-6)
    # Thousands of terms of 1 / V: a bf16 sum of them ends at 2^-8 times the vocabulary's.
    expected = loss_truth(case, reduction="sum").values["hidden"]
    torch.testing.assert_close(double(found["hidden"]), expected, rtol=2**-7, atol=0)


@both
def test_bf16_accumulation_over_many_blocks_of_rows_is_fp32(algorithm: str) -> None:
    rows = 8 * SHAPE[0] // 2
    case = draw(rows, 4, 5, torch.bfloat16, ignored=0)
    ones = torch.ones_like(case.hidden)
    case = case._replace(hidden=ones, weight=torch.zeros_like(case.weight), bias=None, target=case.target * 0)
    found, truth = steps(algorithm, case, reduction="sum"), loss_truth(case, reduction="sum")
    torch.testing.assert_close(double(found["weight"]), truth.values["weight"], rtol=2**-7, atol=0)


@pytest.mark.sample(6)
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [58.0, 62.0, 90.0, 1000.0])
def test_overflow_of_a_target_far_below_the_largest_logit(algorithm: str, dtype: torch.dtype, gap: float) -> None:
    # Unnormalised exponentials reach e^gap; rows of this kind share their tile with ordinary ones.
    case = one_tile(dtype, ignored=0.1)
    case.bias[7] = gap
    case.target[::3] = 7
    check(algorithm, case, roundings=ROUNDINGS)


@both
def test_overflow_in_some_of_several_tiles(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_blocks(monkeypatch)
    case = draw(*SHAPE, ignored=0)
    case.hidden[-1] *= 60
    case.hidden[SHAPE[0] // 2] *= -90
    check(algorithm, case)
    check(algorithm, case, softcap=95.0)


# Labels.


@both
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "num_items"])
def test_all_labels_ignored_is_zero_connected_with_zero_gradients(
    algorithm: str, weighted: bool, reduction: str
) -> None:
    case = one_tile(weighted=weighted)
    items = torch.tensor(7.0, device=DEVICE) if reduction == "num_items" else None
    case = case._replace(target=torch.full_like(case.target, IGNORED), num_items=items)
    found = steps(algorithm, case, reduction=reduction, softcap=3.0)
    assert len(found) == 4 + weighted
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


@pytest.mark.sample(4)
@both
@pytest.mark.parametrize("label", [19, 31, -1, 2**31, 2**33 + 3])
def test_label_out_of_range_makes_the_loss_nan(algorithm: str, label: int) -> None:
    # 19 to 31 lie in the tail of the last tile; 2^33 + 3 is a valid label in 32 bits.
    case = one_tile(ignored=0)
    case.target[4] = label
    assert loss_of(algorithm, case).isnan()
    assert steps(algorithm, case, softcap=4.0, reduction="sum")["loss"].isnan()


@pytest.mark.sample(3)
@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_int32_and_narrower_labels(algorithm: str, dtype: torch.dtype) -> None:
    case = one_tile()
    ignore_index = 255 if dtype == torch.uint8 else IGNORED
    case.target[case.target == IGNORED] = ignore_index
    expected = steps(algorithm, case, ignore_index=ignore_index)
    narrow = case._replace(target=case.target.to(dtype))
    assert_same(steps(algorithm, narrow, ignore_index=ignore_index), expected)


@both
@pytest.mark.parametrize("ignore_index", [3, -1, 18])
def test_other_ignore_index(algorithm: str, ignore_index: int) -> None:
    case = one_tile()
    case.target[case.target == IGNORED] = ignore_index
    case.target[0] = 4
    check(algorithm, case, ignore_index=ignore_index)


# Gradients.


@both
def test_backward_twice_and_grad_output_other_than_one(algorithm: str) -> None:
    case = one_tile(weighted=True)
    leaves = case.leaves
    loss = implementation(algorithm)(
        leaves["hidden"], leaves["weight"], leaves["bias"], case.target, leaves["row_weight"]
    )
    wanted = list(leaves.values())
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    truth = loss_truth(case).values
    for gradient, name in zip(once, leaves, strict=True):
        torch.testing.assert_close(double(gradient), truth[name], rtol=1e-4, atol=1e-5)
    for factor in (1.0, -2.0, 0.25):
        again = torch.autograd.grad(loss * factor, wanted, retain_graph=True)
        assert all(torch.equal(x, factor * y) for x, y in zip(again, once, strict=True))
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert all(torch.equal(leaf.grad, 2 * y) for leaf, y in zip(wanted, once, strict=True))
    check(algorithm, one_tile(torch.bfloat16, weighted=True), grad=1e3, roundings=ROUNDINGS)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_non_uniform_grad_output_through_row_weight(algorithm: str, reduction: str) -> None:
    case = one_tile(weighted=True)
    case.row_weight[2:9] = torch.tensor([0.0, 100.0, 1e-3, -1.0, 2.0, 0.0, 7.0], device=DEVICE)
    check(algorithm, case, grad=-1.7, reduction=reduction)
    half = case._replace(row_weight=case.row_weight.bfloat16())
    assert steps(algorithm, half)["row_weight"].dtype == torch.bfloat16


@both
def test_row_weight_of_zero_takes_a_row_out(algorithm: str) -> None:
    case = one_tile(ignored=0, weighted=True)
    case.row_weight[:] = 1.0
    case.row_weight[::2] = 0.0
    without = case._replace(hidden=case.hidden[1::2], target=case.target[1::2], row_weight=None)
    found, expected = steps(algorithm, case), steps(algorithm, without)
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["weight"], expected["weight"])
    torch.testing.assert_close(found["hidden"][1::2], expected["hidden"])
    assert (found["hidden"][::2] == 0).all()
    none = steps(algorithm, case._replace(row_weight=torch.zeros_like(case.row_weight)))
    assert all((x == 0).all() for x in none.values())


@pytest.mark.sample(5)
@both
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_frozen_weight_frozen_hidden_and_frozen_bias_get_and_cost_no_gradient(
    algorithm: str, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_blocks(monkeypatch)
    case = one_tile(weighted=True)
    leaves = case.leaves
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in (*trained, "row_weight"))
    with profile() as events:
        loss = implementation(algorithm)(
            leaves["hidden"], leaves["weight"], leaves["bias"], case.target, leaves["row_weight"]
        )
        loss.backward()
    # The logits' product is a kernel's; each of hidden and weight adds one of the library's for its one block.
    products = sum(event.count for event in events.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert products == len({"hidden", "weight"} & set(trained))
    expected = steps(algorithm, case)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[name])


@both
def test_everything_frozen_takes_no_gradient(algorithm: str) -> None:
    case = one_tile()
    assert not loss_of(algorithm, case).requires_grad
    leaves = case.leaves
    with torch.no_grad():
        loss = implementation(algorithm)(*leaves.values(), case.target)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(loss_truth(case).values["loss"].item(), rel=1e-6)


# Logits.


@both
@pytest.mark.parametrize(
    ("scale", "divisor", "softcap"), [(0.25, 1.0, 0.0), (1.0, 8.0, 0.0), (1.0, 1.0, 3.0), (6.0, 0.5, 2.0)]
)
def test_softcap_and_scale_in_this_order(algorithm: str, scale: float, divisor: float, softcap: float) -> None:
    check(algorithm, one_tile(weighted=True), scale=scale, divisor=divisor, softcap=softcap)


@both
@pytest.mark.parametrize("softcap", [30.0, 50.0])
def test_softcap_of_logits_far_below_it_keeps_the_precision_of_fp32(algorithm: str, softcap: float) -> None:
    # 1 - 2 / (1 + e^2x) is off by a rounding of 1, not of x: times the soft-cap, as if the logits were that large.
    for seed in range(4):
        check(algorithm, draw(1, 1, 2, ignored=0, bias=False, seed=seed), softcap=softcap)


@both
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_minus_infinity_logits(algorithm: str, softcap: float) -> None:
    # Masked classes have no part, or are at -softcap: a whole tile of them first, then some of the others.
    case = one_tile(ignored=0)
    allowed = torch.tensor([0, 3, 4, 17, 18], device=DEVICE) if softcap == 0 else torch.arange(16, 19, device=DEVICE)
    bias = torch.full_like(case.bias, -math.inf)
    bias[allowed] = case.bias[allowed]
    few = torch.arange(11, device=DEVICE) % len(allowed)
    masked = case._replace(bias=bias, target=allowed[few])
    found = steps(algorithm, masked, softcap=softcap)
    if softcap:
        expected = loss_truth(masked, softcap=softcap).values
        for name in ("loss", "hidden", "weight", "bias"):
            torch.testing.assert_close(double(found[name]), expected[name], rtol=1e-5, atol=1e-6)
        return
    alone = steps(algorithm, case._replace(weight=case.weight[allowed], bias=bias[allowed], target=few))
    torch.testing.assert_close(found["loss"], alone["loss"])
    torch.testing.assert_close(found["hidden"], alone["hidden"])
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name][allowed], alone[name])
        assert found[name].count_nonzero() == alone[name].count_nonzero()


@both
@pytest.mark.parametrize("masked", [[5], [4, 5], [5, 12, 18]])
def test_minus_infinity_logit_of_a_target_is_an_infinite_loss(algorithm: str, masked: list[int]) -> None:
    case = one_tile(ignored=0)
    case.bias[masked] = -math.inf
    case.target[:] = 0
    case.target[6] = 5
    assert plain_loss(*case[:4]).item() == math.inf
    assert loss_of(algorithm, case).item() == math.inf
    assert steps(algorithm, case)["loss"].item() == math.inf


@both
def test_nan_logits_of_a_row_give_nan_there(algorithm: str) -> None:
    case = one_tile(ignored=0)
    case.hidden[3, 2] = math.nan
    found = steps(algorithm, case)
    assert found["loss"].isnan()
    assert found["hidden"][3].isnan().all()
    others = [row for row in range(11) if row != 3]
    torch.testing.assert_close(double(found["hidden"][others]), loss_truth(case).values["hidden"][others])


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_plus_infinity_logits_never_give_a_finite_loss(algorithm: str, value: float) -> None:
    for target in (5, 0):
        case = one_tile(ignored=0)
        case.bias[5] = value
        case.target[:] = target
        assert loss_of(algorithm, case).isnan()
        assert steps(algorithm, case)["loss"].isnan()
    case = one_tile(ignored=0)
    assert loss_of(algorithm, case._replace(bias=torch.full_like(case.bias, -math.inf))).isnan()


# Layouts and shapes.


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.dim() == 2 else x


def _every_other(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _misaligned(x: Tensor) -> Tensor:
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def _rows_apart(x: Tensor) -> Tensor:
    return F.pad(x, (0, 3))[..., : x.shape[-1]]


@both
@pytest.mark.parametrize("layout", [_transposed, _every_other, _misaligned, _rows_apart])
def test_strided_transposed_and_misaligned_inputs(algorithm: str, layout: Callable) -> None:
    case = draw(11, 16, 19, torch.bfloat16, weighted=True)
    moved = case._replace(**{name: layout(x) for name, x in case._asdict().items() if x is not None})
    assert_same(steps(algorithm, moved), steps(algorithm, case))


@both
def test_expanded_inputs(algorithm: str) -> None:
    case = one_tile(weighted=True)
    expanded = case._replace(
        hidden=case.hidden[:1].expand(11, 9),
        weight=case.weight[:1].expand(19, 9),
        bias=case.bias[:1].expand(19),
        target=case.target[:1].expand(11),
        row_weight=case.row_weight[:1].expand(11),
    )
    # Not bit for bit that of contiguous ones: a stride of 0 compiles to another order of summation.
    check(algorithm, expanded, roundings=ROUNDINGS)


@both
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_rows_and_one_row(algorithm: str, rows: int, weighted: bool, bias: bool) -> None:
    case = draw(rows, 9, 19, weighted=weighted, bias=bias)
    if rows:
        check(algorithm, case)
        return
    found = steps(algorithm, case)
    assert len(found) == 3 + bias + weighted
    assert all((x == 0).all() for x in found.values())
    none = one_tile()._replace(rows=torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert all((x == 0).all() for x in steps(algorithm, none).values())


# Options.


@both
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_rows_with_repeats_and_rows_never_read(algorithm: str, index_dtype: torch.dtype) -> None:
    case = draw(21, 9, 19, ignored=0)
    case.target[4] = IGNORED
    rows = torch.tensor([4, 20, 3, 3, 0, 20, 4, 3], dtype=index_dtype, device=DEVICE)
    per_row = torch.linspace(0.5, 2.0, 8, device=DEVICE)
    unread = torch.ones(21, dtype=torch.bool, device=DEVICE)
    unread[rows.long()] = False
    case.hidden[unread], case.target[unread] = math.nan, 10**9
    unclean = case._replace(rows=rows, row_weight=per_row)
    check(algorithm, unclean)
    assert (steps(algorithm, unclean)["hidden"][unread] == 0).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_reduction_num_items(algorithm: str, dtype: torch.dtype) -> None:
    items = torch.tensor(7, dtype=dtype, device=DEVICE)
    check(algorithm, one_tile(weighted=True)._replace(num_items=items), reduction="num_items", grad=3.0)


@both
def test_reductions_mean_and_sum(algorithm: str) -> None:
    for reduction, weighted in (("mean", True), ("mean", False), ("sum", False)):
        check(algorithm, one_tile(weighted=weighted), reduction=reduction)


def test_float16_picks_recompute_and_one_pass_refuses_it() -> None:
    case = one_tile(torch.float16)
    with pytest.raises(ValueError, match=r"'one_pass' does not apply: float16 .* use 'recompute'"):
        loss_of("triton_one_pass", case)
    assert_same(steps("triton", case), steps("triton_recompute", case))


def test_default_algorithm_is_one_pass_where_it_applies() -> None:
    case = one_tile()
    assert_same(steps("triton", case), steps("triton_one_pass", case))


def test_small_blocks_are_one_pass_in_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[slice] = []
    compute = loss_kernels.Exponentials.unnormalized

    def counted(self: object, *args: Any) -> None:
        blocks.append(args[-1])
        compute(self, *args)

    case = draw(300, 9, 19, torch.bfloat16, ignored=3)
    expected = steps("triton_one_pass", case)  # in blocks of a tile
    whole_blocks(monkeypatch)
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass_small", 1)
    monkeypatch.setattr(loss_kernels.Exponentials, "unnormalized", counted)
    assert_same(steps("triton_one_pass_small", case), expected)
    assert len(blocks) > 1
    blocks.clear()
    steps("triton_one_pass", case)
    assert len(blocks) == 1


# Dispatch.


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


@both
def test_fp64_scalars_compiled_with_aot_eager(algorithm: str) -> None:
    _compiled(algorithm, "aot_eager")


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


@both
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(algorithm: str, with_options: bool) -> None:
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
    opcheck(torch.ops.cggr_triton.masked_loss.default, (*loss, wanted, algorithm.removeprefix("triton_")))


# Properties. Shrinking is left out: the interpreter takes half a second for a step of it.


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    rows=st.integers(1, SHAPE[0] // 2 + 2),
    width=st.integers(1, SHAPE[1] // 2),
    classes=st.integers(1, SHAPE[2] // 2 + 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.fixed_dictionaries(
        {
            "scale": st.sampled_from([1.0, 0.3, 2.0]),
            "divisor": st.sampled_from([1.0, 4.0]),
            "softcap": st.sampled_from([0.0, 1.5, 30.0]),
            "reduction": st.sampled_from(["mean", "sum"]),
        }
    ),
    bias=st.booleans(),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    one_block=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_and_option_by_one_pass_and_recompute(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    options: dict[str, object],
    bias: bool,
    weighted: bool,
    ignored: float,
    one_block: bool,
    seed: int,
) -> None:
    case = draw(rows, width, classes, dtype, ignored=ignored, bias=bias, weighted=weighted, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if one_block:
            whole_blocks(patch)
        for algorithm in ALGORITHMS:
            if (algorithm, dtype) != ("triton_one_pass", torch.float16):
                check(algorithm, case, roundings=ROUNDINGS, **options)


@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    classes=st.integers(1, 20),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_selection_of_rows(rows: list[int], classes: int, weighted: bool, seed: int) -> None:
    case = draw(10, 5, classes, seed=seed)
    per_row = torch.linspace(0.1, 3.0, len(rows), device=DEVICE) if weighted else None
    case = case._replace(rows=torch.tensor(rows, device=DEVICE), row_weight=per_row)
    if not (case.target[case.rows] != IGNORED).any():
        case.target[rows[0]] = 0
    for algorithm in ALGORITHMS:
        check(algorithm, case, roundings=ROUNDINGS)
