"""The Triton `masked_loss` where tiles, sums and logits are hardest: ragged tiles, many columns, far logits.

Under Triton's interpreter on the CPU, compiled on CUDA. The measure of `head_oracle` is used throughout.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.triton import loss as loss_kernels
from cggr_compile.kernels.triton import tiles
from head_oracle import (
    DEVICE,
    SHAPE,
    Case,
    double,
    draw,
    loss_truth,
    plain_loss,
    small_tiles,  # noqa: F401  a fixture
    whole_blocks,
)
from triton_loss import (
    HALF_UNIT,
    ROUNDINGS,
    both,
    check,
    loss_of,
    one_tile,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


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
