"""Metrics against Python's statistics, over any step; and that they are there, as 0-d tensors that are not NaN."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.program import StepOutputs
from cggr_compile.run.metrics import METRICS, LastStep, metrics_of

WITHOUT_ROUTER = {"score_mean", "score_selected_mean", "score_cv", "rows_nan_score", "mean_confidence"}
OF_TOKENS = {"tokens_total", "tokens_selected", "selection_rate_short", "selection_rate_long"}
OF_TOKEN_ROUTES = {
    *("token_kept_ratio", "loss_kept_ratio"),
    *("documents_total", "documents_selected", "documents_too_long"),
}
OF_OTHERS = {"auto_selects", "auto_progress", "steps_selected_locally"}  # of "auto", and of several ranks


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with counts and scores, and a selection of the counted ones, filled up with a repetition of weight 0."""
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    numbers = st.integers(-3, 9).map(lambda number: number / 2) | st.just(math.nan)
    scores = [draw(numbers) if count else 0.0 for count in counts]
    counted = [row for row, count in enumerate(counts) if count]
    selected = sorted(draw(st.sets(st.sampled_from(counted)))) if counted else []
    weights = [draw(st.sampled_from([0.25, 1.0, 3.0])) for _ in selected]
    fillers = draw(st.integers(0 if selected else 1, 2))
    rows = [*selected, *[selected[-1] if selected else 0] * fillers]
    return {
        "total": len(counts),
        "fraction": draw(st.floats(0.1, 1)),
        "rows": torch.tensor(rows),
        "weights": torch.tensor([*weights, *[0.0] * fillers]),
        "scores": torch.tensor(scores),
        "counts": torch.tensor(counts),
        "confidence": None,
    }


def mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0


@given(step=steps())
def test_figures_of_a_step(step: dict[str, Any]) -> None:
    counts, scores, weights = (step[name].tolist() for name in ("counts", "scores", "weights"))
    selected = {row for row, weight in zip(step["rows"].tolist(), weights, strict=True) if weight}
    counted = [row for row, count in enumerate(counts) if count]
    median = statistics.median([counts[row] for row in counted]) if counted else 0
    of_counted = [scores[row] for row in counted if not math.isnan(scores[row])]
    expected = {
        "rows_total": len(counts),
        "rows_selected": len(selected),
        "kept_ratio": len(selected) / len(counts),
        "ratio_target": step["fraction"],
        "effective_sample_size": sum(weights) ** 2 / sum(w * w for w in weights) if selected else 0,
        "weight_max": max(weights),
        "tokens_total": sum(counts),
        "tokens_selected": sum(counts[row] for row in selected),
        "selection_rate_short": mean([row in selected for row in counted if counts[row] < median]),
        "selection_rate_long": mean([row in selected for row in counted if counts[row] >= median]),
        "score_mean": mean(of_counted),
        "score_selected_mean": mean([scores[row] for row in selected if not math.isnan(scores[row])]),
        "rows_nan_score": len(counted) - len(of_counted),
        "score_cv": statistics.pstdev(of_counted) / abs(mean(of_counted)) if mean(of_counted) else 0,
    }
    left = StepOutputs(**{name: step.get(name) for name in StepOutputs._fields})
    found = metrics_of(LastStep(len(counts), 0, len(selected), step["fraction"], left), None)
    assert all(figure.shape == () for figure in found.values())
    assert {name: figure.item() for name, figure in found.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)


UNSEEN = {"parameters_without_gradient", "router_seconds"}
OF_PREDICTIONS = {"entropy", "mean_token_accuracy"}


def test_every_metric_is_documented_and_computed() -> None:
    """Parameters without a gradient: one that nothing reads, one that is frozen (and does not count)."""
    model = Toy().train()
    model.unread = torch.nn.Linear(2, 2, bias=False)
    model.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    cggr.optimize(model, router_layers=2, dynamic_threshold=True, prediction_metrics=True)
    assert model.cggr.metrics() == {}
    loss = model(**toy_batch(ignored=0.3))[0]
    assert set(METRICS) - set(model.cggr.metrics()) == UNSEEN | OF_TOKEN_ROUTES | OF_OTHERS
    loss.backward()
    model.cggr.time_router()
    model(**toy_batch(ignored=0.3))
    found = model.cggr.metrics()
    assert set(found) == set(METRICS) - OF_TOKEN_ROUTES - OF_OTHERS
    assert found["router_seconds"] > 0
    assert found["parameters_without_gradient"] == 1
    model.zero_grad(set_to_none=True)
    assert model.cggr.metrics()["parameters_without_gradient"] == 1
    model.unread.requires_grad_(False)
    model(**toy_batch(ignored=0.3))[0].backward()
    model.cggr.step()
    model.zero_grad(set_to_none=True)
    found = model.cggr.metrics()
    assert found["parameters_without_gradient"] == 0
    assert all(figure.shape == () and figure.isfinite() for figure in found.values())
    ones = cggr.optimize(model, ratio=1.0)
    ones(**toy_batch())
    missing = WITHOUT_ROUTER | OF_TOKENS | UNSEEN | OF_TOKEN_ROUTES | OF_OTHERS | OF_PREDICTIONS
    assert set(METRICS) - set(ones.cggr.metrics()) == missing


