"""Scores from outside a step: the router's own ahead of it, any others, and what cannot take them."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch
from documents import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from toys import Toy, route, toy_batch

import cggr_compile as cggr

OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 2}


def toy(**options: Any) -> Toy:
    torch.manual_seed(0)
    return cggr.optimize(Toy().train(), **{**OPTIONS, **options})


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_scores_are_the_router_s_and_the_step_is_as_if_it_had_run(name: str) -> None:
    """Against eager: the scores choose the rows that the eager router chooses, and gradients are those rows' alone."""
    architecture, eager = ARCHITECTURES[name], build(name)
    batch = token_batch(takes_mask=architecture.takes_mask)
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1)
    scores = model.cggr.score(batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.cggr.use_scores(scores)
    model(**batch).loss.backward()
    rows = model.cggr.selected
    torch.testing.assert_close(rows, oracle.expected_rows(eager, architecture, batch, 0.5, 1))
    oracle.step(eager, {key: each[rows] for key, each in batch.items()})
    for (key, expected), found in zip(oracle.gradients(eager).items(), model.parameters(), strict=True):
        assert torch.equal(found.grad, expected), key
    assert model.cggr.captures == 1


@given(
    scores=st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6, unique=True), kept=st.sampled_from([1, 3, 6])
)
def test_any_scores_choose_their_highest_rows(scores: list[float], kept: int) -> None:
    model = _toy_of(kept)
    batch = toy_batch(6)
    model.cggr.use_scores(torch.tensor(scores))
    model(**batch)
    assert model.cggr.selected.tolist() == sorted(sorted(range(6), key=lambda row: -scores[row])[:kept])
    model(**batch)  # they were for one step
    assert model.cggr.selected.tolist() == route(model, batch).hardest(kept)


_TOYS: dict[int, Toy] = {}


def _toy_of(kept: int) -> Toy:
    if kept not in _TOYS:
        _TOYS[kept] = toy(ratio=kept / 6)
    return _TOYS[kept]


def test_a_row_without_counted_tokens_is_not_selected_whatever_its_score() -> None:
    model, batch = toy(), toy_batch(4, ignored=0.2)
    model.cggr.use_scores(torch.tensor([0.0, 9.0, 1.0, 2.0]))
    model(**batch)
    assert model.cggr.selected.tolist() == [2, 3]
    found = model.cggr.metrics()
    assert found["score_mean"].item() == pytest.approx(1.0)
    assert found["tokens_total"].item() == (batch["labels"][:, 1:] != -100).sum()


