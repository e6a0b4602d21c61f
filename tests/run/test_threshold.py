"""The dynamic threshold: more rows while the router is unsure, one step later, on the ladder, the same every time."""

from __future__ import annotations

import copy
import io
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_head_oracle import fp8_truth
from toys import AS_IT_IS, WIDTH, WORDS, Toy, route, toy_batch

import cggr_compile as cggr
from cggr_compile.run.confidence import Confidence
from cggr_compile.schedule import LADDER_RUNGS

shares = st.floats(0, 1)
LADDERS = {ratio: [1 - (1 - ratio) * rung / LADDER_RUNGS for rung in range(LADDER_RUNGS + 1)] for ratio in (0.1, 0.6)}


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().train()


def optimized(eager: Toy, **options: Any) -> Toy:
    return cggr.optimize(copy.deepcopy(eager), **{"router_layers": 2, "dynamic_threshold": True, **options})


@given(
    ratio=st.sampled_from([0.01, 0.1, 0.25, 0.6, 0.9, 1.0]),
    confidence=shares,
    surer=shares,
    sensitivity=shares,
    step=st.integers(0, 12),
)
def test_the_fraction_is_the_lowest_rung_not_below_the_raised_one(
    ratio: float, confidence: float, surer: float, sensitivity: float, step: int
) -> None:
    common = {"ratio": ratio, "warmup_steps": 10}
    plain = cggr.RoutingConfig(**common).kept_fraction(step)
    common |= {"dynamic_threshold": True, "threshold_sensitivity": sensitivity}
    config = cggr.RoutingConfig(**common)
    assert config.kept_fraction(step) == plain
    assert config.kept_fraction(step, 1.0) == plain
    assert cggr.RoutingConfig(selection="fixed_quota", **common).kept_fraction(step, 0) == plain
    found = config.kept_fraction(step, confidence)
    assert config.kept_fraction(step, max(confidence, surer)) <= found
    ladder = [1 - (1 - ratio) * rung / LADDER_RUNGS for rung in range(LADDER_RUNGS, -1, -1)]
    raised = min(1.0, plain * (1 + (1 - confidence) * sensitivity))
    # What rounding adds is no step up, and less than 1e-8 may pass for it.
    rungs = [next(rung for rung in ladder if rung >= raised - slack) for slack in (1e-12, 1e-8)]
    assert found in [pytest.approx(rung, abs=1e-7) for rung in rungs]


@settings(max_examples=20)
@given(
    ratio=st.sampled_from([0.1, 0.25, 0.6, 1.0]),
    warmup=st.integers(0, 20),
    rising=st.one_of(st.none(), st.integers(1, 20)),
    sensitivity=st.one_of(st.none(), shares),
    step=st.integers(0, 50),
)
def test_what_a_schedule_runs_ahead_is_all_that_its_steps_keep(
    ratio: float, warmup: int, rising: int | None, sensitivity: float | None, step: int
) -> None:
    """By trying: each step from this one on, at a hundred confidences."""
    threshold = {} if sensitivity is None else {"dynamic_threshold": True, "threshold_sensitivity": sensitivity}
    dense = None if rising is None else warmup + rising
    config = cggr.RoutingConfig(ratio=ratio, warmup_steps=warmup, dense_after_steps=dense, **threshold)
    confidences = [None] if sensitivity is None else [each / 100 for each in range(101)]
    kept = {config.kept_fraction(each, confidence) for each in range(step, 60) for confidence in confidences}
    found = config.fractions(step, first=False)
    assert set(found) >= kept
    assert len(found) == len(set(found))
    assert max(found) == max(kept)  # more might not fit into memory
    assert config.fractions(step, first=True) == ([] if config.is_settled(step) else found)
    assert config.is_settled(step) <= (len(kept) == 1)