def test_parameters_that_came_since_the_capture_are_counted_and_those_that_went_are_not() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, selection="random", inner="eager")
    for change, without in (
        (lambda: None, 0),
        (lambda: model.register_parameter("unread", torch.nn.Parameter(torch.ones(3))), 1),
        (lambda: setattr(model.head, "weight", torch.nn.Parameter(model.head.weight.detach().clone())), 1),
        (lambda: model.register_module("more", torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)), 3),
        (lambda: delattr(model, "more"), 1),
    ):
        change()
        model.zero_grad()
        model(**toy_batch())[0].backward()
        assert model.cggr.metrics()["parameters_without_gradient"] == without
        model.cggr.step()
        model.zero_grad()
        assert model.cggr.metrics()["parameters_without_gradient"] == without
    assert model.cggr.captures == 1


def test_without_a_router_there_are_no_scores() -> None:
    model = cggr.optimize(Toy().train(), selection="random")
    model(**toy_batch())
    missing = WITHOUT_ROUTER | UNSEEN | OF_TOKEN_ROUTES | OF_OTHERS | OF_PREDICTIONS
    assert set(METRICS) - set(model.cggr.metrics()) == missing
    with pytest.raises(ValueError, match="selection='random' runs no router"):
        model.cggr.time_router()


def test_what_only_scores_is_no_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording has a backward; the router by itself has none."""
    model = cggr.optimize(Toy().train(), ratio=0.5, inner="aot_eager")
    model(**toy_batch())
    plan, pool = model.cggr.runtime.plans[0], object()
    monkeypatch.setattr(model.cggr.runtime, "graphs_on", lambda device: pool)
    assert plan.scoring("router scores", model.cggr.config).variant.pool is None
    assert plan.unrouted.pool is pool


def test_timing_the_router_leaves_training_as_it_is() -> None:
    """The sampled head draws, and so does the selection: what timing drew would move both."""
    gradients = []
    for timed in (False, True):
        torch.manual_seed(0)
        model = cggr.optimize(
            Toy().train(), router_layers=2, router_head="sampled", router_head_frequent=1, router_head_sampled=2,
            selection="trimmed", seed=0,
        )  # fmt: skip
        for step in range(4):
            if timed and step in (0, 2):
                model.cggr.time_router()
            model(**toy_batch())[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"selection": "random"}, {"route": ("sequence", "loss")}])
def test_what_is_predicted_of_the_tokens_in_the_loss(options: dict) -> None:
    """By plain eager logits of the rows that trained, at the positions that the loss saw."""
    model = cggr.optimize(Toy().train(), prediction_metrics=True, **options)
    batch = toy_batch(8, ignored=0.3)
    logits = Toy.forward(model, batch["input_ids"])[0][:, :-1]
    labels = batch["labels"][:, 1:].clone()
    labels[:, ::2] = logits.argmax(-1)[:, ::2].where(labels[:, ::2] != -100, -100)
    batch["labels"][:, 1:] = labels
    model(**batch)
    found, chosen = model.cggr.metrics(), model.cggr.selected
    counted = labels != -100
    if options.get("route"):
        counted &= chosen[1][:, :-1]
    elif "selection" in options:
        counted[[row for row in range(8) if row not in chosen]] = False
    entropy = torch.distributions.Categorical(logits=logits[counted].double()).entropy().mean()
    hits = logits[counted].argmax(-1) == labels[counted]
    assert 0 < hits.float().mean() < 1
    assert found["mean_token_accuracy"] == hits.float().mean()
    torch.testing.assert_close(found["entropy"].double(), entropy, rtol=1e-5, atol=0.0)