def test_the_examples_of_the_documentation() -> None:
    model, batches = toy(), [toy_batch(8, seed=seed) for seed in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    expected = [route(model, batch).hardest(4) for batch in batches]
    chosen = []
    optimizer.register_step_pre_hook(lambda *_: chosen.append(model.cggr.selected.tolist()))
    examples("integrations.md", "epochs_on_first_scores")["epochs_on_first_scores"](model, batches, optimizer, 2)
    assert chosen == expected * 2
    examples("integrations.md", "train")["train"](model, batches * 2, optimizer)
    assert len(chosen) == 12


def test_the_recipes_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    batches = [(torch.arange(8) + 8 * number, toy_batch(8, seed=number)) for number in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    chosen: list[list[int]] = []
    optimizer.register_step_pre_hook(lambda *_: chosen.append(model.cggr.selected.tolist()))
    reference = torch.arange(16.0) * 100
    recipes = [examples("integrations.md", name)[name] for name in ("train_on_excess_loss", "epochs_on_last_scores")]
    recipes[0](model, batches, optimizer, reference)
    assert chosen == [[0, 1, 2, 3]] * 2, "rows that the reference has not learnt are left out"

    scored: list[torch.Tensor] = []
    score = model.cggr.score

    def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scored.append(score(batch))
        return scored[-1]

    monkeypatch.setattr(model.cggr, "score", counted)
    recipes[1](model, batches, optimizer, 4, torch.empty(16))
    expected = [scores.topk(4).indices.sort().values.tolist() for scores in scored]
    assert len(scored) == 4
    assert chosen[2:] == [*expected[:2] * 2, *expected[2:] * 2]


def test_batches_ahead_are_scored_by_the_weights_before_the_update() -> None:
    """Every step against an eager router of the step before's weights; the first two, of their own."""
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    batches = [toy_batch(8, seed=seed) for seed in range(14)]
    ahead = model.cggr.score_ahead(batches)
    before, steps, differs = None, 0, 0
    for batch, expected in zip(ahead, batches, strict=True):
        assert batch is expected
        by_own, by_last = route(model, batch).hardest(4), before and route(before, batch).hardest(4)
        optimizer.zero_grad()
        model(**batch)[0].backward()
        assert model.cggr.selected.tolist() == (by_own if steps < 2 else by_last), steps
        differs += steps >= 2 and by_last != by_own
        before = copy.deepcopy(cggr.restore(copy.deepcopy(model)))
        optimizer.step()
        steps += 1
    assert steps == len(batches)
    assert differs, "the two routers never disagree: nothing was tested"
    assert model.cggr.captures == 1


def test_batches_ahead_are_scored_under_the_autocast_of_the_steps() -> None:
    """They are fetched outside of it; in fp32 they would be another capture, and other scores."""
    model = toy()
    scored = []
    given = model.cggr.runtime.given
    give = given.give
    given.give = lambda scores: (scored.append(scores), give(scores))
    for batch in model.cggr.score_ahead([toy_batch(8)] * 3):
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
            inside = model.cggr.score(batch)
    assert model.cggr.captures == 1
    assert torch.equal(scored[-1], inside)
    assert not torch.equal(inside, model.cggr.score(batch)), "bf16 and fp32 agree: nothing was tested"


def test_scoring_leaves_training_as_it_is() -> None:
    """Random numbers, gradients, metrics and the outputs that a step stores."""
    model, batch = toy(), toy_batch(8)
    model(**batch)[0].backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    selected, state = model.cggr.selected, torch.get_rng_state()
    model.cggr.score(toy_batch(8, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.cggr.selected is selected
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_one_row_and_warm_up_keep_everything_and_drop_the_scores() -> None:
    model = toy(warmup_steps=2)
    model.cggr.use_scores(model.cggr.score(toy_batch(8)))
    model(**toy_batch(8))
    assert model.cggr.selected.tolist() == list(range(8))
    model.cggr.step()
    model.cggr.step()
    model(**toy_batch(8))
    assert model.cggr.selected.tolist() == route(model, toy_batch(8)).hardest(4)
    model.cggr.use_scores(model.cggr.score(toy_batch(1)))
    model(**toy_batch(1))
    assert model.cggr.selected.tolist() == [0]


def test_other_inner_backends_take_them() -> None:
    model, eager, batch = toy(inner="aot_eager"), cggr.restore(toy()), toy_batch(4)
    model.cggr.use_scores(torch.tensor([3.0, 1.0, 2.0, 0.0]))
    model(**batch)[0].backward()
    assert model.cggr.selected.tolist() == [0, 2]
    eager(**oracle.rows_of(batch, torch.tensor([0, 2])))[0].backward()
    for found, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"route": "token", "selection": "topk"}, "route='token' selects by the scores of tokens"),
        ({"route": ("sequence", "loss"), "selection": "topk"}, "selects by the scores of tokens"),
        ({"selection": "random"}, "selection='random' reads no scores"),
        ({"dynamic_threshold": True}, "dynamic_threshold=True needs the router's confidence"),
    ],
)
def test_what_cannot_take_scores_says_so(options: dict[str, Any], problem: str) -> None:
    model = toy(**options)
    for call in (model.cggr.score, model.cggr.use_scores, model.cggr.score_ahead):
        with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
            call(toy_batch())


def test_bad_scores_and_calls_are_refused_and_leave_no_trace() -> None:
    model = toy()
    model.cggr.use_scores(torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) for a batch of 4 rows"):
        model(**toy_batch(4))
    with pytest.raises(ValueError, match=r"the scores of rows \[1, 3\] are NaN"):
        model.cggr.use_scores(torch.tensor([0.0, torch.nan, 1.0, torch.nan]))
    model(**toy_batch(4))
    with pytest.raises(cggr.CannotOptimize, match="labels"):
        model.cggr.score({"input_ids": toy_batch()["input_ids"]})
    model.eval()
    with pytest.raises(ValueError, match="eval mode"):
        model.cggr.score(toy_batch())
    model.train()
    model(**toy_batch(4))[0].backward()
    assert model.cggr.selected.tolist() == route(model, toy_batch(4)).hardest(2)


