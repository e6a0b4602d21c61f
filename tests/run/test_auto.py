"""`selection="auto"`: a probe's numbers against plain eager, when it switches, and that training does not notice it."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, LAYERS, VOCABULARY, build, token_batch
from hypothesis import assume, given
from hypothesis import strategies as st
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.names import operator_counts
from cggr_compile.ir.program import PART
from cggr_compile.run import auto as probing
from cggr_compile.run.auto import DRAWS, LEAST_PROBES, MEMORY, Evidence, Measurement, Probe, Skipped, spearman
from cggr_compile.run.plan import Plan
from cggr_compile.run.step import Step

Batch = dict[str, torch.Tensor]
RATIO, SEED = 0.25, 11
cosines = st.floats(-1, 1, allow_subnormal=False)


def optimized(eager: torch.nn.Module, **options: Any) -> torch.nn.Module:
    options = {"ratio": RATIO, "router_layers": 2, "inner": "eager", "seed": SEED, **options}
    return cggr.optimize(copy.deepcopy(eager), **options)


# What a probe measures


def mean_gradient(model: torch.nn.Module, batch: Batch, rows: tuple[int, ...]) -> torch.Tensor:
    """The gradient of eager's mean token loss on some rows, as one float64 vector."""
    _, gradients = oracle.step(model, oracle.rows_of(batch, torch.tensor(rows)))
    return torch.cat([gradient.flatten().double() for gradient in gradients.values()])


def row_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Each row's mean loss over its counted tokens, in eager."""
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    sums = oracle.token_scores(logits, batch["labels"], "loss", True).sum(1)
    return sums / oracle.counted(batch["labels"], True).clamp(min=1)


def ranks(x: list[float]) -> list[float]:
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, from the definition."""
    x, y = ranks(x), ranks(y)
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(math.fsum((a - mx) ** 2 for a in x) * math.fsum((b - my) ** 2 for b in y))


def break_even_of_llama(router: int, rows: int, length: int) -> float:
    """ω from the numbers of multiply-adds in tiny Llama's matrices and attention."""
    width, inner, keys = 32, 48, 16
    layer = rows * (length * (2 * width * width + 2 * width * keys + 3 * width * inner) + 2 * length * length * width)
    eta = rows * length * width * VOCABULARY / (LAYERS * layer)
    return 1 + (router / LAYERS + eta) / (3 * RATIO * (1 + eta))


class Captured:
    """An eager model and the plan of its copy, run without Dynamo: `_fresh_dynamo` would capture it in every test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: Batch) -> None:
        self.eager = build("llama")
        # Trimmed by nothing is plain top-k.
        options = {"selection": "auto", "probe_every": 1, "selection_options": {"tau": 0.0, "epsilon": 0.0}}
        self.model = optimized(self.eager, **options)
        with monkeypatch.context() as patch:
            patch.setattr(Probe, "before_step", self._record)
            self.model(**batch)

    def _record(self, plan: Plan, inputs: tuple[Any, ...], *_: Any) -> None:
        self.plan, self._inputs = plan, inputs

    def inputs(self, batch: Batch) -> list[Any]:
        """The plan's inputs for another batch."""
        sizes = {"batch": batch["input_ids"].shape[0], "sequence": batch["input_ids"].shape[1]}
        known = {"state": {}, "size": sizes, "batch": batch}
        pairs = zip(self.plan.captured.inputs, self._inputs, strict=True)
        return [known[entry.kind].get(entry.path, given) for entry, given in pairs]

    def step(self, batch: Batch) -> Probe:
        """One step of the plan, with a probe."""
        self.model.cggr.step()
        Step(self.plan, self.model.cggr.runtime)(*self.inputs(batch))
        return self.model.cggr.runtime.probe


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=["mean", "num_items"])
def captured(request: pytest.FixtureRequest, monkeypatch_module: pytest.MonkeyPatch) -> Captured:
    """Losses divided by the number of tokens, or by the caller's count of them."""
    extra = {} if request.param == "mean" else {"num_items_in_batch": torch.tensor(50)}
    return Captured(monkeypatch_module, {**token_batch(16, 12), **extra})


