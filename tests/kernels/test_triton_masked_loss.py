"""The Triton `masked_loss`, by either algorithm, against its derivative in float64 and no further from it than torch:
labels, gradients, layouts and options.

Under Triton's interpreter on the CPU, compiled on CUDA. The measure of `head_oracle` is used throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cggr_compile.kernels.triton import loss as loss_kernels
from head_oracle import (
    DEVICE,
    IGNORED,
    SHAPE,
    double,
    draw,
    loss_truth,
    small_tiles,  # noqa: F401  a fixture
    whole_blocks,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch.profiler import profile
from triton_loss import (
    ALGORITHMS,
    ROUNDINGS,
    assert_same,
    both,
    check,
    implementation,
    loss_of,
    one_tile,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

TRAINED = [names for size in range(3) for names in itertools.combinations(("hidden", "weight", "bias"), size)]


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


# Layouts and shapes.


@both
@pytest.mark.parametrize("layout", LAYOUTS)
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

    case = draw(300, 9, 19, torch.bfloat16, ignored=3)  # more rows than a GPU's tile
    expected = steps("triton_one_pass", case)  # in blocks of a tile
    whole_blocks(monkeypatch)
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass_small", 1)
    monkeypatch.setattr(loss_kernels.Exponentials, "unnormalized", counted)
    assert_same(steps("triton_one_pass_small", case), expected)
    assert len(blocks) > 1
    blocks.clear()
    steps("triton_one_pass", case)
    assert len(blocks) == 1


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
