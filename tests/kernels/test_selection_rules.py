"""Every selection rule against a definition in Python lists and fractions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from cggr_compile.kernels.reference import selection
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

INF, NAN = math.inf, math.nan
examples = settings(max_examples=30, deadline=None)

Row = tuple[float, bool, float]
scores_with_traps = st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.5, 1.0, 3.0, 1e30, INF, NAN])
# Few values, so that noise ties too.
row = st.tuples(scores_with_traps, st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
rows_of = st.lists(row, max_size=20)


def tensors(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    scores, valid, noise = ([row[part] for row in rows] for part in range(3))
    return torch.tensor(scores), torch.tensor(valid, dtype=torch.bool), torch.tensor(noise)


def by_score(rows: list[Row]) -> list[int]:
    """The rows of known score, hardest first."""
    return sorted((i for i, (x, ok, _) in enumerate(rows) if ok and not math.isnan(x)), key=lambda i: (-rows[i][0], i))


def unknown(rows: list[Row]) -> list[int]:
    """The valid rows of score NaN, which complete a selection that the others cannot fill."""
    return [i for i, (x, ok, _) in enumerate(rows) if ok and math.isnan(x)]


def topk_order(rows: list[Row], k: int) -> list[int]:
    return by_score(rows) + unknown(rows)


def random_order(rows: list[Row], k: int) -> list[int]:
    return sorted((i for i, row in enumerate(rows) if row[1]), key=lambda i: (-rows[i][2], i))


def strata_of(rows: list[Row], num_strata: int) -> dict[int, int]:
    ranked = by_score(rows)
    return {i: place * num_strata // len(ranked) for place, i in enumerate(ranked)}


def stratified_order(rows: list[Row], k: int, num_strata: int = 4) -> list[int]:
    """One row at a time, to the stratum whose claim share / (2 · taken + 1) is largest (Webster), of known rows."""
    left = {h: [i for i in random_order(rows, k) if strata_of(rows, num_strata).get(i) == h] for h in range(num_strata)}
    taken: Counter[int] = Counter()
    order = []
    while any(left.values()):
        claims = {h: Fraction(num_strata - h, 2 * taken[h] + 1) for h in left if left[h]}
        stratum = max(claims, key=lambda h: (claims[h], -h))
        taken[stratum] += 1
        order.append(left[stratum].pop(0))
    return order


def trimmed_order(rows: list[Row], k: int, tau: float = 0.05, epsilon: float = 0.1) -> list[int]:
    ranked = by_score(rows)
    cut = math.floor(tau * len(ranked) + 1e-9)
    outliers, others = ranked[:cut], ranked[cut:]
    hard = others[: k - math.floor(epsilon * k + 1e-9)]
    drawn = [i for i in random_order(rows, k) if i in others and i not in hard]
    return hard + drawn + outliers[::-1] + unknown(rows)


def pairs(index: Tensor, weight: Tensor) -> list[tuple[int, float]]:
    assert (index.dtype, weight.dtype) == (torch.int64, torch.float32)
    return list(zip(index.tolist(), weight.tolist(), strict=True))


def expected(order: list[int], k: int, weights: dict[int, float] | None = None) -> list[tuple[int, float]]:
    chosen = [(i, weights[i] if weights else 1.0) for i in order[:k]]
    filler = (order[0] if order else 0, 0.0)
    return sorted(chosen + [filler] * (k - len(chosen)), key=lambda pair: (pair[0], pair[1] == 0))


def user_rule(scores: Tensor, valid: Tensor, k: int, noise: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return selection.topk(scores, valid, k)


ORDERS: dict[str, Callable[[list[Row], int], list[int]]] = {
    "topk": topk_order,
    "fixed_quota": topk_order,
    "random": random_order,
    "trimmed": trimmed_order,
}


@pytest.mark.parametrize("name", list(ORDERS))
@examples
@given(rows=rows_of, k=st.integers(0, 24))
def test_rule_is_the_first_k_of_its_order(name: str, rows: list[Row], k: int) -> None:
    result = selection.rule_of(name).function(*tensors(rows)[:2], k, tensors(rows)[2])
    assert pairs(*result) == expected(ORDERS[name](rows, k), k)


@examples
@given(rows=rows_of, k=st.integers(0, 24), tau=st.floats(0, 1), epsilon=st.floats(0, 1))
def test_trimmed_options(rows: list[Row], k: int, tau: float, epsilon: float) -> None:
    scores, valid, noise = tensors(rows)
    result = selection.trimmed(scores, valid, k, noise, tau=tau, epsilon=epsilon)
    assert pairs(*result) == expected(trimmed_order(rows, k, tau, epsilon), k)


def test_trimmed_by_hand() -> None:
    scores, noise = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0]), torch.tensor([0.9, 0.1, 0.1, 0.2, 0.8, 0.3])
    index, _ = selection.trimmed(scores, torch.ones(6, dtype=torch.bool), 3, noise, tau=0.2, epsilon=0.4)
    assert index.tolist() == [1, 2, 4]  # without the outlier 0: the two hardest, and the draw 4


@examples
@given(rows=st.lists(row, max_size=19), k=st.integers(0, 9))
def test_of_few_rows_trimmed_is_topk(rows: list[Row], k: int) -> None:
    scores, valid, noise = tensors(rows)
    assert pairs(*selection.trimmed(scores, valid, k, noise)) == expected(topk_order(rows, k), k)


def test_trimmed_falls_back_on_the_least_extreme_outliers() -> None:
    scores, noise = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]), torch.tensor([0.9, 0.1, 0.1, 0.2, 0.8])
    index, _ = selection.trimmed(scores, scores > 0, 3, noise, tau=0.6, epsilon=0.0)
    assert index.tolist() == [2, 3, 4]  # 9, 8 and 7 are outliers


def test_trimmed_shares_of_decimal_fractions() -> None:
    scores, noise = -torch.arange(200.0), torch.arange(200.0) / 200
    index, _ = selection.trimmed(scores, scores < 1, 100, noise, tau=0.0, epsilon=0.29)
    assert index.tolist() == [*range(71), *range(171, 200)]


@examples
@given(rows=rows_of, k=st.integers(0, 24), num_strata=st.integers(1, 5))
def test_stratified_quotas_draws_and_weights(rows: list[Row], k: int, num_strata: int) -> None:
    scores, valid, noise = tensors(rows)
    order, stratum = stratified_order(rows, k, num_strata), strata_of(rows, num_strata)
    drawn = order[:k]
    have, got = Counter(stratum.values()), Counter(stratum[i] for i in drawn)
    weights = {i: have[stratum[i]] / len(order) / (got[stratum[i]] / len(drawn)) for i in drawn}
    index, weight = selection.stratified(scores, valid, k, noise, num_strata=num_strata)
    wanted = expected(order + unknown(rows), k, weights | dict.fromkeys(unknown(rows), 1.0))
    assert index.tolist() == [i for i, _ in wanted]
    torch.testing.assert_close(weight, torch.tensor([w for _, w in wanted]), rtol=1e-6, atol=0)
    # Ordered by score within the strata, as the original does, it is the hardest of each stratum.
    place = {i: -float(p) for p, i in enumerate(by_score(rows))}
    hardest = stratified_order([(x, ok, place.get(i, 0.0)) for i, (x, ok, _) in enumerate(rows)], k, num_strata)
    hardest = [i for i in hardest if i in place] + unknown(rows)
    places = selection.stratified_places(scores, valid, scores, num_strata)
    assert [places[i].item() for i in hardest] == list(range(len(hardest)))


def test_stratified_never_selects_more_than_asked() -> None:
    """The original CGGR keeps at least one row of each of four strata, five of 20 at a ratio of 0.05."""
    scores = torch.arange(20.0)
    for k in range(21):
        index, weight = selection.stratified(scores, torch.ones(20, dtype=torch.bool), k, torch.rand(20))
        assert len(set(index.tolist())) == k == (weight > 0).sum()
    places = selection.stratified_places(scores, torch.ones(20, dtype=torch.bool), scores, 4)
    quotas = [int((places < 10)[5 * h : 5 * h + 5].sum()) for h in range(4)]
    assert quotas == [1, 2, 3, 4]  # easiest to hardest: the shares 1 : 2 : 3 : 4 of ten


def test_stratified_weighted_mean_is_unbiased() -> None:
    draws, count = 4000, 13
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, generator=generator).expand(draws, count)
    losses = torch.randn(count, generator=generator) + 3 * scores[0]
    noise = selection.draw_noise(scores, generator)
    index, weight = selection.stratified(scores, torch.ones_like(scores, dtype=torch.bool), 7, noise)
    estimates = (weight * losses[index]).sum(-1) / weight.sum(-1)
    error = estimates.std() / math.sqrt(draws)
    assert (estimates.mean() - losses.mean()).abs() < 5 * error
    assert (losses[index].mean() - losses.mean()).abs() > 20 * error  # the unweighted mean leans to the hard ones


def inclusion(rows: list[Row], k: int, floor: float) -> dict[int, Fraction]:
    """π by the definition: saturate, rescale the rest, repeat."""
    ranked = by_score(rows)
    filling = unknown(rows)[: max(0, k - len(ranked))]
    rows = [(-INF if i in filling else x, ok, u) for i, (x, ok, u) in enumerate(rows)]
    ranked += filling
    infinite = any(rows[i][0] == INF for i in ranked)
    least = min([Fraction(0), *(Fraction(rows[i][0]) for i in ranked if math.isfinite(rows[i][0]))])
    s = {
        i: Fraction(rows[i][0] == INF)
        if infinite
        else Fraction(0)
        if rows[i][0] == -INF
        else Fraction(rows[i][0]) - least
        for i in ranked
    }
    total, share = sum(s.values()), Fraction(floor)
    q = {i: ((1 - share) * s[i] / total if total else (1 - share) / len(ranked)) + share / len(ranked) for i in ranked}
    sure: set[int] = set()
    draws = min(k, len(ranked))
    while True:
        rest = {i: q[i] for i in ranked if i not in sure}
        scale = (draws - len(sure)) / sum(rest.values()) if rest else Fraction(0)
        over = {i for i, x in rest.items() if scale * x > 1}
        if not over:
            return {i: Fraction(1) if i in sure else scale * q[i] for i in ranked}
        sure |= over


@examples
@given(rows=rows_of.filter(bool), k=st.integers(1, 24), floor=st.sampled_from([0.05, 0.1, 0.5, 1.0]))
def test_importance_is_unbiased(rows: list[Row], k: int, floor: float) -> None:
    """The expectation over the offset, taken exactly: the draw changes only where a cumulative sum of π, modulo 1,
    lies, so one offset of each interval, weighted by its length, stands for all."""
    pi = inclusion(rows, k, floor)
    assert sum(pi.values()) == min(k, len(pi))
    reached, ends = Fraction(0), {Fraction(0), Fraction(1)}
    for i in pi:
        reached += pi[i]
        ends.add(reached % 1)
    edges = sorted(ends)
    # Offsets are float32 and π whole units of 2**-30: shorter intervals cannot be hit for certain.
    spans = [(a, b) for a, b in itertools.pairwise(edges) if b - a > Fraction(1, 2**20)]
    scores, valid, _ = tensors(rows)
    noise = torch.tensor([float((a + b) / 2) for a, b in spans]).unsqueeze(1).expand(-1, len(rows)).contiguous()
    index, weight = selection.importance(scores.expand_as(noise), valid.expand_as(noise), k, noise, floor=floor)
    assert ((weight > 0).sum(-1) == min(k, len(pi))).all()
    expectation = torch.zeros(len(rows), dtype=torch.float64)
    for (a, b), drawn, weights in zip(spans, index, weight, strict=True):
        expectation.index_add_(0, drawn, weights.double() * float(b - a))
        for i, w in zip(drawn.tolist(), weights.tolist(), strict=True):
            assert w == 0 or w == pytest.approx(float(1 / (len(pi) * pi[i])), rel=1e-5)
    # Σ_i E[w_i] l_i = Σ l_i / M for any l says E[w_i] = 1 / M.
    truth = torch.tensor([1 / len(pi) if i in pi else 0.0 for i in range(len(rows))], dtype=torch.float64)
    torch.testing.assert_close(expectation, truth, rtol=1e-3, atol=1e-5)


def test_importance_on_a_grid_of_offsets() -> None:
    """Rows come up as often as they should, and the estimates average to the mean, both to the grid's width."""
    scores = torch.tensor([0.0, 1.0, 2.0, 5.0, 8.0])
    losses = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0])
    points = 7 * 64
    offsets = ((torch.arange(points) + 0.5) / points).unsqueeze(1).expand(points, 5).contiguous()
    valid = torch.ones(points, 5, dtype=torch.bool)
    index, weight = selection.importance(scores.expand(points, 5), valid, 2, offsets, floor=0.5)
    # q = s/32 + 1/10, π = 2 q = (0.2, 0.2625, 0.325, 0.5125, 0.7): frequencies to 1 / points each.
    frequency = torch.bincount(index.flatten(), minlength=5) / points
    torch.testing.assert_close(frequency, torch.tensor([0.2, 0.2625, 0.325, 0.5125, 0.7]), rtol=0, atol=1.01 / points)
    estimate = (weight * losses[index]).sum(-1).mean()
    torch.testing.assert_close(estimate, losses.mean(), rtol=0, atol=5 * 3 / points)