@pytest.mark.parametrize("rows", [16, 21])
def test_cosines_rows_and_correlation_are_those_of_eager(captured: Captured, rows: int) -> None:
    """Held-out rows in several runs: 10 of 21, of which a step keeps 6."""
    batch = token_batch(rows, 12, seed=rows)
    probe = captured.step(batch)
    found = probe.last
    eager = captured.eager

    counted = oracle.counted(batch["labels"], True)
    usable = set(counted.nonzero().squeeze(1).tolist())
    held_out = set(found.held_out)
    candidates = usable - held_out
    k = math.ceil(RATIO * len(candidates))
    assert len(held_out) == len(usable) // 2
    assert held_out < usable
    assert len(found.at_random) == DRAWS
    assert all(len(set(draw)) == k and set(draw) < candidates for draw in found.at_random)

    scores = row_losses(oracle.truncated(eager, ARCHITECTURES["llama"], 2), batch)
    assert list(found.by_score) == sorted(sorted(candidates, key=lambda row: -scores[row])[:k])
    target = mean_gradient(eager, batch, found.held_out)
    expected = [F.cosine_similarity(target, mean_gradient(eager, batch, found.by_score), 0)]
    expected += [F.cosine_similarity(target, mean_gradient(eager, batch, draw), 0) for draw in found.at_random]
    assert found.scores == pytest.approx(expected[0].item(), abs=1e-5)
    assert found.random == pytest.approx(sum(expected[1:]).item() / DRAWS, abs=1e-5)

    pairs = ([values[row].item() for row in found.held_out] for values in (scores, row_losses(eager, batch)))
    assert found.rank_correlation == pytest.approx(correlation(*pairs), abs=1e-5)
    assert probe.break_even == pytest.approx(break_even_of_llama(2, 16, 12), rel=0.01)


def test_uniform_rows_stay_where_the_data_are_one_kind_and_the_router_is_dear(captured: Captured) -> None:
    probe = captured.model.cggr.runtime.probe
    for seed in range(8):
        captured.step(token_batch(16, 12, seed=seed))
    assert probe.probes >= LEAST_PROBES
    assert captured.model.cggr.metrics()["auto_scores"] == 0
    assert captured.model.cggr.report().auto.startswith("random in force; mean cosines")


def test_a_batch_that_is_too_small_is_skipped_and_says_so(captured: Captured) -> None:
    ignored = token_batch(12, 12)
    ignored["labels"].fill_(-100)
    for batch, reason in (
        (token_batch(3, 12), "2 of 3 rows have labels: too few to hold half of them out and take 1 of the 1 others"),
        (ignored, "0 of 12 rows have labels"),
    ):
        probe = captured.model.cggr.runtime.probe
        before = (probe.probes, probe.skipped)
        captured.step(batch)
        assert (probe.probes, probe.skipped) == (before[0], before[1] + 1)
        assert reason in captured.model.cggr.report().auto
        assert captured.model.cggr.metrics()["probes_skipped"] == probe.skipped


def test_between_probes_no_router_runs_and_a_probe_runs_the_same_code(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, batch = captured.plan, token_batch(21, 12)
    captured.step(batch)
    ran: Counter[str] = Counter()

    def counting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            ran[name] += 1
            return run(*inputs)

        return counted

    for name, route in plan.routes.items():
        monkeypatch.setattr(route, "variant", counting(name, route.variant))
    captured.step(batch)
    held_out = math.ceil(10 / 6)  # half of the 20 rows with labels, of which a step's 6 run at a time
    assert ran == {"router scores": 1, "main losses": 1, "random": held_out + 1 + DRAWS + 1}
    ran.clear()
    Step(plan, captured.model.cggr.runtime)(*captured.inputs(batch))
    assert ran == {"random": 1}
    assert not [name for name in operator_counts(plan.program.graph) if "score" in name or "draw" in name]
    assert not {"router", "score"} & {node.meta[PART] for node in plan.program.graph.nodes}


def test_a_step_that_keeps_every_row_is_skipped() -> None:
    owner = SimpleNamespace(config=cggr.RoutingConfig(selection="auto", ratio=1.0))
    found = probing.measure(SimpleNamespace(owner=owner, sizes=lambda inputs: (4, 8)), (), 0, torch.Generator())
    assert found == Skipped("every one of the 4 rows is kept")


# Training does not notice


def trained(selection: str) -> tuple[list[torch.Tensor], torch.nn.Module]:
    """Losses, selections and gradients of steps with dropout, gradient checkpointing and autocast."""
    torch.manual_seed(3)
    eager = ARCHITECTURES["gpt2"].build().train()
    for module in eager.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    eager.gradient_checkpointing_enable()
    head = {"router_head": "sampled", "router_head_frequent": 5, "router_head_sampled": 12}
    model = optimized(eager, selection=selection, probe_every=2, ratio=0.3, **head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(5):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**token_batch(10, 12, seed=step)).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        seen += [loss.detach(), model.cggr.selected, torch.get_rng_state()]
        seen += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        model.cggr.step()
    return seen, model


def test_a_run_with_probes_is_bit_for_bit_the_random_one() -> None:
    probed, model = trained("auto")
    plain, _ = trained("random")
    assert (model.cggr.runtime.probe.probes, model.cggr.metrics()["auto_scores"]) == (2, 0)
    assert len(probed) == len(plain)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(probed, plain, strict=True))


