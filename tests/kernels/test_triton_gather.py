"""The Triton `gather` and its gradient against slices taken, and added, one at a time.

Under Triton's interpreter on the CPU, compiled on CUDA.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cggr_compile.kernels.triton import gather as module
from cggr_compile.kernels.triton.gather import gather, gather_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64]


@pytest.fixture(params=[16, 2048], ids=["small-tiles", "shipped-tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "TILE", request.param)
    return request.param


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def slices(x: Tensor, places: list[int], dim: int) -> Tensor:
    return torch.stack([x.select(dim, place) for place in places], dim)


def gathered(x: Tensor, places: list[int], dim: int, index_dtype: torch.dtype = torch.int64) -> Tensor:
    out = gather(x.to(DEVICE), torch.tensor(places, dtype=index_dtype, device=DEVICE), dim)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    return out.cpu()


def backward(grad: Tensor, places: list[int], dim: int, size: int, index_dtype: torch.dtype = torch.int64) -> Tensor:
    out = gather_backward(grad.to(DEVICE), torch.tensor(places, dtype=index_dtype, device=DEVICE), dim, size)
    assert out.dtype == grad.dtype
    assert out.is_contiguous()
    return out.cpu()


def added(grad: Tensor, places: list[int], dim: int, size: int) -> Tensor:
    shape = list(grad.shape)
    shape[dim] = size
    index = torch.tensor(places, dtype=torch.int64)
    return torch.zeros(shape, dtype=torch.float64).index_add(dim, index, grad.double())


def assert_sums(found: Tensor, grad: Tensor, places: list[int], dim: int, size: int) -> None:
    """Within one rounding to grad's dtype of a sum accumulated in float32, or float64."""
    exact = added(grad, places, dim, size)
    accumulator = torch.promote_types(grad.dtype, torch.float32)
    in_sum = len(places) * torch.finfo(accumulator).eps * added(grad.abs(), places, dim, size)
    # The interpreter rounds to half dtypes towards zero: a whole unit in the last place.
    rounding = torch.finfo(grad.dtype).eps * exact.abs() + torch.finfo(grad.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= in_sum + rounding).all()


@pytest.mark.usefixtures("tile")
@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    order=st.permutations(range(4)),
)
def test_values_of_any_shape_dtype_and_strides(
    shape: list[int],
    dim: int,
    rows: list[int],
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    order: list[int],
) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    order = [axis for axis in order if axis < len(shape)]
    inverse = [order.index(axis) for axis in range(len(shape))]
    x = draw(tuple(shape[axis] for axis in order), dtype).permute(inverse)
    places = [row % shape[dim] for row in rows]
    assert torch.equal(gathered(x, places, dim, index_dtype), slices(x, places, dim))


