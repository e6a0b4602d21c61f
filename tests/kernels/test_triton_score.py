"""The Triton `score` against its definitions in float64, and no further from them than torch in the same dtype.

Under Triton's interpreter on the CPU, compiled on CUDA. The measure of `head_oracle` is used throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cggr_compile.kernels.triton import tiles
from head_oracle import (
    DEVICE,
    IGNORED,
    SHAPE,
    Case,
    assert_no_worse,
    double,
    draw,
    plain_score,
    score_truth,
    small_tiles,  # noqa: F401  a fixture
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor
from torch.torch_version import TorchVersion
from triton import __version__ as triton_version
from triton_score import QUANTITIES, check, named, of_logits, one_tile, score

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
ROWS_OF_NAN = pytest.mark.skipif(
    DEVICE.type == "cpu" and TorchVersion(triton_version) >= "3.8",
    reason="Triton 3.8's interpreter raises at rows of NaN",
)


# Tiles.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_work_done_once_per_tile_over_three_ragged_tiles_in_each_dimension(dtype: torch.dtype, bias: bool) -> None:
    check(draw(*SHAPE, dtype, bias=bias))


def test_work_done_once_per_tile_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three ragged tiles of kernels whose tiles are constants of 128: target logits, and the merging of slices.
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tiles, "FULL", (tiles.Tile(128, 64, 128, 4, 2),))
    check(draw(300, 300, 131))


@pytest.mark.parametrize("slots", [1, 9, 100])
def test_any_number_of_slices_of_the_vocabulary(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A slice of one tile, of several, and more processors than tiles.
    monkeypatch.setattr(tiles, "processors", lambda device: slots)
    check(draw(SHAPE[0], 9, 2 * SHAPE[2]))


@pytest.mark.parametrize("classes", [1, 15, 16, 33])
@pytest.mark.parametrize("level", [-60.0, 0.0])
def test_vocabulary_tail_is_masked_to_minus_infinity(classes: int, level: float) -> None:
    # Columns of zeros beyond the vocabulary would outweigh logits of -60, and join those of 0.
    found = score(of_logits(torch.full((3, classes), level)))
    margin = 1.0 if classes > 1 else 0.0
    expected = torch.tensor([math.log(classes), math.log(classes), margin, 1 / classes])
    torch.testing.assert_close(found.cpu(), expected[:, None].expand(4, 3), rtol=1e-6, atol=2e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on CUDA the test of real sizes does it")
def test_int64_offsets_into_a_weight_with_huge_rows() -> None:
    # Rows 2^27 elements apart, of which only the first are ever touched: virtual memory.
    stride = 2**27
    try:
        storage = torch.empty(19 * stride, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 5 GiB of virtual memory")
    case = one_tile(torch.bfloat16, ignored=0)
    apart = storage.as_strided(case.weight.shape, (stride, 1)).copy_(case.weight)
    assert torch.equal(score(case._replace(weight=apart)), score(case))


@pytest.mark.gpu
def test_int64_offsets_beyond_32_bits_on_cuda() -> None:
    classes, width = 151936, 16384
    assert classes * width > 2**31
    case = draw(70, 8, classes, torch.bfloat16, ignored=0)
    # Only the last columns are not zero, so the truth needs no others.
    wide = case._replace(hidden=F.pad(case.hidden, (width - 8, 0)), weight=F.pad(case.weight, (width - 8, 0)))
    found = dict(zip(QUANTITIES, score(wide), strict=True))
    assert_no_worse(found, plain_score(case), score_truth(case))


# Precision.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_over_a_large_vocabulary_is_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        for name in ("HALF", "FULL"):
            monkeypatch.setattr(tiles, name, (tiles.Tile(16, 256, 16, 4, 2),))
    classes = 4096 + 5
    case = draw(2, 1, classes, dtype, ignored=0)
    found = score(case._replace(hidden=case.hidden * 0, bias=case.bias * 0))
    torch.testing.assert_close(found[:2].cpu(), torch.full((2, 2), math.log(classes)), rtol=1e-6, atol=0)


def test_entropy_without_an_epsilon_bias_of_peaked_and_flat_rows() -> None:
    # The first class leads by g: with Σ (p + 1e-10) log(p + 1e-10) the entropy of large g would be off by V·1e-10·23.
    gaps = torch.tensor([0.0, 1.0, 5.0, 10.0, 14.0, 40.0, 90.0, 200.0])
    x = torch.zeros(8, 35)
    x[:, 0] = gaps
    found, truth = named(of_logits(x, torch.zeros(8, dtype=torch.long))), score_truth(of_logits(x))
    tail = 34 * (-gaps.double()).exp()
    expected = tail.log1p() + gaps * tail / (1 + tail)
    torch.testing.assert_close(truth.values["entropy"], expected)
    # Of a logit's size g only log Z and the mean's share are left: fp32 roundoff of those, not of g itself.
    torch.testing.assert_close(double(found["entropy"]), expected, rtol=1e-5, atol=4e-7)
    assert (found["entropy"] >= 0).all()
    assert (double(found["entropy"])[5:] < 1e-7).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_the_logits_moves_nothing_but_their_rounding(offset: float) -> None:
    # Multiples of 1/256 stay exact in fp32 at the offset; in units of log 2 their products round.
    x = (draw(1, 1, 19).weight.cpu().T * 256).round() / 256
    found, expected = named(of_logits(x + offset)), score_truth(of_logits(x)).values
    for name in ("entropy", "margin", "confidence"):
        torch.testing.assert_close(double(found[name]), expected[name], rtol=0, atol=1e4 * 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_logit_is_consistent_so_nll_is_never_negative(dtype: torch.dtype) -> None:
    # The target's logit comes from another kernel than the log-sum-exp that it dominates.
    case = draw(SHAPE[0], SHAPE[1], SHAPE[2], dtype, ignored=0)
    case.hidden.mul_(12)
    best = (case.hidden.float() @ case.weight.float().T + case.bias.float()).argmax(-1)
    found = check(case._replace(target=best))
    assert (found["nll"] >= 0).all()
    assert (found["nll"] < 1e-4).any()


# Margins.


@pytest.mark.parametrize("tied", [(0, 1), (0, 40), (15, 16), (3, 20, 40), (39, 40)])
@pytest.mark.parametrize("slots", [1, 9])
def test_margin_ties_within_and_across_tiles_are_exact(
    tied: tuple[int, ...], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles are of 16 classes; with 9 slots each has a slice of its own.
    monkeypatch.setattr(tiles, "processors", lambda device: slots)
    classes = 41 if DEVICE.type == "cpu" else 700
    bias = torch.zeros(classes, device=DEVICE)
    places = list(tied) if DEVICE.type == "cpu" else [place * 17 for place in tied]
    bias[places] = 40.0
    case = draw(3, 9, classes)
    found = score(case._replace(weight=case.weight * 0, bias=bias), ["margin", "confidence"])
    counted = case.target != IGNORED
    assert torch.equal(found[0], counted.float())
    torch.testing.assert_close(found[1], counted.float() / len(tied))


@pytest.mark.parametrize("first", [0, 16, 40])
@pytest.mark.parametrize("slots", [1, 9])
def test_margin_takes_the_runner_up_from_any_tile(first: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "processors", lambda device: slots)
    seconds = [place for place in (0, 1, 14, 15, 16, 17, 31, 32, 39, 40) if place != first]
    x = torch.zeros(len(seconds), 41)
    x[:, first] = 5.0
    x[range(len(seconds)), seconds] = 4.0
    check(of_logits(x))


# Labels.


@ROWS_OF_NAN
@pytest.mark.parametrize("ignore_index", [IGNORED, 3, -1])
def test_ignored_rows_are_zero_and_not_computed(ignore_index: int) -> None:
    case = draw(20, 9, 19, ignored=0)
    ignored = torch.arange(20, device=DEVICE) % 3 == 1
    case.target[case.target == ignore_index] = 4
    case.target[ignored] = ignore_index
    clean = check(case, ignore_index=ignore_index)
    case.hidden[ignored] = math.nan
    found = named(case, ignore_index=ignore_index)
    for name in QUANTITIES:
        assert (found[name][ignored] == 0).all()
        assert torch.equal(found[name], clean[name])


def test_all_labels_ignored() -> None:
    case = one_tile()
    case.hidden[2] = math.nan
    assert torch.equal(score(case._replace(target=case.target * 0 + IGNORED)), torch.zeros(4, 11, device=DEVICE))


@pytest.mark.parametrize("label", [19, 31, -1, 2**31, 2**33 + 3])
def test_label_out_of_range_makes_the_nll_of_its_row_nan(label: int) -> None:
    # 19 to 31 lie in the tail of the last tile; 2^33 + 3 is a valid label in 32 bits.
    case = one_tile(ignored=0)
    expected = score(case)
    case.target[4] = label
    found = score(case)
    assert found[0, 4].isnan()
    expected[0, 4] = found[0, 4] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_int32_and_narrower_labels(dtype: torch.dtype) -> None:
    case = one_tile()
    ignore_index = 255 if dtype == torch.uint8 else IGNORED
    case.target[case.target == IGNORED] = ignore_index
    narrow = case._replace(target=case.target.to(dtype))
    assert torch.equal(score(narrow, ignore_index=ignore_index), score(case, ignore_index=ignore_index))


# Logits.


@pytest.mark.parametrize(
    ("scale", "divisor", "softcap"), [(0.25, 1.0, 0.0), (1.0, 8.0, 0.0), (1.0, 1.0, 3.0), (6.0, 0.5, 2.0)]
)
def test_softcap_and_scale_in_this_order(scale: float, divisor: float, softcap: float) -> None:
    check(one_tile(), scale=scale, divisor=divisor, softcap=softcap)


@pytest.mark.parametrize("slots", [1, 9])
def test_minus_infinity_logits_contribute_nothing(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first tile holds nothing else, nor does the third.
    monkeypatch.setattr(tiles, "processors", lambda device: slots)
    case = draw(5, 8, 41, ignored=0)
    allowed = torch.tensor([16, 20, 27, 31], device=DEVICE)
    masked = torch.full_like(case.bias, -math.inf)
    masked[allowed] = case.bias[allowed]
    few = torch.arange(5, device=DEVICE) % 4
    found = score(case._replace(bias=masked, target=allowed[few]))
    alone = score(case._replace(weight=case.weight[allowed], bias=masked[allowed], target=few))
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    impossible = score(case._replace(bias=masked, target=torch.zeros_like(case.target)))
    assert (impossible[0] == math.inf).all()
    assert torch.equal(impossible[1:], found[1:])


@ROWS_OF_NAN
def test_one_finite_logit_is_certain() -> None:
    x = torch.full((3, 41), -math.inf)
    x[:, 20] = torch.tensor([0.0, -50.0, 300.0])
    found = score(of_logits(x, torch.full((3,), 20))._replace(hidden=torch.eye(3, device=DEVICE)))
    # 0 times -inf is NaN in the product itself: logits of -inf come from the bias.
    assert found.isnan().all()
    case = one_tile(ignored=0)
    bias = torch.full_like(case.bias, -math.inf)
    bias[17] = 3.0
    found = score(case._replace(bias=bias, target=case.target * 0 + 17))
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0], device=DEVICE)[:, None].expand(4, 11)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@ROWS_OF_NAN
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_plus_infinity_logits_give_nan_in_their_row_only(value: float) -> None:
    case = one_tile(ignored=0)
    case.weight[:, 2] = 0.0
    case.weight[7, 2] = 1.0
    clean = score(case)
    case.hidden[3, 2] = value
    case.weight[:, 2] = 1.0 if math.isinf(value) else case.weight[:, 2]
    case.hidden[[row for row in range(11) if row != 3], 2] = 0.0
    clean = score(case._replace(hidden=case.hidden.nan_to_num(0.0, 0.0, 0.0)))
    found = score(case)
    assert found[:, 3].isnan().all()
    others = [row for row in range(11) if row != 3]
    assert torch.equal(found[:, others], clean[:, others])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_plus_infinity_or_only_minus_infinity_logits_by_the_bias_give_nan(value: float) -> None:
    case = one_tile(ignored=0)
    case.bias[slice(None) if value == -math.inf else 5] = value
    assert score(case).isnan().all()


# Layouts and shapes.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_transposed_and_misaligned_inputs(layout: Callable[[Tensor], Tensor]) -> None:
    case = draw(11, 16, 19, torch.bfloat16)
    moved = case._replace(**{name: layout(x) for name, x in case._asdict().items() if x is not None})
    assert torch.equal(score(moved), score(case))


def test_expanded_inputs() -> None:
    case = one_tile(ignored=0)
    expanded = (
        case.hidden[:1].expand(11, 9),
        case.weight[:1].expand(19, 9),
        case.bias[:1].expand(19),
        case.target[:1].expand(11),
    )
    assert torch.equal(score(Case(*expanded)), score(Case(*(x.contiguous() for x in expanded))))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("classes", [1, 2, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_one_row_and_a_vocabulary_of_one_and_two(rows: int, classes: int, dtype: torch.dtype) -> None:
    check(draw(rows, 9, classes, dtype))


# Properties. Shrinking is left out: the interpreter takes half a second for a step of it.


@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    rows=st.integers(0, SHAPE[0] // 2 + 2),
    width=st.integers(1, SHAPE[1] // 2 + 2),
    classes=st.integers(1, SHAPE[2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.fixed_dictionaries(
        {
            "scale": st.sampled_from([1.0, 0.3, 2.0]),
            "divisor": st.sampled_from([1.0, 4.0]),
            "softcap": st.sampled_from([0.0, 1.5, 30.0]),
        }
    ),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    slots=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_and_option(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    options: dict[str, float],
    bias: bool,
    ignored: float,
    slots: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "processors", lambda device: slots)
        check(draw(rows, width, classes, dtype, ignored=ignored, bias=bias, seed=seed), **options)
