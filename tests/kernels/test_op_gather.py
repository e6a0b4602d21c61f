"""`cggr::gather` against slices taken, and gradients added, one at a time."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels.op import gather as gather_op
from cggr_compile.kernels.reference import rows as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck


def gather(*args: object) -> Tensor:
    return torch.ops.cggr.gather(*args)


def slices(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return torch.stack([x.select(dim, row) for row in index.tolist()], dim)


def added(shape: torch.Size, index: Tensor, dim: int, grad: Tensor) -> Tensor:
    total = torch.zeros(shape, dtype=grad.dtype)
    for place, row in enumerate(index.tolist()):
        total.select(dim, row).add_(grad.select(dim, place))
    return total


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    reverse=st.booleans(),
)
def test_values_and_gradients(
    shape: list[int], dim: int, rows: list[int], dtype: torch.dtype, index_dtype: torch.dtype, reverse: bool
) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(rows))).to(dtype)
    x = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))) if reverse else x
    x.requires_grad_()
    index = torch.tensor([row % shape[dim] for row in rows], dtype=index_dtype)
    actual = gather(x, index, dim)
    assert torch.equal(actual, slices(x, index, dim))
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(actual, x, grad)
    # Each of the additions rounds a partial sum that is at most the sum of absolute values.
    error = (found.double() - added(x.shape, index, dim, grad.double())).abs()
    bound = added(x.shape, index, dim, grad.double().abs())
    assert (error <= len(rows) * torch.finfo(dtype).eps * bound).all()


def test_gradients_of_repeated_rows_add_up() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    gather(x, torch.tensor([1, 1, 3, 1]), 0).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0.0, 3.0, 0.0, 1.0]


def test_backward_twice_accumulates() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    out = gather(x, torch.tensor([2, 0]), 0)
    first = torch.autograd.grad(out, x, torch.full_like(out, 2.5), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x, torch.full_like(out, 2.5))[0], first)
    assert first[0].tolist() == [2.5] * 3


def test_gradcheck_to_second_order() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 2, 0])
    assert torch.autograd.gradcheck(lambda x: gather(x, index, 0) ** 2, x)
    assert torch.autograd.gradgradcheck(lambda x: gather(x, index, 0) ** 3, x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_and_masks(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (5, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.tensor([3, 0, 0])
    assert torch.equal(gather(x, index, 0), slices(x, index, 0))
    assert torch.equal(gather(x, index, -1), slices(x, index, -1))


def test_no_places_and_no_rows() -> None:
    nowhere = torch.empty(0, dtype=torch.int64)
    assert gather(torch.ones(4, 3), nowhere, 0).shape == (0, 3)
    assert gather(torch.ones(0, 3), nowhere, 0).shape == (0, 3)


def test_expanded_input() -> None:
    x = torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).expand(3, 4)
    index = torch.tensor([2, 1])
    assert torch.equal(gather(x, index, 0), slices(x, index, 0))


@pytest.mark.parametrize("row", [4, -5])
def test_index_out_of_range_raises(row: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        gather(torch.ones(4, 3), torch.tensor([row]), 0)


def test_frozen_input_takes_no_gradient() -> None:
    assert not gather(torch.ones(4, 3), torch.tensor([1]), 0).requires_grad


def test_reference_traces_with_symbolic_rows_and_runs_on_meta() -> None:
    traced = make_fx(lambda x, index: reference.gather(x, index, 1), tracing_mode="symbolic")(
        torch.randn(2, 5), torch.tensor([1, 3, 3])
    )
    x, index = torch.randn(3, 9), torch.tensor([8, 0])
    assert torch.equal(traced(x, index), slices(x, index, 1))
    assert reference.gather(x.to("meta"), index.to("meta"), 0).shape == (2, 9)


def test_compiles_forward_and_backward_with_dynamic_sizes() -> None:
    compiled = torch.compile(gather, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, places in ((4, [3, 3, 0]), (6, [5, 1])):
        x = torch.randn(rows, 3, requires_grad=True)
        index = torch.tensor(places)
        out = compiled(x, index, 0)
        grad = torch.randn(out.shape)
        assert torch.equal(out, slices(x, index, 0))
        torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], added(x.shape, index, 0, grad))


@pytest.mark.parametrize(
    ("argument", "replacement", "error"),
    [
        ("dim", 2, ValueError),
        ("dim", -3, ValueError),
        ("index", torch.zeros(2, 2, dtype=torch.int64), ValueError),
        ("index", torch.zeros(2), TypeError),
        ("index", torch.zeros(4, dtype=torch.bool), TypeError),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument(argument: str, replacement: object, error: type[Exception], device: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "index": torch.tensor([1]), "dim": 0} | {argument: replacement}
    arguments = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    with pytest.raises(error, match=f"cggr::gather: {argument} "):
        gather(*arguments.values())


@pytest.mark.parametrize(("shape", "dim"), [((5,), 0), ((5, 3), 0), ((2, 5, 3), -2), ((2, 3, 4, 5), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    opcheck(gather_op.gather, (torch.randn(shape, dtype=dtype, requires_grad=True), torch.tensor([4, 0, 0]), dim))
