"""The original's scores ahead of a batch, against a scorer that is asked at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import VOCABULARY, build
from torch import Tensor, nn
from transformers import BatchEncoding

from cggr_compile import AsyncCGGRModel, AsyncCGGRScorer, CGGRScorer, create_prefetching_iterator

ROWS, LENGTH = 5, 8


class Counted(nn.Module):
    """A model that notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, VOCABULARY)
        self.asked: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        self.asked.append((input_ids, kwargs))
        return self.head(self.embed(input_ids).cumsum(1))


def ids_of(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long().repeat(ROWS // len(lengths), 1)


def same(got: Any, want: Any) -> bool:
    return torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and set(got[2]) == set(want[2])


def test_what_was_prefetched_is_handed_out_once() -> None:
    router = Counted()
    scorer = AsyncCGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=0)
    ids, mask = ids_of(1), mask_of(6)
    want = CGGRScorer(router, 0.5, 0, selection="fixed_quota")(ids, attention_mask=mask)
    router.asked.clear()
    scorer.prefetch(ids, attention_mask=mask)
    assert len(router.asked) == 1
    got = scorer.get_mask(ids.clone(), attention_mask=mask.clone())
    assert len(router.asked) == 1
    assert same(got, want)
    assert same(scorer(ids, attention_mask=mask), want)
    assert len(router.asked) == 2


def test_what_was_not_prefetched_is_scored() -> None:
    router = Counted()
    scorer = AsyncCGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=0)
    plain = CGGRScorer(router, 0.5, 0, selection="fixed_quota")
    ids, mask = ids_of(1), mask_of(6)
    others: list[tuple[Tensor, dict[str, Any]]] = [
        (ids_of(2), {"attention_mask": mask}),
        (ids[:3], {"attention_mask": mask[:3]}),
        (ids.int(), {"attention_mask": mask}),
        (ids, {"attention_mask": mask_of(7)}),
        (ids, {}),
        (ids, {"attention_mask": mask, "more": 1}),
    ]
    for other, kwargs in others:
        scorer.prefetch(ids, attention_mask=mask)
        router.asked.clear()
        got = scorer.get_mask(other, **kwargs)
        assert len(router.asked) == 1
        assert same(got, plain(other, **kwargs))
    static = ids.clone()  # a buffer that takes every batch
    scorer.prefetch(static)
    static.copy_(ids_of(3))
    assert same(scorer.get_mask(static), plain(ids_of(3)))


def test_prefetched_scores_have_the_weights_and_the_step_of_then() -> None:
    router = Counted()
    scorer = AsyncCGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=2)
    ids = ids_of(1)
    want = CGGRScorer(router, 0.5, 2, selection="fixed_quota")(ids)
    scorer.prefetch(ids)
    scorer.step()
    with torch.no_grad():
        router.head.weight.mul_(-1)
    got = scorer.get_mask(ids)
    assert same(got, want)
    assert got[2]["current_ratio"] == 1.0
    assert scorer.get_mask(ids)[2]["current_ratio"] == 0.75


@pytest.mark.parametrize("kind", [dict, BatchEncoding, tuple])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_iterator_scores_each_batch_before_the_one_in_front_is_handed_out(kind: type, count: int) -> None:
    router = Counted()
    scorer = AsyncCGGRScorer(router, warmup_steps=0)
    plain = CGGRScorer(router, warmup_steps=0, selection="fixed_quota")
    batches = [(ids_of(i), i) if kind is tuple else kind({"input_ids": ids_of(i)}) for i in range(count)]
    wants = [plain(ids_of(i)) for i in range(count)]
    router.asked.clear()
    seen = 0
    for seen, (batch, scored) in enumerate(create_prefetching_iterator(iter(batches), scorer), 1):
        assert batch is batches[seen - 1]
        assert same(scored, wants[seen - 1])
        assert len(router.asked) == min(seen + 1, count)
    assert seen == count


def hardest(router: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor, k: int) -> list[int]:
    """The k sequences of the largest mean entropy + margin over unmasked positions with a counted next label."""
    p = torch.softmax(router(ids).detach(), -1)
    two = p.topk(2).values
    token = -(p * p.log()).sum(-1) + 1 - (two[..., 0] - two[..., 1])
    means = []
    for row in range(len(ids)):
        counted = [t for t in range(LENGTH - 1) if labels[row, t + 1] != -100 and mask[row, t]]
        means.append(sum(token[row, t].item() for t in counted) / len(counted) if counted else float("-inf"))
    return sorted(sorted(range(len(ids)), key=lambda i: -means[i])[:k])


def test_model_trains_on_the_hardest_sequences_and_scores_the_next() -> None:
    router, model = Counted(), Counted()
    with torch.no_grad():
        router.head.weight.mul_(1.5)
    ahead = AsyncCGGRModel(model, router, min_tokens_ratio=0.5, warmup_steps=0)
    ids, labels, mask = ids_of(1), ids_of(1), mask_of(8, 2, 8, 3, 8)
    labels[0] = -100
    labels[2, 3:] = -100
    for step, following in enumerate((ids_of(2), None)):
        rows = hardest(router, ids, labels, mask, 2)
        router.asked.clear()
        model.asked.clear()
        model.zero_grad()
        loss = ahead(
            ids, labels=labels, next_input_ids=following, next_kwargs={"attention_mask": mask}, attention_mask=mask
        )
        loss.backward()
        got = {name: p.grad for name, p in model.named_parameters()}
        [(seen, kwargs)] = model.asked
        assert torch.equal(seen, ids[rows])
        assert torch.equal(kwargs["attention_mask"], mask[rows])
        # This batch was scored in the call before, but for the first.
        assert [each[0].tolist() for each in router.asked] == [
            x.tolist() for x in ((ids, following) if not step else ())
        ]
        model.zero_grad()
        want = F.cross_entropy(model(ids[rows])[:, :-1].flatten(0, 1), labels[rows][:, 1:].flatten())
        want.backward()
        torch.testing.assert_close(loss, want)
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name], p.grad)
        assert ahead.get_metrics() == {
            "step": step,
            "token_ratio": 0.5,
            "tokens_selected": (labels[rows][:, 1:] != -100).sum().item(),
            "tokens_total": (labels[:, 1:] != -100).sum().item(),
            "prefetch_active": following is not None,
        }
        ahead.step()
        ids, labels = ids_of(2), ids_of(2)


def test_model_by_itself_and_without_labels() -> None:
    model = build("llama")
    ahead = AsyncCGGRModel(model)
    assert ahead.get_metrics() == {}
    ids = ids_of(1)
    assert torch.equal(ahead(ids).logits, model(ids).logits)
    ignored = ahead(ids, labels=torch.full_like(ids, -100))
    ignored.backward()
    assert ignored.item() == 0
    with pytest.raises(ValueError, match="labels must match input_ids"):
        ahead(ids, labels=ids[:, 1:])