@settings(max_examples=20)
@given(scale=st.floats(0, 9), sensitivity=st.sampled_from([0.0, 0.3, 0.5, 1.0]), ratio=st.sampled_from([0.1, 0.6]))
def test_the_raised_fraction_is_that_of_the_originals_surface(scale: float, sensitivity: float, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(20, WORDS, generator=generator) * scale, torch.arange(20)
    criterion = cggr.CGGRLoss(min_tokens_ratio=ratio, warmup_steps=0, threshold_sensitivity=sensitivity)
    criterion(logits, targets)
    measured = criterion.get_metrics()
    config = cggr.RoutingConfig(ratio=ratio, dynamic_threshold=True, threshold_sensitivity=sensitivity)
    found = config.kept_fraction(0, measured["avg_confidence"])
    assert found == pytest.approx(min(rung for rung in LADDERS[ratio] if rung >= measured["token_ratio"] - 1e-6))


@pytest.mark.parametrize("ratio", [0.25, 0.8])
def test_k_follows_the_router_of_the_step_before(ratio: float) -> None:
    """At 0.8 the threshold keeps every row: the step is the whole batch's, and the router still runs."""
    eager = toy()
    model = optimized(eager, ratio=ratio, threshold_sensitivity=1.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, eager)]
    fraction, seen = ratio, []
    for step in range(5):
        batch = toy_batch(16, seed=step % 2, ignored=0.2)
        routed = route(eager, batch)
        loss, gradients = oracle_step(model, batch)
        assert model.cggr.metrics()["ratio_target"].item() == pytest.approx(fraction)
        assert model.cggr.metrics()["mean_confidence"].item() == pytest.approx(routed.confidence, rel=1e-5)
        k = -(-round(fraction * 16 * 1e9) // 10**9)
        rows = routed.hardest(k)
        assert sorted(set(model.cggr.selected.tolist())) == rows
        expected_loss, expected = oracle_step(eager, {name: tensor[rows] for name, tensor in batch.items()})
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        oracle.assert_same_gradients(gradients, expected, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        raised = min(1.0, ratio * (2 - routed.confidence))
        fraction = min(f for f in (1 - (1 - ratio) * rung / 8 for rung in range(9)) if f >= raised - 1e-9)
        seen.append(k)
    assert seen[1] > seen[0]
    assert ratio < 0.5 or seen[1] == 16
    model.cggr.runtime.confidence = Confidence(1.0)
    model(**batch)
    assert len(model.cggr.selected) == seen[0]
    assert model.cggr.captures == 1


def oracle_step(model: Toy, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch)[0]
    loss.backward()
    return loss.detach(), oracle.gradients(model)


def test_a_fixed_quota_is_top_k_of_the_plain_fraction() -> None:
    eager = toy()
    model = optimized(eager, ratio=0.25, threshold_sensitivity=1.0, selection="fixed_quota")
    for seed in range(2):
        batch = toy_batch(16, seed=seed, ignored=0.2)
        model(**batch)
        assert model.cggr.selected.tolist() == route(eager, batch).hardest(4)
    assert "mean_confidence" not in model.cggr.metrics()


def test_drifting_confidences_cost_two_compilations() -> None:
    """One for the lowest rung, one for all others, in the first step."""
    model = optimized(toy(), ratio=0.6, threshold_sensitivity=1.0, inner=AS_IT_IS)
    batch, kept = toy_batch(40), set()
    model(**batch)
    assert model.cggr.report().compilations == {"routed": 2}
    for drift in [1.0, *torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()]:
        model.cggr.runtime.confidence = Confidence(drift)
        model(**batch)
        kept.add(len(model.cggr.selected))
    assert kept == {24, 26, 28, 30, 32, 34, 36, 38, 40}
    assert model.cggr.report().compilations == {"routed": 2}


def test_a_resumed_run_is_the_same_run_bit_for_bit() -> None:
    """The state is saved after four steps of a whole run, and what goes on from it has nothing else."""

    def trained(state: dict[str, Any] | None, steps: range) -> tuple[list[int], dict[str, torch.Tensor], io.BytesIO]:
        model = optimized(toy(), ratio=0.25, warmup_steps=2, seed=3, selection="trimmed")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        hook = cggr.attach(model, optimizer)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            model.cggr.load_state_dict(state["routed"])
        kept, file = [], io.BytesIO()
        for step in steps:
            if step == 4:
                routed = model.cggr.state_dict()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "routed": routed}, file)
            oracle_step(model, toy_batch(32, seed=step))
            kept.append(len(model.cggr.selected))
            optimizer.step()
        hook.remove()
        file.seek(0)
        return kept, model.state_dict(), file

    whole, weights, file = trained(None, range(8))
    rest, resumed, _ = trained(torch.load(file, weights_only=True), range(4, 8))
    assert rest == whole[4:]
    assert rest[0] > 8  # the plain k, which a run without the saved confidence would start with
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_confidence_survives_copies_and_a_batch_without_labels() -> None:
    model = optimized(toy(), ratio=0.5)
    model(**toy_batch())
    confidence = model.cggr.state_dict()["confidence"]
    assert confidence == pytest.approx(route(model, toy_batch()).confidence, rel=1e-5)
    twin = copy.deepcopy(model)
    assert twin.cggr.state_dict()["confidence"] == confidence
    batch = toy_batch()
    batch["labels"].fill_(-100)
    model(**batch)
    metrics = model.cggr.metrics()
    assert metrics["mean_confidence"] == 0
    assert all(figure.isfinite() for figure in metrics.values())


