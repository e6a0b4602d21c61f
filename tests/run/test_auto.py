"""`selection="auto"`: when it selects and when no more, what trains meanwhile, and that training does not notice it."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build, token_batch
from cggr_compile.kernels.reference.selection import RULES
from ddp_worker import deciding_rank
from graphs_on_cpu import graphs_on_cpu  # noqa: F401  a fixture
from hypothesis import given
from hypothesis import strategies as st
from logs import logged_warnings
from ranks import on_two_ranks
from torch import Tensor
from toys import Toy, noisy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.program import StepOutputs
from cggr_compile.run import agreement
from cggr_compile.run import auto as auto_module
from cggr_compile.run.auto import EVERY, LEAST, PAYS, PAYS_NO_MORE, PROBE, WINDOW, Auto, progress, quantiles


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions every second step."""
    monkeypatch.setattr(auto_module, "EVERY", 2)


OPTIONS = {"selection": "auto", "router_layers": 2, "inner": "eager", "seed": 3}


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=40))
def test_quantiles_are_the_median_and_the_95th_percentile(losses: list[float]) -> None:
    expected = np.quantile(np.array(losses, dtype=np.float32), [0.5, 0.95], method="linear")
    assert quantiles(losses) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(st.floats(2, 12), st.floats(0, 3), st.floats(-1, 6), st.floats(-1, 2))
def test_progress_is_the_hard_rows_fall_over_the_medians(
    middle: float, above: float, fell: float, share: float
) -> None:
    found = progress((middle, middle + above), (middle - fell, middle + above - share * fell))
    if fell >= LEAST + 1e-6:
        assert found == pytest.approx(share, abs=1e-6)
    elif fell < LEAST - 1e-6:
        assert found is None


# When it selects


def step_with(losses: Tensor, counts: Tensor | None = None) -> StepOutputs:
    every = torch.ones(len(losses), dtype=torch.int64)
    nothing = dict.fromkeys(StepOutputs._fields)
    return StepOutputs(**{**nothing, "scores": losses, "counts": every if counts is None else counts})


def seen(auto: Auto, losses: Tensor, steps: int) -> None:
    """A step on WINDOW rows, the decision that sends their losses and the one that reads them."""
    auto.probes = True  # where rows are selected
    auto.see(step_with(losses), steps)
    for step in (steps, steps + EVERY):
        auto.decide(step)


def losses_of(found: float) -> Tensor:
    """WINDOW losses whose hard rows fell by so much of what the others fell since they were all about 8."""
    hard = WINDOW // 10
    return torch.cat([torch.full((WINDOW - hard,), 4.0), torch.full((hard,), 8 - 4 * found)])


@pytest.mark.parametrize(
    ("found", "selects"),
    [
        ((1.0,), False),
        ((PAYS + 0.1,), False),
        ((PAYS - 0.1,), True),
        ((PAYS - 0.1, PAYS_NO_MORE - 0.1), True),
        ((PAYS - 0.1, PAYS_NO_MORE + 0.1), False),
        ((PAYS - 0.1, 1.0, PAYS + 0.1), False),
    ],
)
def test_it_selects_by_progress_and_holds_on_for_a_while(found: tuple[float, ...], selects: bool) -> None:
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    seen(auto, torch.full((WINDOW,), 8.0), 1000)
    assert (
        str(auto)
        == f"every row trains; the median loss fell 0.00 nats since the first 512 rows, and {LEAST} are needed"
    )
    for number, each in enumerate(found):
        seen(auto, losses_of(each), 1001 + 1000 * (number + 1))
    assert auto.progress == pytest.approx(found[-1])
    assert auto.selects is selects
    assert auto.in_force.ratio == (0.5 if selects else 1.0)


def test_it_goes_back_where_nothing_can_be_told_any_more() -> None:
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    seen(auto, torch.full((WINDOW,), 8.0), 1000)
    seen(auto, losses_of(0.0), 2000)
    assert auto.selects
    seen(auto, torch.full((WINDOW,), 7.5), 5000)  # harder text
    assert not auto.selects
    assert auto.progress is None
    assert str(auto).startswith("every row trains; the median loss fell 0.50 nats")


