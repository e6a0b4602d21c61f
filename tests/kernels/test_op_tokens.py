"""`cggr::gather_tokens` and `cggr::scatter_tokens` against indexing written out, token by token."""

from __future__ import annotations

import itertools

import cggr_compile.kernels.op.tokens  # noqa: F401  registers the operators
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

gather = torch.ops.cggr.gather_tokens
scatter = torch.ops.cggr.scatter_tokens


def positions_of(batch: int, length: int, kept: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(drawn)


@given(st.integers(1, 3), st.integers(1, 5), st.data())
def test_gather_takes_each_sequences_own_tokens_along_every_dimension(
    batch: int, length: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, length))
    lead = data.draw(st.integers(0, 2))
    shape = [data.draw(st.sampled_from([1, batch])), 2] if not lead else [2]
    dims = []
    for _ in range(data.draw(st.integers(1, 2))):
        dims.append(len(shape))
        shape.append(length)
    x = torch.randn(shape)
    positions = positions_of(batch, length, kept)
    result = gather(x, positions, dims, lead)
    broad = x.reshape([1] * lead + shape).expand(batch, *([1] * lead + shape)[1:])
    for row, places in enumerate(positions):
        expected = broad[row]
        for dim in dims:
            expected = torch.stack([expected.select(dim + lead - 1, int(p)) for p in places], dim + lead - 1)
        assert torch.equal(result[row], expected)


def test_scatter_puts_them_back_and_keeps_the_others() -> None:
    full, part, positions = torch.randn(3, 5, 2), torch.randn(3, 2, 2), positions_of(3, 5, 2)
    result = scatter(full, part, positions)
    for row, place in itertools.product(range(3), range(5)):
        found = (positions[row] == place).nonzero()
        expected = part[row, found[0, 0]] if len(found) else full[row, place]
        assert torch.equal(result[row, place], expected)
    assert scatter(full.bfloat16(), part, positions).dtype == torch.float32


@pytest.mark.parametrize(("shape", "dims", "lead"), [((2, 5, 3), [1], 0), ((1, 2, 5, 5), [2, 3], 0), ((5, 3), [0], 1)])
def test_gradients(shape: tuple[int, ...], dims: list[int], lead: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    positions = positions_of(2, 5, 3)
    assert torch.autograd.gradcheck(lambda x: gather(x, positions, dims, lead), x)
    full = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    part = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda full, part: scatter(full, part, positions), (full, part))


def test_registration() -> None:
    positions = positions_of(2, 5, 3)
    torch.library.opcheck(gather, (torch.randn(2, 1, 5, requires_grad=True), positions, [2], 0))
    torch.library.opcheck(scatter, (torch.randn(2, 5, 1, requires_grad=True), torch.randn(2, 3, 1), positions))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda p: gather(torch.zeros(2, 5), p[0], [1]), r"positions has shape \(3,\), expected \[B, k\]"),
        (lambda p: gather(torch.zeros(2, 5), p, [0]), r"dims is \[0\] for x of shape \(2, 5\) with lead 0"),
        (lambda p: gather(torch.zeros(2, 5, 4), p, [1, 2]), r"dims \[1, 2\] of x \(2, 5, 4\) differ in size"),
        (lambda p: gather(torch.zeros(3, 5), p, [1]), r"first dimension of 1 or of 2 as positions"),
        (lambda p: scatter(torch.zeros(2, 5, 1), torch.zeros(2, 4, 1), p), r"part has shape \(2, 4, 1\)"),
        (lambda p: scatter(torch.zeros(3, 5, 1), torch.zeros(2, 3, 1), p), r"full has shape \(3, 5, 1\)"),
    ],
)
def test_arguments_are_checked(call, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        call(positions_of(2, 5, 3))