@pytest.mark.usefixtures("tile")
@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    size=st.integers(1, 6),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    dtype=st.sampled_from(FLOATS),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    reverse=st.booleans(),
)
def test_gradients_of_any_shape_dtype_and_strides(
    shape: list[int],
    dim: int,
    size: int,
    rows: list[int],
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    reverse: bool,
) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    shape[dim] = len(rows)
    grad = draw(tuple(reversed(shape)), dtype).permute(*reversed(range(len(shape)))) if reverse else draw(shape, dtype)
    places = [row % size for row in rows]
    assert_sums(backward(grad, places, dim, size, index_dtype), grad, places, dim, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_each_dtype_is_moved_bit_for_bit(dtype: torch.dtype, dim: int) -> None:
    x = draw((4, 3, 5), dtype)
    if dtype.is_floating_point:
        x[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    found, expected = gathered(x, [2, 0, 0, 1], dim), slices(x, [2, 0, 0, 1], dim)
    assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_distinct_rows_pass_their_gradient_unrounded(dtype: torch.dtype) -> None:
    grad = draw((2, 3, 5), dtype)
    found = backward(grad, [5, 0, 3], 1, 7)
    assert torch.equal(found, torch.zeros(2, 7, 5, dtype=dtype).index_copy(1, torch.tensor([5, 0, 3]), grad))


@pytest.mark.parametrize(("dtype", "big"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_half_dtypes_add_in_float32(dtype: torch.dtype, big: float) -> None:
    # big + 1 rounds to big: a running sum of that dtype would stay there.
    grad = torch.tensor([big, *[1.0] * 8], dtype=dtype)
    assert grad[0] + grad[1] == big
    assert backward(grad, [1] * 9, 0, 3).tolist() == [0.0, big + 8, 0.0]


def test_float64_adds_in_float64() -> None:
    grad = torch.tensor([1.0, 2.0**-40], dtype=torch.float64)
    assert backward(grad, [0, 0], 0, 1).tolist() == [1.0 + 2.0**-40]


def test_contributions_add_in_the_order_of_their_places() -> None:
    # float32 sums depend on the order: (2^24 + 1) + 1 stays at 2^24, (1 + 1) + 2^24 does not.
    big = 2.0**24
    assert backward(torch.tensor([big, 1.0, 1.0]), [2, 2, 2], 0, 4).tolist() == [0.0, 0.0, big, 0.0]
    assert backward(torch.tensor([1.0, 1.0, big]), [2, 2, 2], 0, 4).tolist() == [0.0, 0.0, big + 2, 0.0]


def test_repeated_runs_are_equal() -> None:
    grad, places = draw((50, 7)), [(place * place) % 11 for place in range(50)]
    first = backward(grad, places, 0, 11)
    assert all(torch.equal(backward(grad, places, 0, 11), first) for _ in range(3))


@pytest.mark.usefixtures("tile")
def test_expanded_transposed_and_offset_tensors() -> None:
    column = draw((6, 1))
    blocks = draw((4, 3, 2, 5)).permute(2, 3, 0, 1)
    offset = draw((7, 5))[1:, 1:]
    cases = [(column.expand(6, 4), 0), (column.expand(6, 4), 1), (blocks, 1), (blocks, 2), (offset, 0), (offset, 1)]
    for x, dim in cases:
        places = [x.shape[dim] - 1, 0, 1, 1]
        assert torch.equal(gathered(x, places, dim), slices(x, places, dim))
    grad = torch.tensor(2.0).expand(3, 4)
    assert torch.equal(backward(grad, [1, 1, 0], 0, 3), added(grad, [1, 1, 0], 0, 3).float())


def test_strided_index() -> None:
    x = draw((6, 3))
    index = torch.tensor([5, 9, 0, 9, 2, 9], device=DEVICE)[::2]
    assert torch.equal(gather(x.to(DEVICE), index, 0).cpu(), slices(x, [5, 0, 2], 0))
    assert torch.equal(gather_backward(x[:3].to(DEVICE), index, 0, 6).cpu(), backward(x[:3], [5, 0, 2], 0, 6))


@pytest.mark.parametrize(
    ("shape", "places", "dim"), [((4, 3), [], 0), ((0, 3), [], 0), ((4, 0), [1, 1], 0), ((0, 3), [2], 1)]
)
def test_zero_sizes(shape: tuple[int, ...], places: list[int], dim: int) -> None:
    out = gathered(torch.ones(shape), places, dim)
    expected = list(shape)
    expected[dim] = len(places)
    assert list(out.shape) == expected
    assert torch.equal(backward(out, places, dim, shape[dim]), torch.zeros(shape))


@pytest.mark.sample(8)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("inner", [1, 3, 8, 33])
def test_ragged_tiles(rows: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 32)
    x = draw((2, rows, inner))
    places = [(3 * place) % rows for place in range(rows)]
    assert torch.equal(gathered(x, places, 1), slices(x, places, 1))
    assert_sums(backward(x, places, 1, rows + 2), x, places, 1, rows + 2)


def test_wrong_dtypes_raise() -> None:
    index = torch.tensor([0])
    with pytest.raises(TypeError, match=r"x is torch\.complex128"):
        gather(torch.ones(2, dtype=torch.complex128), index, 0)
    with pytest.raises(TypeError, match=r"grad is torch\.int64"):
        gather_backward(torch.ones(1, dtype=torch.int64), index, 0, 2)


@pytest.mark.gpu
def test_offsets_beyond_32_bits_on_cuda() -> None:
    rows, width = 2**16 + 3, 2**15
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1], x[-2], x[0] = 5.0, 3.0, 1.0
    index = torch.tensor([rows - 1, 0, rows - 2, rows - 1], device="cuda")
    out = gather(x, index, 0)
    assert torch.equal(out, x.index_select(0, index))
    del x
    found = gather_backward(out, index, 0, rows)
    assert found.sum(1, dtype=torch.float64).nonzero().flatten().tolist() == [0, rows - 2, rows - 1]
    assert found[-1].unique().tolist() == [10.0]


@pytest.mark.gpu
@pytest.mark.parametrize("row", [4, -1])
def test_index_out_of_range_is_reported_on_cuda(row: int) -> None:
    # In a process of its own: a failed assertion ends the use of the device.
    code = (
        "import torch; from cggr_compile.kernels.triton.gather import gather; "
        f"gather(torch.ones(4, 3, device='cuda'), torch.tensor([{row}], device='cuda'), 0).sum().item()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert "index out of range" in ran.stderr
