"""The loader that filters rows, against the same by lists of numbers."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from documents import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import cggr_compile as cggr

Scores = list[list[int]]


def batches_of(scores: Scores, kind: Callable[[dict[str, Tensor]], Any] = dict) -> list[Any]:
    """Rows numbered through all batches; the ids of a row are its number, three times."""
    batches, first = [], 0
    for each in scores:
        rows = torch.arange(first, first + len(each))
        batches.append(kind({"input_ids": rows[:, None].repeat(1, 3), "score": torch.tensor(each, dtype=torch.long)}))
        first += len(each)
    return batches


def score(batch: Any) -> Tensor:
    assert not torch.is_grad_enabled()
    return batch["score"]


def expected(scores: Scores, size: int, drop_last: bool, defer: int | None, **rule: Any) -> list[list[int]]:
    """The rows of each batch, by numbers and lists."""
    hard, deferred, first = [], [], 0
    for each in scores:
        if rule.get("threshold") is not None:
            kept = [i for i, value in enumerate(each) if value >= rule["threshold"]]
        else:
            count = max(1, int(Fraction(str(rule["ratio"])) * len(each)))
            kept = sorted(sorted(range(len(each)), key=lambda i: (-each[i], i))[:count])
        hard += [first + i for i in kept]
        if defer is not None:
            deferred += [first + i for i in range(len(each)) if i not in kept]
            while len(deferred) > defer:
                hard.append(deferred.pop(0))
        first += len(each)
    hard += deferred
    batches = [hard[i : i + size] for i in range(0, len(hard), size)]
    return [batch for batch in batches if len(batch) == size or not drop_last]


def numbers(batch: Any) -> list[int]:
    ids = batch["input_ids"]
    assert (ids == ids[:, :1]).all()
    return ids[:, 0].tolist()


SCORES = st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=6)
RULES = st.one_of(
    st.builds(lambda t: {"threshold": t}, st.integers(-1, 5)),
    st.builds(lambda r: {"ratio": r}, st.sampled_from([0.01, 0.29, 0.3, 0.5, 0.7, 1.0])),
)


@given(
    scores=SCORES,
    rule=RULES,
    size=st.integers(1, 5),
    drop_last=st.booleans(),
    defer=st.none() | st.integers(1, 4),
    prefetch=st.integers(1, 3),
    stop=st.integers(0, 30),
    kind=st.sampled_from([dict, BatchEncoding]),
)
def test_batches_are_those_of_lists_and_resume(
    scores: Scores,
    rule: dict[str, Any],
    size: int,
    drop_last: bool,
    defer: int | None,
    prefetch: int,
    stop: int,
    kind: Callable[[dict[str, Tensor]], Any],
) -> None:
    def loader(score: Callable[[Any], Tensor] = score) -> cggr.FilteredLoader:
        source = batches_of(scores, kind)
        return cggr.FilteredLoader(source, score, size, defer=defer, drop_last=drop_last, prefetch=prefetch, **rule)

    want = expected(scores, size, drop_last, defer, **rule)
    whole = loader()
    got = list(whole)
    assert [numbers(batch) for batch in got] == want
    assert all(type(batch) is kind and set(batch) == {"input_ids", "score"} for batch in got)
    rows = sum(map(len, scores))
    threshold = rule.get("threshold")
    easy = (
        sum(value < threshold for each in scores for value in each)
        if threshold is not None
        else rows - sum(max(1, int(Fraction(str(rule["ratio"])) * len(each))) for each in scores if each)
    )
    assert whole.stats() == {"rows": rows, "easy": easy}
    assert [numbers(batch) for batch in whole] == want  # a second epoch

    first = loader()
    stop = min(stop, len(want))
    for place, batch in enumerate(first, 1):
        assert numbers(batch) == want[place - 1]
        if place == stop:
            break
    state = first.state_dict()
    ended = not want or stop == 0
    scored: list[int] = []

    def noted(batch: Any) -> Tensor:
        scored.append(int(batch["input_ids"].sum()))
        return score(batch)

    second = loader(noted)
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.state_dict()["batches"] == state["batches"]
    assert [numbers(batch) for batch in second] == (want if ended else want[stop:])
    assert len(scored) == len(scores) - state["batches"]  # what was read before is not scored again
    assert second.stats() == {"rows": rows, "easy": easy}
    assert [numbers(batch) for batch in second] == want  # the epoch after starts at the beginning


def test_resumes_a_shuffled_data_loader() -> None:
    rows = [{"input_ids": torch.full((3,), i), "score": torch.tensor(i % 7)} for i in range(23)]

    def loader() -> cggr.FilteredLoader:
        generator = torch.Generator().manual_seed(4)
        source = DataLoader(rows, 5, shuffle=True, generator=generator)  # type: ignore[arg-type]
        return cggr.FilteredLoader(source, score, 4, threshold=2, defer=3)

    want = [numbers(batch) for batch in loader()]
    order = [number for batch in want for number in batch]
    assert sorted(order) == [*range(23)] != order
    first = loader()
    for batch in first:
        assert numbers(batch) == want[0]
        break
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [numbers(batch) for batch in second] == want[1:]


def test_a_data_loader_with_workers_leaves_nothing_behind() -> None:
    threads = {*threading.enumerate()}
    rows = [{"input_ids": torch.full((3,), i), "score": torch.tensor(i % 2)} for i in range(20)]
    source = DataLoader(rows, 5, num_workers=1)  # type: ignore[arg-type]
    for batch in cggr.FilteredLoader(source, score, 3, ratio=0.4):
        assert numbers(batch) == [1, 3, 5]
        break
    assert not multiprocessing.active_children()
    for thread in {*threading.enumerate()} - threads:
        assert not thread.name.startswith("cggr"), thread  # a queue's feeder ends by itself
        thread.join(5)
    assert {*threading.enumerate()} == threads


def test_rows_hold_no_memory_of_the_others() -> None:
    [batch] = cggr.FilteredLoader(batches_of([[0, 1, 0, 1]]), score, 2, threshold=1)
    assert batch["input_ids"].untyped_storage().nbytes() == 2 * 3 * 8


def test_the_example_of_the_page() -> None:
    class Peaked(nn.Module):
        """Even ids are easy to predict behind."""

        def forward(self, input_ids: Tensor) -> Tensor:
            return nn.functional.one_hot(input_ids, 40) * 9.0 * (input_ids % 2 == 0)[..., None]

    torch.manual_seed(0)
    source = [batch for batch in batches_of([[0] * 8] * 5) for _ in range(20)]
    model = nn.Sequential(nn.Embedding(40, 64))
    hard_half = examples("integrations.md", "hard_half")["hard_half"]
    got = [numbers(batch) for batch in hard_half(source, model, cggr.CGGRScorer(Peaked()))]
    assert len(got) == 100
    odd = sum(number % 2 for batch in got for number in batch)
    assert odd > 0.8 * 4 * len(got)


@pytest.mark.parametrize("where", ["loader", "score"])
def test_errors_of_the_thread_reach_the_loop_in_their_turn(where: str) -> None:
    threads = threading.active_count()
    source = batches_of([[1, 1], [1, 1], [1, 1]])

    def broken() -> Iterator[Any]:
        yield from source[:2]
        if where == "loader":
            raise OSError("disk")
        yield source[2]

    def failing(batch: Any) -> Tensor:
        if where == "score" and batch is source[2]:
            raise OSError("disk")
        return batch["score"]

    got: list[list[int]] = []
    with pytest.raises(OSError, match="disk"):
        got.extend(map(numbers, cggr.FilteredLoader(broken(), failing, 2, threshold=0)))
    assert got == [[0, 1], [2, 3]]
    assert threading.active_count() == threads


GOOD = {"input_ids": torch.zeros(2, 3), "score": torch.zeros(2)}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([[1, 2]], "gave a batch of type list, expected a mapping"),
        ([{}], "gave a batch of type dict, expected a mapping of names to tensors, not empty"),
        ([{"text": ["a"]}], "'text' of a batch is list, expected a tensor"),
        ([{"score": torch.tensor(1.0)}], "'score' of a batch is Tensor, expected a tensor [rows, ...]"),
        ([{**GOOD, "more": torch.zeros(3)}], "different numbers of rows: {'input_ids': 2, 'score': 2, 'more': 3}"),
        ([GOOD, {**GOOD, "input_ids": torch.zeros(2, 4)}], "'input_ids' of a row has shape (4,) in batch 1 of the"),
        ([GOOD, {**GOOD, "more": torch.zeros(2)}], "'more' of a row has shape () in batch 1 of the loader, None in"),
        ([{"score": torch.tensor([1.0, float("nan")])}], "score returned NaN for row 1 of a batch"),
        ([{"score": torch.zeros(2, 1)}], "score returned shape (2, 1) for a batch of 2 rows, expected a tensor [2]"),
    ],
)
def test_batches_that_cannot_be_filtered(batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        list(cggr.FilteredLoader(batches, score, 4, threshold=0))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs ratio or threshold"),
        ({"ratio": 0.5, "threshold": 0.1}, "needs ratio or threshold"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"ratio": 1, "batch_size": 0}, "batch_size is 0"),
        ({"ratio": 1, "defer": 0}, "defer is 0"),
        ({"ratio": 1, "prefetch": 0}, "prefetch is 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cggr.FilteredLoader([], score, **{"batch_size": 2, **options})


def test_states_of_other_data() -> None:
    scores = [[1, 1, 1], [1, 1, 1]]
    loader = cggr.FilteredLoader(batches_of(scores), score, 2, threshold=0)
    next(iter(loader))
    state = loader.state_dict()
    assert state == {"batches": 1, "rows": 3, "easy": 0, "waiting": [(0, 2)], "deferred": []}
    for fewer in ([], [[1, 1]]):
        shorter = cggr.FilteredLoader(batches_of(fewer), score, 2, threshold=0)
        shorter.load_state_dict(state)
        with pytest.raises(ValueError, match="saved behind batch 1 of the loader"):
            list(shorter)
    with pytest.raises(ValueError, match="expected \\['batches'"):
        loader.load_state_dict({"batches": 1})