def test_what_cannot_be_scored_ahead_is_handed_on() -> None:
    """A batch without labels, where training without routing is allowed; an evaluation between two steps."""
    model = toy(fallback="eager")
    unlabelled = {"input_ids": toy_batch()["input_ids"]}
    batches = [toy_batch(), toy_batch(), toy_batch(), unlabelled, toy_batch()]

    def train() -> list[int]:
        places = []
        for place, batch in enumerate(model.cggr.score_ahead(batches)):
            model.train(place != 0)
            model(**batch)
            places.append(place)
        return places

    with pytest.warns(RuntimeWarning, match="labels"):
        places = train()
    assert places == [0, 1, 2, 3, 4]
    assert model.cggr.selected.tolist() == route(model, toy_batch()).hardest(2)


@pytest.mark.parametrize("fallback", ["eager", "raise"])
def test_a_refused_step_leaves_its_scores_to_no_other(fallback: str) -> None:
    """Whether it trains without routing or not at all."""
    eager, batch = build("llama"), token_batch(6)
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, selection="topk", fallback=fallback)
    own = oracle.expected_rows(eager, ARCHITECTURES["llama"], batch, 0.5, 1)
    others = [row for row in range(6) if row not in own.tolist()]
    model.cggr.use_scores(torch.zeros(6).index_fill(0, torch.tensor(others), 1.0))
    with pytest.raises(cggr.CannotOptimize) if fallback == "raise" else pytest.warns(RuntimeWarning):
        model(**batch, output_hidden_states=True)
    model(**batch)
    torch.testing.assert_close(model.cggr.selected, own)


@pytest.mark.parametrize("leave", ["break", "error", "skip"])
def test_a_batch_scored_ahead_that_does_not_train_leaves_its_scores_to_no_other(leave: str) -> None:
    model = toy()
    batches = [toy_batch(8, seed=seed) for seed in range(4)]
    last = route(model, batches[3]).hardest(4)
    with suppress(KeyError):
        for place, batch in enumerate(model.cggr.score_ahead(batches)):
            if place < 2:
                model(**batch)
            elif leave == "break":
                break
            elif leave == "error":
                raise KeyError
    assert route(model, batches[2]).hardest(4) != last
    model(**batches[3])
    assert model.cggr.selected.tolist() == last


def test_a_loop_that_was_left_takes_nobody_elses_scores_back() -> None:
    model, batch = toy(), toy_batch(6)
    ahead = model.cggr.score_ahead([batch] * 3)
    for _ in range(3):
        model(**next(ahead))
    model.cggr.use_scores(torch.arange(6.0))
    ahead.close()
    model(**batch)
    assert model.cggr.selected.tolist() == [3, 4, 5] != route(model, batch).hardest(3)


def test_a_buffer_of_scores_may_change_once_it_was_given() -> None:
    """Also in front of a backward that runs the step again."""
    model, batch, scores = toy(), toy_batch(6), torch.arange(6.0)
    model.cggr.use_scores(scores)
    scores.neg_()
    loss = checkpoint(lambda: model(**batch)[0], use_reentrant=False)
    assert model.cggr.selected.tolist() == [3, 4, 5]
    scores.fill_(0)
    loss.backward()
    found, eager = oracle.gradients(model), Toy().train()
    eager.load_state_dict(model.state_dict())
    eager(**oracle.rows_of(batch, torch.tensor([3, 4, 5])))[0].backward()
    oracle.assert_same_gradients(found, oracle.gradients(eager))


def test_a_step_without_a_loss_says_why_it_has_no_scores() -> None:
    class Unread(Toy):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
            return super().forward(input_ids)

    model = cggr.optimize(Unread().train(), **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match="no rows to score: no labels were passed"):
        model.cggr.score(toy_batch())


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_router_beside_the_step_chooses_the_same_rows(graphs: bool) -> None:
    """On a stream of its own, with and without CUDA graphs: rows and weights of scoring each batch before the update,
    in the order of one stream."""
    models = [cggr.optimize(build("llama").cuda(), **OPTIONS, inner="aot_eager", cuda_graphs=graphs) for _ in range(2)]
    beside, inline = models
    batches = [{key: each.cuda() for key, each in token_batch(8, seed=seed).items()} for seed in range(8)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    scores = None
    for place, batch in enumerate(beside.cggr.score_ahead(batches)):
        if scores is not None:
            inline.cggr.use_scores(scores)
        scores = inline.cggr.score(batches[place + 1]) if 0 < place < len(batches) - 1 else None
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        assert torch.equal(beside.cggr.selected, inline.cggr.selected), place
    for found, expected in zip(beside.parameters(), inline.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
