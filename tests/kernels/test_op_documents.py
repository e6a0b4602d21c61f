"""`cggr::select_documents` against the rules written out document by document."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cggr_compile.kernels.op.documents  # noqa: F401  registers the operators
import pytest
import torch
from cggr_compile.kernels.reference.documents import SEARCHES
from hypothesis import given, settings
from hypothesis import strategies as st

select = torch.ops.cggr.select_documents
checked = torch.ops.cggr.checked_positions
SHORT = SEARCHES**2 // 2
"""Up to this length SEARCHES searches find what no further one could add to: the i-th document from the last to be
passed over, of n, is longer than i tokens, so n (n + 1) / 2 <= S."""


class Document(NamedTuple):
    """The places of a document, those that count, and its noise."""

    places: list[int]
    counted: list[int]
    noise: float


def documents_of(lengths: list[int], counted: list[bool], noise: list[float]) -> list[Document]:
    """Of one sequence."""
    found, at = [], 0
    for number, length in enumerate(lengths):
        places = list(range(at, at + length))
        found.append(Document(places, [place for place in places if counted[place]], noise[number]))
        at += length
    return found


def positions_of(lengths: list[int]) -> list[int]:
    return [place for length in lengths for place in range(length)]


def preference(rule: str, documents: list[Document], scores: list[float], k: int, tau: float, epsilon: float) -> Any:
    """The documents that can be taken, by their numbers, in the order of the rule."""
    able = [n for n, d in enumerate(documents) if d.counted and len(d.places) <= k]
    if rule == "random":
        return sorted(able, key=lambda n: (-documents[n].noise, n))
    mean = {
        n: torch.tensor(math.fsum(scores[p] for p in documents[n].counted) / len(documents[n].counted)).float().item()
        for n in able
    }
    hardest = sorted(able, key=lambda n: (-mean[n], n))
    if rule != "trimmed":
        return hardest
    cut = math.floor(tau * len(able) + 1e-9)
    outliers, others = hardest[:cut], hardest[cut:]
    quota, used, hard = k - math.floor(epsilon * k + 1e-9), 0, []
    for n in others:
        used += len(documents[n].places)
        if used > quota:
            break
        hard.append(n)
    rest = sorted((n for n in others if n not in hard), key=lambda n: (-documents[n].noise, n))
    return [*hard, *rest, *reversed(outliers)]


def taken_of(order: list[int], documents: list[Document], k: int) -> list[int]:
    taken, left = [], k
    for n in order:
        if len(documents[n].places) <= left:
            taken.append(n)
            left -= len(documents[n].places)
    return sorted(taken)


@st.composite
def rows_of(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """The lengths of the documents of each sequence, all of one sum, and a budget."""
    total = draw(st.integers(1, SHORT))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, left = [], total
        while left:
            row.append(draw(st.integers(1, min(left, draw(st.sampled_from([1, 4, left]))))))
            left -= row[-1]
        rows.append(row)
    return rows, draw(st.integers(1, total))


@settings(max_examples=200)
@given(
    rows_of(), st.sampled_from(["topk", "fixed_quota", "random", "trimmed"]), st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.1, 0.5]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**20),
)  # fmt: skip
def test_documents_are_taken_whole_in_the_order_of_the_rule(
    drawn: tuple[list[list[int]], int], rule: str, tau: float, epsilon: float, ignored: float, seed: int
) -> None:
    rows, k = drawn
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), sum(rows[0]))
    counted = torch.rand(shape, generator=generator) >= ignored
    scores = torch.randn(shape, generator=generator).where(counted, 0.0)
    noise = torch.rand(shape, generator=generator)
    names, values = (["tau", "epsilon"], [tau, epsilon]) if rule == "trimmed" else ([], [])
    positions, figures = select(
        torch.tensor([positions_of(row) for row in rows]),
        counted,
        None if rule == "random" else scores,
        k,
        rule,
        noise if rule in ("random", "trimmed") else None,
        names,
        values,
    )
    assert positions.shape == (len(rows), k)
    for row, lengths in enumerate(rows):
        documents = documents_of(lengths, counted[row].tolist(), noise[row].tolist())
        order = preference(rule, documents, scores[row].tolist(), k, tau, epsilon)
        taken = taken_of(order, documents, k)
        places = [place for n in taken for place in documents[n].places]
        assert positions[row].tolist() == places + [-1] * (k - len(places))
        able = [d for d in documents if d.counted]
        assert figures[row].tolist() == [
            len(able),
            len(taken),
            sum(len(d.places) > k for d in able),
            sum(len(documents[n].counted) for n in taken),
        ]


def test_a_score_of_nan_ranks_last() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 0, 1]])
    scores = torch.tensor([[1.0, math.nan, 0.5, 0.5, 0.1, 0.1]])
    counted = torch.ones(1, 6, dtype=torch.bool)
    assert select(positions, counted, scores, 4, "topk", None, [], [])[0].tolist() == [[2, 3, 4, 5]]
    assert select(positions, counted, scores, 6, "topk", None, [], [])[0].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_search_ends() -> None:
    """Documents of 1, k, 1, k - 1, 1, … tokens in the order of the rule: each search takes one and ends."""
    k = 2 * SEARCHES
    lengths = [length for n in range(k) for length in (1, k - n)]
    positions = torch.tensor([positions_of(lengths)])
    scores = -torch.cat([torch.full((length,), float(n)) for n, length in enumerate(lengths)]).unsqueeze(0)
    found, figures = select(positions, torch.ones_like(scores, dtype=torch.bool), scores, k, "topk", None, [], [])
    assert (found >= 0).sum() == figures[0, 1] == SEARCHES


@pytest.mark.parametrize(
    ("position_ids", "message"),
    [
        ([[3, 4, 0, 1, 0]], None),  # a sequence may begin inside a document
        ([[0, 1, 0, 0, 0]], None),
        ([[0, 1, 2, 3, 4], [0, 1, 0, 1, 7]], r"at place 4 of sequence 1 they go from 1 to 7; let every document"),
    ],
)
def test_documents_begin_at_0(position_ids: list[list[int]], message: str | None) -> None:
    given = torch.tensor(position_ids)
    if message is None:
        assert torch.equal(checked(given), given)
        return
    with pytest.raises(ValueError, match=message):
        checked(given)


def test_registration() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]])
    counted, scores, noise = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 5), torch.rand(2, 5)
    torch.library.opcheck(select, (positions, counted, scores, 3, "trimmed", noise, ["tau"], [0.5]))
    torch.library.opcheck(select, (positions, counted, None, 3, "random", noise, [], []))
    torch.library.opcheck(checked, (positions,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(2, 4, dtype=torch.int64)}, r"position_ids has shape \(2, 4\), expected \[B, S\] = \(2, 5\)"),
        ({2: torch.zeros(2, 5, dtype=torch.float64)}, r"scores is torch.float64, expected torch.float32"),
        ({3: 0}, "k is 0, expected at least 1"),
        ({4: "importance"}, r"rule is 'importance', expected one of \['topk', 'fixed_quota', 'random', 'trimmed'\]"),
        ({2: None}, "'topk' selects no documents, or its scores or noise are None"),
    ],
)
def test_errors_name_the_argument(changed: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5)]
    arguments += [3, "topk", None, [], []]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises((ValueError, TypeError), match=message):
        select(*arguments)