def test_one_step_in_many_keeps_every_row_while_rows_are_selected() -> None:
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    seen(auto, torch.full((WINDOW,), 8.0), 1000)
    seen(auto, losses_of(0.0), 1001 + EVERY)
    kept = []
    for step in range(2000, 2000 + 2 * PROBE):
        auto.decide(step)
        kept.append(auto.in_force.ratio)
        auto.see(step_with(torch.full((WINDOW,), 1.0 if kept[-1] == 1 else math.inf)), step)
        assert auto.in_force.ratio == (0.5 if auto.selects else 1.0)  # what is shown between steps
    assert [step for step, ratio in enumerate(kept) if ratio == 1][:2] == [0, 2 * EVERY]  # then the noise is over
    assert not auto.selects


def test_too_few_losses_and_those_that_are_not_finite_decide_nothing() -> None:
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    losses = torch.full((WINDOW,), math.nan)
    losses[: WINDOW // 2 + 9] = torch.linspace(0, 1, WINDOW // 2 + 9) ** 4
    counts = torch.ones(WINDOW, dtype=torch.int64)
    counts[:9] = 0
    auto.see(step_with(losses, counts), EVERY)
    for step in (auto.due, 2 * auto.due):
        auto.decide(step)
    assert auto.progress is None
    assert "256 of the 512 rows" in str(auto)
    assert not auto.selects


RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "auto-tails-h200.jsonl"


@pytest.mark.parametrize(("regime", "by"), [("clean", None), ("repeats", None), ("noise", 450), ("dirty", 350)])
def test_recorded_runs_are_told_apart(regime: str, by: int | None) -> None:
    """Of a 55M model on an H200: the losses of 128 rows every 25 steps."""
    [losses] = [found["losses"] for found in map(json.loads, RECORDED.open()) if found["regime"] == regime]
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    selects, progress = [], []
    for step, each in losses:
        auto.decide(step)
        auto.probes = True  # the recorded run kept every row throughout
        auto.see(step_with(torch.tensor(each)), step)
        selects += [step] if auto.selects else []
        progress += [] if auto.progress is None else [auto.progress]
    if by is None:
        assert not selects
        assert min(progress) > 0.7
    else:
        assert selects == [step for step, _ in losses if step >= by]
        assert progress[-1] < 0.25


@pytest.mark.parametrize(("share", "selects"), [(0.0, False), (0.12, True)])
def test_noise_in_the_data_is_seen_while_training(share: float, selects: bool, often: None) -> None:
    torch.manual_seed(0)
    model = cggr.optimize(Toy().train(), **OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cggr.attach(model, optimizer)
    with logged_warnings() as logged:
        for number in range(90):
            model(**noisy(32, number, share))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    switches = [
        message for message in logged if "trimmed rows train" in message and "ratio=1 keeps every row" in message
    ]
    assert len(switches) == selects
    metrics = {name: value.item() for name, value in model.cggr.metrics().items()}
    assert metrics["auto_selects"] == selects, metrics
    assert len(model.cggr.selected) == (16 if selects else 32)
    assert model.cggr.captures == 1
    assert ("none: everything is kept" in str(model.cggr.report())) is not selects
    assert ("+ select: trimmed" in model.cggr.diff().summary()) is selects


def test_with_a_ratio_of_one_nothing_is_selected_whatever_the_losses_show() -> None:
    auto, halves = (Auto(cggr.RoutingConfig(selection="auto", ratio=ratio)) for ratio in (1.0, 0.5))
    for each in (auto, halves):
        seen(each, torch.full((WINDOW,), 8.0), 1000)
        seen(each, losses_of(0.0), 2000)
    assert (auto.selects, halves.selects) == (False, True)
    assert str(auto) == "every row trains: ratio=1"
    auto.load_state_dict(halves.state_dict())
    assert not auto.selects


# What trains


def test_every_row_trains_as_in_eager() -> None:
    eager = build("llama")
    model = cggr.optimize(copy.deepcopy(eager), selection="auto", inner="eager")
    for seed in range(3):
        batch = token_batch(seed=seed)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model.zero_grad()
        eager.zero_grad()
        loss, expected = model(**batch).loss, eager(**batch).loss
        loss.backward()
        expected.backward()
        model.cggr.step()
        assert torch.equal(loss, expected)
        for (name, parameter), wanted in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert torch.equal(parameter.grad, wanted.grad), name
        assert torch.equal(state, torch.get_rng_state())
        assert model.cggr.selected.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("options", "selection", "ratio"),
    [
        ({}, "trimmed", 1.0),
        ({"ratio": 1}, "trimmed", 1.0),
        ({"route": ("depth", "sequence"), "depth_layers": 1}, "trimmed", 0.5),
        ({"route": ("depth", "token"), "depth_layers": 1}, "random", 0.5),
        ({"route": ("depth", "sequence"), "depth_layers": 1, "selection": "auto"}, "auto", 0.5),
        ({"route": "depth", "depth_layers": 1}, "trimmed", 1.0),
        ({"ratio": 0.25}, "trimmed", 0.25),
        ({"warmup_steps": 3}, "trimmed", 0.5),
        ({"selection": "auto"}, "auto", 0.5),
        ({"selection": "random"}, "random", 0.5),
        ({"selection": "auto", "ratio": 0.25}, "auto", 0.25),
        ({"route": "token"}, "random", 0.5),
        ({"route": "segment"}, "trimmed", 0.5),
        ({"route": ("sequence", "loss")}, "random", 0.5),
        ({"dynamic_threshold": True}, "trimmed", 0.5),
    ],
)
def test_what_is_chosen_where_it_is_left_out(options: dict[str, Any], selection: str, ratio: float) -> None:
    config = cggr.RoutingConfig.from_options(options)
    assert (config.selection, config.ratio) == (selection, ratio)
    assert dataclasses.replace(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_what_was_left_out_follows_the_route() -> None:
    config = cggr.RoutingConfig(ratio=0.5)
    assert dataclasses.replace(config, route="token").selection == "random"
    assert dataclasses.replace(config, route="token", selection="trimmed").selection == "trimmed"
    named = dataclasses.replace(cggr.RoutingConfig(ratio=0.5, selection="trimmed"), route="token")
    assert named.selection == "trimmed"


@pytest.mark.parametrize("rule", [*RULES, "auto"])
def test_growing_alone_selects_by_no_rule(rule: str) -> None:
    with pytest.raises(cggr.ConfigError, match=r"selection with route='depth', which selects nothing; use route=\("):
        cggr.RoutingConfig(route="depth", depth_layers=1, selection=rule)


@pytest.mark.parametrize("option", [{"scoring": "entropy"}, {"router_head": "sampled"}, {"router_layers": 3}])
def test_how_to_score_needs_a_rule_where_the_default_draws(option: dict[str, Any]) -> None:
    [(name, value)] = option.items()
    with pytest.raises(cggr.ConfigError, match=f"{name}={value!r} with route='token'.*give selection='topk'"):
        cggr.RoutingConfig(route="token", **option)
    assert cggr.RoutingConfig(route="token", selection="topk", **option).selection == "topk"


def test_a_single_row_is_no_choice_and_no_cause_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    model = cggr.optimize(Toy().train(), selection="auto", inner="eager")
    for seed in range(3):
        model(**toy_batch(1, seed=seed))[0].backward()
        model.cggr.step()
    assert "auto            every row trains; a batch of one row leaves none to choose from" in str(model.cggr.report())
    assert not [warning for warning in recwarn if "one row" in str(warning.message)]


class NoStack(Toy):
    """One layer: no router can be cut out of it."""

    def __init__(self) -> None:
        super().__init__(1)


def test_a_model_without_layers_keeps_every_row_and_says_why() -> None:
    torch.manual_seed(0)
    eager = NoStack().train()
    model = cggr.optimize(copy.deepcopy(eager), selection="auto", inner="eager")
    with logged_warnings() as logged:
        for seed in range(3):
            assert torch.equal(model(**toy_batch(8, seed=seed))[0], eager(**toy_batch(8, seed=seed))[0])
            model.cggr.step()
    assert [
        message
        for message in logged
        if message.startswith("cggr: every row goes on training: cannot optimize: no layer")
    ]
    assert len(logged) == 1
    assert "auto            every row trains; there are no scores: no layer stack" in str(model.cggr.report())
    assert [model(**batch)[0].item() for batch in model.cggr.score_ahead([toy_batch(8)] * 3)]
    chosen = cggr.optimize(eager, ratio=0.5, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match="no layer stack"):
        chosen(**toy_batch(8))


def test_programs_that_may_come_are_compiled_as_soon_as_steps_are_counted_and_not_before() -> None:
    model = cggr.optimize(Toy().train(), selection="auto", router_layers=1, inner="aot_eager")
    model(**toy_batch(8))[0].backward()
    [plan] = model.cggr.runtime.plans
    assert set(plan.variants) == {"unrouted"}
    assert "auto            every row trains; nothing is decided until steps are counted" in str(model.cggr.report())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cggr.attach(model, optimizer)
    model(**toy_batch(8))[0].backward()
    optimizer.step()
    compiled = {name: variant.compilations for name, variant in plan.variants.items()}
    assert compiled == {"unrouted": 1, "trimmed": 1}
    model.cggr.runtime.auto.selects = True
    model(**toy_batch(8))[0].backward()
    assert {name: variant.compilations for name, variant in plan.variants.items()} == compiled
    assert len(model.cggr.selected) == 4


def test_an_agreement_is_the_mean_of_what_is_known_once_everybody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "PATIENCE", 0.0)
    store, ranks = torch.distributed.HashStore(), []
    for _ in range(3):
        monkeypatch.setattr(agreement, "_made", itertools.count())  # as in processes of their own
        ranks.append(agreement.Agreement(store, 3))
    assert ranks[0].found() == (True, None)
    for numbers, mean in (((None, None, None), None), ((None, 1.0, 4.0), 2.5), ((1.0, 1e30, 0.5), (1e6 + 1.5) / 3)):
        for rank, number in zip(ranks, numbers, strict=True):
            assert rank is ranks[0] or ranks[0].found() == (False, None)
            rank.tell(number)
        assert [rank.found() for rank in ranks] == [(True, mean if mean is None else pytest.approx(mean))] * 3


@pytest.mark.parametrize("resumed", [325, 350, 351, 375, 399, 400])
def test_ranks_that_resume_decide_as_the_whole_run(resumed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from its own state; one of them has noise."""

    def ranks() -> list[Auto]:
        store, made = torch.distributed.HashStore(), []
        for _ in range(2):
            monkeypatch.setattr(agreement, "_made", itertools.count())  # as in processes of their own
            made.append(Auto(cggr.RoutingConfig(selection="auto")))
            made[-1].agreement = agreement.Agreement(store, 2)
        return made

    def decisions(pair: list[Auto], steps: range) -> list[tuple[bool, float | None]]:
        found = []
        for step in steps:
            for rank, auto in enumerate(pair):
                auto.decide(step)
                auto.see(step_with((losses_of(rank * 1.0) if step >= 150 else torch.full((WINDOW,), 8.0))[::8]), step)
            found.append((pair[0].selects, pair[0].progress))
            assert found[-1] == (pair[1].selects, pair[1].progress)
        return found

    monkeypatch.setattr(auto_module, "PAYS", 0.6)
    monkeypatch.setattr(agreement, "PATIENCE", 0.0)
    whole = decisions(ranks(), range(50, 600))
    assert len(set(whole)) > 2
    first, again = ranks(), ranks()
    before = decisions(first, range(50, resumed))
    for auto, other in zip(first, again, strict=True):
        other.load_state_dict(auto.state_dict())
    assert before + decisions(again, range(resumed, 600)) == whole


def test_ranks_go_on_deciding_together_when_a_model_is_optimised_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(agreement, "shared_store", lambda: (store, 2))
    model = cggr.optimize(Toy().train(), selection="auto", router_layers=1)
    cggr.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.cggr.runtime.auto.agreement
    assert cggr.optimize(model, selection="auto", router_layers=2).cggr.runtime.auto.agreement is before is not None
    assert cggr.optimize(model, ratio=0.5).cggr.runtime.auto is None
    assert cggr.optimize(model, selection="auto").cggr.runtime.auto.agreement is not None


@pytest.mark.parametrize("case", ["one", pytest.param("none", marks=pytest.mark.long)])
def test_ranks_decide_together_by_what_all_have_seen(case: str, tmp_path: Path) -> None:
    on_two_ranks(deciding_rank, str(tmp_path), case)


# State


def test_findings_are_saved_and_taken_back(often: None) -> None:
    model = cggr.optimize(Toy().train(), **OPTIONS)
    for seed in range(24):
        model(**toy_batch(32, seed=seed))[0].backward()
        model.cggr.step()
    state = model.cggr.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = cggr.optimize(Toy().train(), **OPTIONS)
    other.cggr.load_state_dict(torch.load(file, weights_only=True))
    assert other.cggr.state_dict() == state
    assert other.cggr.runtime.auto._first == model.cggr.runtime.auto._first is not None
    assert str(other.cggr.runtime.auto) == str(model.cggr.runtime.auto)


def test_a_run_that_is_resumed_before_it_selects_is_the_whole_one(monkeypatch: pytest.MonkeyPatch, often: None) -> None:
    monkeypatch.setattr(auto_module, "WINDOW", 64)

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = cggr.optimize(_toy(), **OPTIONS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        cggr.attach(model, optimizer)
        return model, optimizer

    def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[tuple[float, bool]]:
        found = []
        for number in numbers:
            loss = model(**noisy(32, number, 0.2))[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), model.cggr.runtime.auto.selects))
        return found

    whole = losses(*made(), range(40))
    assert {selects for _, selects in whole} == {False, True}
    model, optimizer = made()
    first = losses(model, optimizer, range(9))
    assert not first[-1][1]
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), model.cggr.state_dict()))
    model, optimizer = made()
    for each, state in zip((model, optimizer, model.cggr), states, strict=True):
        each.load_state_dict(state)
    assert first + losses(model, optimizer, range(9, 40)) == whole


def test_the_state_of_another_version_is_refused_before_any_of_it_is_taken() -> None:
    model = cggr.optimize(Toy().train(), **OPTIONS)
    state = {**model.cggr.state_dict(), "steps": 7}
    del state["auto"]["first"]
    with pytest.raises(ValueError, match="load it with the version that saved it"):
        model.cggr.load_state_dict(state)
    assert model.cggr.runtime.steps == 0


def test_saving_changes_nothing() -> None:
    """Scores that are still on their way are read by the next decision, saved or not."""
    auto = Auto(cggr.RoutingConfig(selection="auto"))
    auto.see(step_with(torch.linspace(0, 1, WINDOW)), EVERY)
    auto.decide(auto.due)
    auto.see(step_with(torch.linspace(0, 1, 20)), auto.due + 1)
    saved = auto.state_dict()
    assert auto.state_dict() == saved
    assert saved["coming"]
    assert saved["seen"]
    other = Auto(cggr.RoutingConfig(selection="auto"))
    other.load_state_dict(saved)
    for each in (auto, other):
        seen(each, torch.linspace(-3, 0, WINDOW), each.due)
    assert auto.state_dict() == other.state_dict()
    assert auto.progress is not None


def test_training_that_begins_anew_decides_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_module, "EVERY", 1)
    model = cggr.optimize(Toy().train(), **OPTIONS)
    for seed in range(3):
        model(**toy_batch(32, seed=seed))[0].backward()
        model.cggr.step()
    model.cggr.runtime.start_over()
    assert model.cggr.runtime.auto.due == 2
    assert "0 of the 512 rows" in str(model.cggr.runtime.auto)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"selection": "auto", "selection_options": {"taw": 1}}, "did you mean 'tau'"),
        ({"selection": "auto", "route": "token"}, "is for whole sequences"),
        ({"selection": "auto", "dynamic_threshold": True}, "no router runs"),
    ],
)
def test_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(cggr.ConfigError, match=reason):
        cggr.RoutingConfig.from_options(options)


def _toy() -> Toy:
    torch.manual_seed(0)
    return Toy().train()


def trained_like_every_row(device: str, **options: Any) -> None:
    """Twelve steps of which every second one decides, and twelve that keep every row: the same training."""
    models = [
        cggr.optimize(_toy().to(device), seed=0, router_layers=1, **each)
        for each in ({"selection": "auto", **options}, {"ratio": 1.0, **options})
    ]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for seed in range(12):
        batch = {name: x.to(device) for name, x in toy_batch(8, seed=seed).items()}
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                losses.append(model(**batch)[0])
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            model.cggr.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-2 if device == "cuda" else 1e-4, atol=1e-5)
    assert models[0].cggr.runtime.auto.due == 12
    assert len(models[0].cggr.state_dict()["auto"]["losses"]) == 6 * 8  # of steps 2 to 7


def test_decisions_beside_replays_leave_training_as_it_is(graphs_on_cpu: None, often: None) -> None:  # noqa: F811
    trained_like_every_row("cpu", inner="aot_eager", cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_decisions_on_a_gpu_leave_training_as_it_is(cuda_graphs: bool, often: None) -> None:
    trained_like_every_row("cuda", cuda_graphs=cuda_graphs)