@pytest.mark.parametrize("count", [1000, 2**17])
def test_importance_draws_exactly_k_of_many(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, generator=generator).exp() ** 2
    # The last offset below 1 is where a sum of probabilities short of k by rounding would miss its last draw.
    for noise in (selection.draw_noise(scores, generator), torch.full_like(scores, 1 - 2**-24)):
        for k in (1, count // 10, count - 1, count):
            index, weight = selection.importance(scores, scores > 0, k, noise, floor=0.1)
            assert len(index.unique()) == k == (weight > 0).sum()
            if k > 1:
                torch.testing.assert_close(weight.sum(), torch.ones(()), rtol=0.05, atol=0)


@pytest.mark.parametrize("count", [1000, 2**17])
def test_inclusion_probabilities_sum_to_k_exactly(count: int) -> None:
    q = 0.1 + torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = q.sort(descending=True).values / q.sum()
    for k in (1, count // 10, count - 1, count):
        share = selection._fixed_point(q, q >= 0, torch.tensor([k]))
        assert share.sum() == k * 2**30
        assert share.min() > 0
        assert share.max() <= 2**30


@pytest.mark.parametrize("name", [name for name, rule in selection.RULES.items() if rule.needs_noise])
def test_rows_of_nan_noise_are_not_drawn(name: str) -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0])
    noise = torch.tensor([NAN, 0.5, NAN, 0.9])
    index, weight = selection.RULES[name].function(scores, scores > 0, 3, noise)
    assert index[weight > 0].tolist() == [1, 3]


