"""The Triton `select` against a sort of Python lists: under Triton's interpreter on the CPU, compiled on CUDA."""

from __future__ import annotations

import math

import pytest
import torch
from cggr_compile.kernels.reference import rows as reference
from cggr_compile.kernels.triton import select as module
from cggr_compile.kernels.triton.select import select
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
TINY = 1e-45  # the least positive float32, a denormal


@pytest.fixture(params=[4, 8192], ids=["several-blocks", "one-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK", request.param)
    return request.param


def truth(key: list[float], valid: list[bool], k: int) -> list[tuple[int, float]]:
    """The (index, weight) pairs by the definition."""
    selectable = [row for row in range(len(key)) if valid[row]]
    known = [row for row in selectable if not math.isnan(key[row])]
    ranked = sorted(known, key=lambda row: (-key[row], row)) + [row for row in selectable if math.isnan(key[row])]
    chosen = [(row, 1.0) for row in ranked[:k]]
    filler = (ranked[0] if ranked else 0, 0.0)
    return sorted(chosen + [filler] * (k - len(chosen)), key=lambda pair: (pair[0], -pair[1]))


def truths(key: Tensor, valid: Tensor, k: int) -> list[list[tuple[int, float]]]:
    rows = math.prod(key.shape[:-1])
    flat = zip(key.reshape(rows, -1).tolist(), valid.reshape(rows, -1).tolist(), strict=True)
    return [truth(*row, k) for row in flat]


def pairs(index: Tensor, weight: Tensor) -> list[list[tuple[int, float]]]:
    assert index.dtype == torch.int64
    assert weight.dtype == torch.float32
    assert index.is_contiguous()
    assert weight.is_contiguous()
    k = index.shape[-1]
    flat = zip(index.reshape(-1, k).tolist(), weight.reshape(-1, k).tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in flat]


def selected(key: Tensor, valid: Tensor, k: int) -> list[list[tuple[int, float]]]:
    index, weight = select(key.to(DEVICE), valid.to(DEVICE), k, "topk")
    assert index.shape == weight.shape == (*key.shape[:-1], k)
    return pairs(index, weight)


def draw(shape: tuple[int, ...], seed: int, values: int = 0, valid: float = 0.8) -> tuple[Tensor, Tensor]:
    """Normal keys, or integers below `values`, the greatest of them NaN; and a mask of that share."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(shape, generator=generator)
    if values:
        key = torch.randint(0, values, shape, generator=generator).float()
        key[key == values - 1] = NAN
    return key, torch.rand(shape, generator=generator) < valid


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("key", "valid", "k", "expected"),
    [
        ([0.1, 0.9, 0.5], [1, 1, 1], 2, [(1, 1), (2, 1)]),
        ([0.1, 0.9, 0.5], [1, 0, 1], 1, [(2, 1)]),
        ([0.5] * 9, [1] * 9, 6, [(row, 1) for row in range(6)]),
        ([0.1, 0.5, 0.5, 0.5, 0.7, 0.5, 0.5], [1] * 7, 5, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]),
        ([-0.0, 0.0, -0.0, 0.0, -0.0, 0.0], [1] * 6, 5, [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)]),
        ([-TINY, -0.0, 0.0, TINY], [1] * 4, 2, [(1, 1), (3, 1)]),
        ([NAN, 0.1, NAN, 0.2, NAN], [1] * 5, 2, [(1, 1), (3, 1)]),
        ([NAN, 0.1, NAN, -INF, NAN], [1] * 5, 4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        ([0.1, 0.9, 0.5, 0.9, 0.3], [1] * 5, 7, [(0, 1), (1, 1), (1, 0), (1, 0), (2, 1), (3, 1), (4, 1)]),
        ([INF, NAN, -INF, 1.0, INF], [1] * 5, 2, [(0, 1), (4, 1)]),
        ([NAN, 5.0, -INF, 1.0], [1, 0, 1, 0], 1, [(2, 1)]),
        ([1.0, -INF, NAN, -INF, -INF], [0, 1, 1, 1, 1], 2, [(1, 1), (3, 1)]),
        ([-INF, -3.4028235e38], [1, 1], 1, [(1, 1)]),
        ([INF, 3.4028235e38], [1, 1], 1, [(0, 1)]),
        ([0.1, 0.9, 0.5], [0, 0, 0], 2, [(0, 0), (0, 0)]),
        ([NAN] * 6, [1] * 6, 2, [(0, 1), (1, 1)]),
        ([NAN] * 6, [0, 0, 1, 0, 1, 0], 3, [(2, 1), (2, 0), (4, 1)]),
        ([0.1, 0.9], [1, 1], 4, [(0, 1), (1, 1), (1, 0), (1, 0)]),
        ([7.0], [1], 1, [(0, 1)]),
        ([7.0], [0], 1, [(0, 0)]),
        ([], [], 2, [(0, 0), (0, 0)]),
    ],
)
def test_named_cases(key: list[float], valid: list[int], k: int, expected: list[tuple[int, int]]) -> None:
    assert selected(torch.tensor(key), torch.tensor(valid, dtype=torch.bool), k) == [expected]


@pytest.mark.usefixtures("block")
@settings(max_examples=15)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([-INF, -1e30, -1.0, -TINY, -0.0, 0.0, TINY, 0.5, 1.0, 1e30, INF, NAN])
            | st.floats(width=32, allow_nan=True),
            st.booleans(),
        ),
        min_size=1,
        max_size=20,
    ),
    k=st.integers(1, 24),
)
def test_any_keys(rows: list[tuple[float, bool]], k: int) -> None:
    key, valid = [row[0] for row in rows], [row[1] for row in rows]
    assert selected(torch.tensor(key), torch.tensor(valid), k) == [truth(key, valid, k)]


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(), (2,), (1, 2)]),
    length=st.integers(1, 40),
    share=st.floats(0.0, 1.3),
    values=st.sampled_from([0, 2, 5, 40]),
    valid=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    block_size=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 2**20),
)
def test_rows_over_several_blocks_with_ties_across_them(
    shape: tuple[int, ...], length: int, share: float, values: int, valid: float, block_size: int, seed: int
) -> None:
    key, mask = draw((*shape, length), seed, values, valid)
    k = max(1, int(share * length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block_size)
        assert selected(key, mask, k) == truths(key, mask, k)


@pytest.mark.sample(5)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 70])
@pytest.mark.parametrize("values", [0, 3])
def test_k_of_one_of_all_and_of_more(length: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 32)
    key, valid = draw((2, length), seed=length, values=values)
    for k in {1, max(1, length // 2), length, length + 40}:
        assert selected(key, valid, k) == truths(key, valid, k)


@pytest.mark.parametrize("length", [8191, 8192, 20_000])
@pytest.mark.parametrize("values", [0, 50])
def test_long_rows_in_blocks_of_the_shipped_size(length: int, values: int) -> None:
    key, valid = draw((length,), seed=length, values=values)
    assert selected(key, valid, length // 4) == truths(key, valid, length // 4)


@pytest.mark.parametrize("last", [0, -1])
def test_threshold_at_either_end_of_the_range(last: int) -> None:
    # Bisection reaches -inf, or +inf, only in its last step.
    key = torch.full((40,), -INF if last else INF)
    key[7] = INF if last else -INF
    valid = torch.ones(40, dtype=torch.bool)
    assert selected(key, valid, 5) == truths(key, valid, 5)


def test_strided_expanded_and_leading_dimensions() -> None:
    scores = draw((6, 2, 3), seed=0)[0].permute(2, 1, 0)
    valid = torch.tensor([True, True, False, True, True, True]).expand(3, 2, 6)
    assert not scores.is_contiguous()
    assert selected(scores, valid, 4) == truths(scores, valid, 4)
    offset = torch.cat([torch.zeros(1), scores.flatten()])[1:]
    assert selected(offset, torch.ones(36, dtype=torch.bool), 9) == truths(offset, torch.ones(36), 9)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 0)])
def test_no_rows_of_scores(shape: tuple[int, ...]) -> None:
    index, weight = select(torch.zeros(shape, device=DEVICE), torch.ones(shape, device=DEVICE) > 0, 3, "topk")
    assert index.shape == weight.shape == (*shape[:-1], 3)


def test_no_scores_in_a_row() -> None:
    assert selected(torch.zeros(2, 0), torch.zeros(2, 0) > 0, 3) == [[(0, 0.0)] * 3] * 2


def test_random_ranks_by_noise_only_and_needs_it() -> None:
    scores = torch.tensor([9.0, NAN, 8.0, 0.0], device=DEVICE)
    valid = torch.ones(4, dtype=torch.bool, device=DEVICE)
    noise = torch.tensor([0.3, 0.9, 0.1, 0.7], device=DEVICE)
    assert pairs(*select(scores, valid, 2, "random", noise)) == [[(1, 1.0), (3, 1.0)]]
    with pytest.raises(ValueError, match="noise: "):
        select(scores, valid, 2, "random")


def test_unknown_rule_raises() -> None:
    with pytest.raises(ValueError, match="rule: got 'best'"):
        select(torch.zeros(3), torch.ones(3) > 0, 1, "best")


def test_a_rule_added_to_the_registry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.RANKINGS, "lowest", lambda scores, valid, noise: (-scores, valid))
    scores = torch.tensor([3.0, 1.0, 2.0], device=DEVICE)
    assert pairs(*select(scores, scores > 0, 2, "lowest")) == [[(1, 1.0), (2, 1.0)]]


def test_repeated_runs_are_equal_and_leave_the_inputs_alone() -> None:
    key, valid = (x.to(DEVICE) for x in draw((3, 300), seed=3, values=9))
    before = key.clone(), valid.clone()
    first = select(key, valid, 70, "topk")
    for _ in range(3):
        assert all(map(torch.equal, select(key, valid, 70, "topk"), first))
    assert torch.equal(key.nan_to_num(-1), before[0].nan_to_num(-1))
    assert torch.equal(valid, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 10_000), (1, 100_003), (700, 2048), (2, 2**20)])
@pytest.mark.parametrize("values", [0, 3])
def test_full_size_rows_on_cuda(shape: tuple[int, int], values: int) -> None:
    key, valid = draw(shape, seed=0, values=values)
    for k in (1, shape[1] // 4, shape[1]):
        # The reference on the CPU, which tests of its own hold to the list oracle.
        expected = reference.select(key, valid, k, "topk")
        actual = select(key.cuda(), valid.cuda(), k, "topk")
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(actual, expected, strict=True))
