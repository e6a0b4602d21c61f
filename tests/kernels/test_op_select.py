"""`cggr::select` against a sort of Python lists."""

from __future__ import annotations

import math

import pytest
import torch
from cggr_compile.kernels.op import select as select_op
from cggr_compile.kernels.reference import rows as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

INF, NAN = math.inf, math.nan


def select(*args: object) -> tuple[Tensor, Tensor]:
    return torch.ops.cggr.select(*args)


def truth(key: list[float], valid: list[bool], k: int) -> list[tuple[int, float]]:
    """The (index, weight) pairs by the definition."""
    selectable = [row for row in range(len(key)) if valid[row]]
    known = [row for row in selectable if not math.isnan(key[row])]
    ranked = sorted(known, key=lambda row: (-key[row], row)) + [row for row in selectable if math.isnan(key[row])]
    chosen = [(row, 1.0) for row in ranked[:k]]
    filler = (ranked[0] if ranked else 0, 0.0)
    return sorted(chosen + [filler] * (k - len(chosen)), key=lambda pair: (pair[0], -pair[1]))


def selected(key: list[float], valid: list[bool], k: int) -> list[tuple[int, float]]:
    index, weight = select(torch.tensor(key), torch.tensor(valid, dtype=torch.bool), k, "topk")
    assert index.dtype == torch.int64
    assert weight.dtype == torch.float32
    return list(zip(index.tolist(), weight.tolist(), strict=True))


@pytest.mark.parametrize(
    ("key", "valid", "k", "expected"),
    [
        ([0.1, 0.9, 0.5], [1, 1, 1], 2, [(1, 1), (2, 1)]),
        ([0.1, 0.9, 0.5], [1, 0, 1], 1, [(2, 1)]),
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2, [(0, 1), (1, 1)]),
        ([0.1, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2, [(1, 1), (2, 1)]),
        ([-0.0, 0.0, -0.0], [1, 1, 1], 2, [(0, 1), (1, 1)]),
        ([NAN, 0.1, NAN, 0.2], [1, 1, 1, 1], 2, [(1, 1), (3, 1)]),
        ([NAN, 0.1, NAN, -INF], [1, 1, 1, 1], 3, [(0, 1), (1, 1), (3, 1)]),
        ([INF, NAN, -INF, 1.0], [1, 1, 1, 1], 2, [(0, 1), (3, 1)]),
        ([NAN, 5.0, -INF, 1.0], [1, 0, 1, 0], 1, [(2, 1)]),
        ([1.0, -INF, NAN, -INF], [0, 1, 1, 1], 2, [(1, 1), (3, 1)]),
        ([0.1, 0.9, 0.5], [0, 0, 0], 2, [(0, 0), (0, 0)]),
        ([NAN, NAN], [1, 1], 2, [(0, 1), (1, 1)]),
        ([NAN, NAN, NAN], [0, 1, 0], 2, [(1, 1), (1, 0)]),
        ([0.1, 0.9, 0.5], [1, 1, 0], 3, [(0, 1), (1, 1), (1, 0)]),
        ([0.1, 0.9], [1, 1], 4, [(0, 1), (1, 1), (1, 0), (1, 0)]),
        ([7.0], [1], 1, [(0, 1)]),
        ([], [], 2, [(0, 0), (0, 0)]),
    ],
)
def test_named_cases(key: list[float], valid: list[int], k: int, expected: list[tuple[int, int]]) -> None:
    assert selected(key, [bool(flag) for flag in valid], k) == expected


rows = st.lists(
    st.tuples(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 1.0, 1e30, INF, NAN]), st.booleans()),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(rows=rows, k=st.integers(1, 24))
def test_any_keys_with_ties_nan_and_infinities(rows: list[tuple[float, bool]], k: int) -> None:
    key, valid = [row[0] for row in rows], [row[1] for row in rows]
    pairs = selected(key, valid, k)
    assert pairs == truth(key, valid, k)
    kept = [row for row, weight in pairs if weight == 1]
    assert len(pairs) == k
    assert len(kept) == len(set(kept)) == min(k, sum(valid))
    assert all(valid[row] for row in kept)