@pytest.mark.parametrize("name", [*selection.RULES, "custom"])
@examples
@given(rows=rows_of, k=st.integers(0, 24))
def test_what_holds_for_every_rule(name: str, rows: list[Row], k: int) -> None:
    rule = selection.rule_of(user_rule if name == "custom" else name)
    scores, valid, noise = tensors(rows)
    index, weight = rule.function(scores, valid, k, noise)
    selectable = set(random_order(rows, k))
    kept = [i for i, w in pairs(index, weight) if w > 0]
    assert len(index) == len(weight) == k
    assert index.tolist() == sorted(index.tolist())
    assert len(kept) == len(set(kept)) == min(k, len(selectable))
    assert set(kept) <= selectable
    if name != "random" and set(kept) & set(unknown(rows)):
        assert set(kept) >= set(by_score(rows))
    assert set(index.tolist()) <= set(kept) | ({0} if not kept else set())
    assert weight.isfinite().all()


@pytest.mark.parametrize("name", list(selection.RULES))
@examples
@given(count=st.integers(1, 30), k=st.integers(0, 30), seed=st.integers(0, 2**20))
def test_permuted_rows_permute_the_selection(name: str, count: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(count, generator=generator).float()
    noise = (torch.randperm(count, generator=generator) + 0.5) / count
    valid = torch.rand(count, generator=generator) < 0.7
    order = torch.randperm(count, generator=generator)
    function = selection.RULES[name].function
    here = {i: w for i, w in pairs(*function(scores, valid, k, noise)) if w}
    there = pairs(*function(scores[order], valid[order], k, noise[order]))
    assert {int(order[i]): w for i, w in there if w} == here


@pytest.mark.parametrize("name", list(selection.RULES))
@examples
@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=2), count=st.integers(1, 9), k=st.integers(0, 10))
def test_batched_equals_row_by_row(name: str, shape: list[int], count: int, k: int) -> None:
    generator = torch.Generator().manual_seed(count + 10 * k)
    scores = torch.randint(0, 5, (*shape, count), generator=generator).float()
    scores[scores == 4] = NAN
    noise = selection.draw_noise(scores, generator)
    valid = torch.rand(scores.shape, generator=generator) < 0.6
    function = selection.RULES[name].function
    index, weight = function(scores, valid, k, noise)
    flat = zip(*(x.flatten(0, -2) for x in (scores, valid, noise)), strict=True)
    alone = [function(s, v, k, n) for s, v, n in flat]
    assert torch.equal(index.flatten(0, -2), torch.stack([pair[0] for pair in alone]))
    assert torch.equal(weight.flatten(0, -2), torch.stack([pair[1] for pair in alone]))