# Decisions


def learnt_rows(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise over 50 tokens: nothing is left to learn once a model predicts them with equal probability."""
    return torch.randint(3, 53, (rows, 12), generator=generator)


def learnt_and_new(seed: int) -> Batch:
    """72 rows of noise with 11 counted labels, and 24 equal rows with 2 counted labels of tokens not seen before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([learnt_rows(72, generator), torch.arange(60, 72).expand(24, 12)])
    labels = ids.clone()
    labels[72:, 3:] = -100
    order = torch.randperm(96, generator=generator)
    return {"input_ids": ids[order], "labels": labels[order]}


def test_it_switches_where_most_rows_are_learnt_and_resumes_bit_for_bit() -> None:
    """A run resumed half-way to the switch has the same losses and switches at the same step."""
    learnt = build("llama")
    optimizer = torch.optim.AdamW(learnt.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        ids = learnt_rows(16, generator)
        learnt(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    # An inner backend that counts as a compiler.
    options = {"selection": "auto", "probe_every": 1, "router_layers": 1, "inner": "eager_noexcept"}
    options |= {
        "router_head": "sampled",
        "router_head_frequent": 16,
        "router_head_sampled": 32,
        "selection_options": {"tau": 0.0, "epsilon": 0.0},
    }
    model = optimized(learnt, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = model.cggr

    def run(first: int) -> Iterator[tuple[float, list[int]]]:
        """Loss and selected rows of each step until scores are in force."""
        for step in range(first, 25):
            optimizer.zero_grad()
            loss = model(**learnt_and_new(step)).loss
            loss.backward()
            optimizer.step()
            handle.step()
            yield loss.item(), handle.selected.tolist()
            if handle.metrics()["auto_scores"]:
                break

    steps = run(0)
    whole = [next(steps) for _ in range(4)]
    saved = io.BytesIO()
    torch.save([model.state_dict(), handle.state_dict()], saved)
    whole += steps
    assert LEAST_PROBES < len(whole) < 25
    assert handle.captures == 1
    assert handle.metrics()["probe_gain"] > handle.metrics()["probe_break_even"] > 1
    assert {"score_mean", "probe_rank_correlation"} <= set(handle.metrics())
    report = handle.report()
    assert (report.selection, report.router.layers) == ("trimmed", 1)
    assert report.auto.startswith("trimmed in force; mean cosines")
    assert report.compilations == {"random": 1, "trimmed": 1, "router scores": 1, "main losses": 1}
    assert "+ select: trimmed" in handle.diff().summary()
    new = learnt_and_new(len(whole) - 1)["input_ids"][:, 0] == 60
    assert new[handle.selected].all()

    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    model.load_state_dict(weights)
    handle.load_state_dict(state)
    assert not handle.metrics()["auto_scores"]
    assert [*run(4)] == whole[4:]


class Log(logging.Handler):
    """The lines of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("cggr_compile"), Log()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def fed(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float] | Skipped], omega: float, **options: Any
) -> list[tuple[int, bool]]:
    """The steps at which a probe with these outcomes ran, and whether scores were in force after each."""
    remaining = iter(found)
    ran: list[int] = []

    def measure(plan: Any, inputs: Any, steps: int, generator: torch.Generator) -> Measurement | Skipped:
        outcome = next(remaining)
        ran.append(steps)
        return outcome if isinstance(outcome, Skipped) else Measurement(*outcome, 0.5, (), (), ())

    monkeypatch.setattr(probing, "measure", measure)
    probe = Probe(cggr.RoutingConfig(selection="auto", **options))
    history = []
    step = 0
    while len(ran) < len(found):
        before = len(ran)
        probe.before_step(SimpleNamespace(break_even=omega), (), step, torch.Generator())
        if len(ran) > before:
            history.append((step, probe.pays))
        step += 1
    return history


NOISE = [0.01, -0.02, 0.015, -0.005, 0.0, 0.02, -0.01, 0.005]


def around(scores: float, random: float) -> list[tuple[float, float]]:
    return [(scores + noise, random - noise / 2) for noise in NOISE]


@pytest.mark.parametrize(
    ("found", "omega", "expected"),
    [
        (around(0.4, 0.2), 1.5, [False] * 4 + [True] * 4),
        (around(0.4, 0.2), 2.5, [False] * 8),
        (around(0.2, 0.19), 1.0, [False] * 5),
        (around(0.4, 0.2) + around(0.1, 0.2) * 3, 1.5, [False] * 4 + [True] * 7),
        (around(-0.1, -0.2), 1.5, [False] * 8),
        ([(0.9, 0.1), (-0.5, 0.3)] * 6, 1.5, [False] * 12),
    ],
    ids=["pays", "pays less than it costs", "undecided", "switches back", "random points away", "noise"],
)
def test_decisions(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float]], omega: float, expected: list[bool]
) -> None:
    """The first outcomes; of the one that switches back also the last."""
    history = [pays for _, pays in fed(monkeypatch, found, omega, probe_every=1)]
    assert history[: len(expected)] == expected
    assert history[-1] == (expected[-1] and len(expected) == len(found))


@pytest.mark.parametrize(("options", "steps"), [({}, [3, 6, 9]), ({"warmup_steps": 7}, [7, 10, 13])])
def test_probes_come_every_so_many_steps_after_the_warm_up_and_the_log_says_what_they_found(
    monkeypatch: pytest.MonkeyPatch, log: list[str], options: dict[str, int], steps: list[int]
) -> None:
    found = [(0.4, 0.2), Skipped("a reason"), (0.3, 0.2)]
    assert [step for step, _ in fed(monkeypatch, found, 1.5, probe_every=3, **options)] == steps
    assert log[0].startswith(f"probe 1 at step {steps[0]}: cosine 0.400 by scores, 0.200 at random")
    assert log[1] == f"probe at step {steps[1]} skipped: a reason"
    assert len(log) == 3


def test_a_switch_is_logged_with_its_reason(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    fed(monkeypatch, around(0.4, 0.2), 1.5, probe_every=1)
    switches = [line for line in log if "switches" in line]
    assert len(switches) == 1
    assert switches[0].startswith("step 5: selection switches to 'trimmed': mean cosines 0.400 by scores and 0.200")
    assert switches[0].endswith("scores pay")


# Laws


@given(st.lists(st.tuples(cosines, cosines), min_size=2, max_size=30), st.floats(1, 10))
def test_the_contrast_and_its_error_are_those_of_weighted_means(pairs: list[tuple[float, float]], omega: float) -> None:
    """Weights MEMORY^age; the error of a weighted mean of independent terms of one variance, estimated unbiased."""
    evidence = Evidence()
    for pair in pairs:
        evidence.add(*pair)
    weights = [MEMORY**age for age in reversed(range(len(pairs)))]
    share = [weight / math.fsum(weights) for weight in weights]
    terms = [scores - omega * random for scores, random in pairs]
    mean = math.fsum(p * term for p, term in zip(share, terms, strict=True))
    squares = math.fsum(p * p for p in share)
    variance = math.fsum(p * (term - mean) ** 2 for p, term in zip(share, terms, strict=True)) / (1 - squares)
    found, error = evidence.contrast(omega)
    assert found == pytest.approx(mean, abs=1e-9)
    assert error == pytest.approx(math.sqrt(variance * squares), abs=1e-6)

    scores, random = (math.fsum(p * pair[i] for p, pair in zip(share, pairs, strict=True)) for i in (0, 1))
    assume(random > 1e-3 and abs(scores - omega * random) > 1e-6)
    assert (evidence.gain > omega) == (mean > 0)


def test_one_probe_decides_nothing() -> None:
    evidence = Evidence()
    evidence.add(0.9, 0.1)
    assert evidence.contrast(1.5) == (pytest.approx(0.75), math.inf)


numbers = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=20)


@given(numbers)
def test_spearman(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    found = spearman(torch.tensor(x), torch.tensor(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(correlation(x, y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_every": 0}, "probe_every=0 is not a positive integer"),
        ({"selection": "auto", "selection_options": {"taw": 1}}, "did you mean 'tau'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"warmup_steps": 100}, {"ratio": 1.0}, {"dense_after_steps": 1}, {"ratio": 0.9}],
    ids=["warm-up", "all", "dense", "small batch"],
)
def test_steps_that_keep_every_row_are_eagers(options: dict[str, Any]) -> None:
    model = cggr.optimize(Toy().train(), **{"ratio": 0.5, "selection": "auto", "inner": "eager", **options})
    eager = cggr.restore(copy.deepcopy(model))
    for step in range(3):
        batch = toy_batch(3, seed=step)
        if "dense_after_steps" in options and not step:
            model(**batch)
            model.cggr.step()
        for each in (model, eager):
            each.zero_grad()
            each(**batch)[0].backward()
        for actual, expected in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(actual.grad, expected.grad)
        model.cggr.step()
    assert model.cggr.runtime.last.kept == 3