@settings(deadline=None)
@given(count=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_permutation_of_distinct_scores_permutes_the_selection(count: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(count, generator=generator).float()
    valid = torch.rand(count, generator=generator) < 0.7
    order = torch.randperm(count, generator=generator)
    index, weight = select(scores, valid, k, "topk")
    moved, moved_weight = select(scores[order], valid[order], k, "topk")
    assert sorted(order[moved[moved_weight == 1]].tolist()) == index[weight == 1].tolist()


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    count=st.integers(1, 12),
    k=st.integers(1, 14),
    rule=st.sampled_from(["topk", "random"]),
    seed=st.integers(0, 2**20),
)
def test_batched_equals_row_by_row(shape: list[int], count: int, k: int, rule: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, noise = (torch.randint(0, 5, (*shape, count), generator=generator).float() for _ in range(2))
    scores[scores == 4] = NAN
    valid = torch.rand((*shape, count), generator=generator) < 0.6
    index, weight = select(scores, valid, k, rule, noise)
    assert index.shape == weight.shape == (*shape, k)
    key = {"topk": scores, "random": noise}[rule]
    flat = zip(key.flatten(0, -2).tolist(), valid.flatten(0, -2).tolist(), strict=True)
    pairs = torch.stack([index.double(), weight.double()], -1).flatten(0, -3).tolist()
    assert pairs == [[list(pair) for pair in truth(*row, k)] for row in flat]


def test_random_ranks_by_noise_only() -> None:
    noise = torch.tensor([0.3, 0.9, 0.1, 0.7])
    index, weight = select(torch.tensor([9.0, NAN, 8.0, 0.0]), torch.ones(4, dtype=torch.bool), 2, "random", noise)
    assert index.tolist() == [1, 3]
    assert weight.tolist() == [1.0, 1.0]


def test_every_row_is_equally_likely_under_random() -> None:
    draws, rows, k = 4000, 8, 3
    noise = torch.rand(draws, rows, generator=torch.Generator().manual_seed(0))
    index, _ = select(noise * 0, torch.ones(draws, rows, dtype=torch.bool), k, "random", noise)
    share = torch.bincount(index.flatten(), minlength=rows) / draws
    # Five standard errors of a proportion 3/8 over 4000 draws.
    assert (share - k / rows).abs().max() < 5 * math.sqrt(3 / 8 * 5 / 8 / draws)


def test_strided_and_expanded_scores() -> None:
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).T
    valid = torch.tensor([True, True, False, True, True, True]).expand(3, 6)
    expected = select(scores.contiguous(), valid.contiguous(), 4, "topk")
    assert all(map(torch.equal, select(scores, valid, 4, "topk"), expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ties_go_to_the_lower_index_on_cuda() -> None:
    scores = torch.randint(0, 3, (4, 10_000), generator=torch.Generator().manual_seed(0)).float()
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.9
    index, weight = select(scores.cuda(), valid.cuda(), 5000, "topk")
    pairs = torch.stack([index.double(), weight.double()], -1).tolist()
    flat = zip(scores.tolist(), valid.tolist(), strict=True)
    assert pairs == [[list(pair) for pair in truth(*row, 5000)] for row in flat]


def test_a_rule_added_to_the_registry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.RANKINGS, "lowest", lambda scores, valid, noise: (-scores, valid))
    index, _ = select(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3, dtype=torch.bool), 2, "lowest")
    assert index.tolist() == [1, 2]


def test_reference_traces_with_symbolic_rows_and_k_and_runs_on_meta() -> None:
    def of(scores: Tensor, valid: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return reference.select(scores, valid, places.shape[0], "topk")

    traced = make_fx(of, tracing_mode="symbolic")(torch.randn(2, 6), torch.ones(2, 6, dtype=torch.bool), torch.ones(3))
    assert not any("local_scalar_dense" in str(node.target) for node in traced.graph.nodes)
    generator = torch.Generator().manual_seed(1)
    for count, k in ((9, 4), (3, 5)):
        args = (torch.randn(5, count, generator=generator), torch.rand(5, count, generator=generator) < 0.6)
        assert all(map(torch.equal, traced(*args, torch.ones(k)), of(*args, torch.ones(k))))
    # A meta tensor has no values: anything read back to the host would raise.
    index, weight = of(torch.empty(2, 6, device="meta"), torch.empty(2, 6, dtype=torch.bool, device="meta"), args[0])
    assert index.shape == weight.shape == (2, 5)


def test_compiles_once_for_every_k() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(scores: Tensor, valid: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return torch.ops.cggr.select(scores, valid, k, "topk")

    scores = torch.randn(7, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True] * 5 + [False] * 2)
    for k in (2, 4, 6):
        assert all(map(torch.equal, compiled(scores, valid, k), select(scores, valid, k, "topk")))
    assert len(graphs) == 1


def test_selection_carries_no_gradient() -> None:
    scores = torch.randn(5, requires_grad=True)
    index, weight = select(scores, torch.ones(5, dtype=torch.bool), 2, "random", torch.rand(5, requires_grad=True))
    assert not index.requires_grad
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("argument", "replacement", "error"),
    [
        ("scores", torch.zeros(()), ValueError),
        ("scores", torch.zeros(5, dtype=torch.bfloat16), TypeError),
        ("valid", torch.ones(4, dtype=torch.bool), ValueError),
        ("valid", torch.ones(5), TypeError),
        ("k", 0, ValueError),
        ("rule", "best", ValueError),
        ("noise", torch.zeros(2, 5), ValueError),
        ("noise", torch.zeros(5, dtype=torch.float64), TypeError),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_the_argument(argument: str, replacement: object, error: type[Exception], device: str) -> None:
    arguments = {
        "scores": torch.zeros(5),
        "valid": torch.ones(5, dtype=torch.bool),
        "k": 2,
        "rule": "topk",
        "noise": torch.zeros(5),
    } | {argument: replacement}
    arguments = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    with pytest.raises(error, match=f"cggr::select: {argument} "):
        select(*arguments.values())


def test_random_without_noise_raises() -> None:
    with pytest.raises(ValueError, match="noise: "):
        select(torch.zeros(5), torch.ones(5, dtype=torch.bool), 2, "random")


@pytest.mark.parametrize("shape", [(7,), (3, 7), (1, 1)])
@pytest.mark.parametrize(("k", "rule"), [(1, "topk"), (4, "random"), (9, "topk")])
def test_opcheck(shape: tuple[int, ...], k: int, rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    opcheck(select_op.select, (scores.requires_grad_(), noise > 0, k, rule, noise))