@pytest.mark.parametrize("name", list(selection.RULES))
def test_a_generator_determines_the_selection(name: str) -> None:
    scores = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    rule = selection.RULES[name]

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        noise = selection.draw_noise(scores, torch.Generator().manual_seed(seed))
        return rule.function(scores, torch.ones_like(scores, dtype=torch.bool), 12, noise)

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert torch.equal(drawn(1)[0], drawn(2)[0]) != rule.needs_noise


@pytest.mark.parametrize("name", list(selection.RULES))
def test_torchs_default_dtype_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 70, generator=generator)
    noise, valid = selection.draw_noise(scores, generator), torch.rand(3, 70, generator=generator) < 0.9

    expected = selection.RULES[name].function(scores, valid, 40, noise)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = selection.RULES[name].function(scores, valid, 40, noise)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", list(selection.RULES))
def test_nothing_is_read_back(name: str) -> None:
    """Fake tensors have shapes only: reading a value, or a size that depends on one, raises."""
    with FakeTensorMode():
        scores, noise = torch.empty(4, 16), torch.empty(4, 16)
        valid = torch.empty(4, 16, dtype=torch.bool)
        index, weight = selection.RULES[name].function(scores, valid, 6, noise)
        assert index.shape == weight.shape == (4, 6)


@pytest.mark.parametrize(("ratio", "count", "whole"), [(0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (0.25, 7, 1)])
def test_fraction_of(ratio: float, count: int, whole: int) -> None:
    assert selection.fraction_of(ratio, torch.tensor(count)).item() == whole