def test_the_fp8_head_estimates_the_confidence() -> None:
    """Fails for the exact head's confidence, and for any other rounding of hidden states or weights."""
    eager, batch = toy(), toy_batch(16)
    model = optimized(eager, router_head="fp8")
    model(**batch)
    with torch.no_grad():
        hidden = eager.embed(batch["input_ids"])
        for layer in eager.layers[:2]:
            hidden = hidden + layer(hidden).tanh()
    operands = (hidden[:, :-1].flatten(0, 1), eager.head.weight.detach(), eager.head.bias.detach())
    expected = fp8_truth((*operands, batch["labels"][:, 1:].flatten()))[3].mean().item()
    found = model.cggr.metrics()["mean_confidence"].item()
    # A logit sums WIDTH products and Z as many exponentials as there are words, each rounded once in fp32.
    rounding = (WIDTH + WORDS) * torch.finfo(torch.float32).eps
    assert found == pytest.approx(expected, rel=rounding)
    assert found != pytest.approx(route(eager, batch).confidence, rel=10 * rounding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "random"}, "dynamic_threshold=True with selection='random': no router runs"),
        ({"router_head": "sampled"}, "dynamic_threshold=True with router_head='sampled'.*use router_head='fp8'"),
        ({"dynamic_threshold": 1}, "dynamic_threshold=1 is not a bool"),
        ({"threshold_sensitivity": 1.5}, r"threshold_sensitivity=1\.5 is not in \[0, 1\]"),
        ({"threshold_sensitivity": float("nan")}, r"threshold_sensitivity=nan is not in \[0, 1\]"),
        ({"threshold_sensitivity": True}, r"threshold_sensitivity=True is not in \[0, 1\]"),
    ],
)
def test_bad_options_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**{"dynamic_threshold": True, **options})


@pytest.mark.gpu
def test_on_the_gpu_only_the_event_is_waited_for() -> None:
    """torch's debug mode raises for copies that block; the threshold's own copy does not."""
    eager = toy().cuda()
    model = optimized(eager, ratio=0.25, threshold_sensitivity=1.0, inner="eager")
    batch = {name: tensor.cuda() for name, tensor in toy_batch(16).items()}
    model(**batch)[0].backward()
    with oracle.without_sync():
        for _ in range(2):
            model(**batch)[0].backward()
    assert len(model.cggr.selected) > 4
    assert model.cggr.state_dict()["confidence"] == pytest.approx(route(eager, batch).confidence, rel=1e-4)
