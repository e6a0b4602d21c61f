"""The original's nano-router and its two loaders, against plain lists."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import build
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding

import cggr_compile as cggr
from cggr_compile import AsyncDifficultyFilteredDataLoader, CGGRScorer, DifficultyFilteredDataLoader, NanoRouter


class First(nn.Module):
    """As hard as the first id says, in hundredths."""

    def forward(self, input_ids: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return input_ids[:, 0] / 100


def batches_of(difficulties: list[int]) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor([[each, 0], [each, 1]])} for each in difficulties]


def firsts(batches: Any) -> list[int]:
    return [int(batch["input_ids"][0, 0]) for batch in batches]


def test_router_is_the_mean_of_a_small_network() -> None:
    torch.manual_seed(0)
    router = NanoRouter(11, 6)
    ids = torch.randint(11, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert list(router.state_dict()) == [
        "embed.weight",
        *(f"difficulty_head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")),
    ]
    a, b, c, d, e = router.state_dict().values()
    token = torch.sigmoid((a[ids] @ b.T + c).relu() @ d.T + e)[..., 0]
    torch.testing.assert_close(router(ids), token.mean(1))
    want = torch.stack([token[0].mean(), token[1, :2].mean(), torch.tensor(0.0)])
    torch.testing.assert_close(router(ids, mask), want)


@pytest.mark.parametrize("hidden", [4, 64])
def test_router_copies_the_embeddings_of_a_model(hidden: int) -> None:
    model = build("llama").to(torch.bfloat16)
    table = model.get_input_embeddings().weight
    router = NanoRouter.from_model(model, hidden)
    want = table.detach()[:, :hidden].float().clone()
    with torch.no_grad():
        table.zero_()  # what trains later is not the router's
    assert torch.equal(router.embed.weight, want)
    assert not router.embed.weight.requires_grad
    assert router(torch.zeros(2, 3, dtype=torch.long)).shape == (2,)


def test_router_of_a_plain_module() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7))
    assert torch.equal(NanoRouter.from_model(model).embed.weight, model[0].weight)
    with pytest.raises(ValueError, match="Linear has 0 embeddings"):
        NanoRouter.from_model(model[1])
    with pytest.raises(ValueError, match="Sequential has 2 embeddings"):
        NanoRouter.from_model(nn.Sequential(nn.Embedding(7, 3), nn.Embedding(5, 3)))


@pytest.mark.parametrize("kind", [dict, BatchEncoding, tuple, Tensor])
def test_calibration_is_adam_on_the_scaled_difficulty(kind: type) -> None:
    torch.manual_seed(0)
    router = NanoRouter(9, 4)
    ids = [torch.randint(9, (2, 6)) for _ in range(5)]
    mask = torch.ones(2, 6, dtype=torch.long)
    if kind in (dict, BatchEncoding):
        mask[1, 4:] = 0
        batches = [kind({"input_ids": each, "attention_mask": mask}) for each in ids]
    else:
        batches = [(each, None) if kind is tuple else each for each in ids]
    parameters = [p.detach().clone().requires_grad_() for p in router.difficulty_head.parameters()]
    table = router.embed.weight.detach().clone()

    def difficulty(input_ids: Tensor) -> Tensor:
        return 2.0 * input_ids - 8  # of either sign, as entropy - confidence is

    router.calibrate(batches, lambda x: (difficulty(x).flatten(), None, None), num_batches=3, lr=0.1)

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum(1) / mask.sum(1)

    targets = [mean(difficulty(each)) for each in ids[:3]]
    largest = max(target.max() for target in targets)
    assert largest > 1
    assert min(target.min() for target in targets) < 0
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    a, b, c, d = parameters
    for each, target in zip(ids, targets, strict=False):
        got = mean(torch.sigmoid((table[each] @ a.T + b).relu() @ c.T + d)[..., 0])
        optimizer.zero_grad()
        ((got - target.clamp(min=0) / largest) ** 2).mean().backward()
        optimizer.step()
    for got, want in zip(router.difficulty_head.parameters(), parameters, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(router.embed.weight, table)
    assert not router.training


def test_calibration_learns_the_scores_of_a_full_scorer() -> None:
    """Sequences of frequent tokens are easy for a model that was given their frequencies."""
    torch.manual_seed(0)

    class Peaked(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return nn.functional.one_hot(input_ids, 16) * 8.0 * (input_ids < 8)[..., None]

    easy, hard = torch.randint(8, (20, 4, 6)), torch.randint(8, 16, (20, 4, 6))
    router = NanoRouter(16, 16)
    router.calibrate(torch.cat([easy, hard], 1), CGGRScorer(Peaked()), lr=0.05)
    assert router(easy[0]).max() < 0.3 < router(hard[0]).min()


def test_calibration_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="no batch to calibrate with"):
        NanoRouter(9, 4).calibrate([], lambda x: (x, None, None))


@given(st.lists(st.integers(0, 99), max_size=12), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
def test_easy_batches_are_skipped_up_to_the_ratio(difficulties: list[int], ratio: float) -> None:
    want, skipped = [], 0
    for seen, each in enumerate(difficulties, 1):
        if each < 30 and (skipped + 1) / seen <= ratio:
            skipped += 1
        else:
            want.append(each)
    loader = DifficultyFilteredDataLoader(batches_of(difficulties), First(), skip_ratio=ratio)
    for _ in range(2):
        assert firsts(loader) == want
        assert loader.get_stats() == {
            "total_batches": len(difficulties),
            "skipped_batches": skipped,
            "skip_rate": skipped / max(1, len(difficulties)),
            "threshold": 0.3,
        }
    assert len(loader) == len(difficulties) >= len(want)
    ahead = AsyncDifficultyFilteredDataLoader(batches_of(difficulties), First(), queue_size=2)
    for _ in range(2):
        assert firsts(ahead) == [each for each in difficulties if each >= 30]
        assert ahead.get_stats()["skipped_batches"] == sum(each < 30 for each in difficulties)


@pytest.mark.parametrize("kind", ["dict", "encoding", "tuple", "tensor", "other key"])
def test_kinds_of_batches(kind: str) -> None:
    ids = torch.tensor([[40, 0]]), torch.tensor([[20, 0]])
    make: dict[str, Any] = {
        "dict": lambda x: {"input_ids": x},
        "encoding": lambda x: BatchEncoding({"input_ids": x}),
        "tuple": lambda x: (x, x),
        "tensor": lambda x: x,
        "other key": lambda x: {"tokens": x},
    }
    batches = [make[kind](each) for each in ids]
    key = "tokens" if kind == "other key" else "input_ids"
    [got] = DifficultyFilteredDataLoader(batches, First(), input_key=key, skip_ratio=1.0)
    assert got is batches[0]


def test_a_nano_router_does_not_count_padding() -> None:
    router = NanoRouter(3, 2)
    with torch.no_grad():  # token 1 is hard, token 0 is not
        router.embed.weight.copy_(torch.tensor([[-9.0, 0.0], [9.0, 0.0], [0.0, 0.0]]))
        for p, value in zip(router.difficulty_head.parameters(), (1.0, 0.0, 1.0, -4.0), strict=True):
            p.fill_(value)
    ids, mask = torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": mask}
    assert [*DifficultyFilteredDataLoader([padded], router, 0.5, skip_ratio=1.0)] == [padded]
    assert [*DifficultyFilteredDataLoader([{"input_ids": ids}], router, 0.5, skip_ratio=1.0)] == []


def test_errors_reach_the_loop_and_no_thread_stays() -> None:
    threads = threading.active_count()

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from batches_of([50])
        raise OSError("disk")

    loader = AsyncDifficultyFilteredDataLoader(broken(), First())
    with pytest.raises(OSError, match="disk"):
        list(loader)
    assert threading.active_count() == threads
    full = AsyncDifficultyFilteredDataLoader(batches_of([50] * 9), First(), queue_size=1)
    full.stop()  # nothing runs
    for _ in full:
        break
    assert threading.active_count() == threads
    got = []
    for batch in full:
        got.append(batch)
        full.stop()
    assert len(got) == 1
    assert threading.active_count() == threads
    assert len([*full]) == 9
    full.stop()


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"skip_ratio is 1\.5"):
        DifficultyFilteredDataLoader([], First(), skip_ratio=1.5)
    with pytest.raises(ValueError, match="queue_size is 0"):
        AsyncDifficultyFilteredDataLoader([], First(), queue_size=0)
    with pytest.raises(ValueError, match="nano_router is function"):
        cggr.DifficultyFilteredDataLoader([], lambda x: x)  # type: ignore[arg-type]
