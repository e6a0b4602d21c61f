"""The quality benchmark: what its regimes do to the rows, what its table says, and a run of every part."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import GROUPED, token_batch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH = 4


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Two domains whose rows are all different."""
    path = tmp_path / "tokens.npz"
    np.savez(path, vocabulary=60000, one=np.arange(4000, dtype=np.uint16), two=np.arange(4000, 12000, dtype=np.uint16))
    return path


def test_held_out_rows_are_not_trained_on(quality: None, tokens: Path) -> None:
    import quality_data

    for regime in quality_data.REGIMES:
        train, held_out = quality_data.rows_of(tokens, LENGTH, regime)
        held = np.concatenate(list(held_out.values()))
        whole = {tuple(row) for row in train.tolist()}
        assert not whole & {tuple(row) for row in held.tolist()}
        assert regime == "rare" or train.shape == (3000 - len(held), LENGTH)


def test_regimes_copy_and_spoil(quality: None, tokens: Path) -> None:
    import quality_data

    def shares(regime: str) -> tuple[float, float]:
        train, _ = quality_data.rows_of(tokens, LENGTH, regime)
        noise = (np.diff(train, axis=1) != 1).any(1)  # a clean row counts upwards
        clean = [tuple(row) for row in train[~noise].tolist()]
        return 1 - len(set(clean)) / len(train), noise.mean()

    assert shares("clean") == (0, 0)
    copied, noise = shares("repeats")
    assert noise == 0
    assert copied > 0.4
    assert 0.09 < shares("noise")[1] < 0.11
    assert 0.09 < shares("dirty")[1] < 0.11
    rare, _ = quality_data.rows_of(tokens, LENGTH, "rare")
    assert 0.09 < (rare < 4000).all(1).mean() < 0.11
    assert len({tuple(row) for row in rare.tolist()}) == len(rare) > 1000
    with pytest.raises(ValueError, match="got 'muddy', expected one of clean"):
        quality_data.rows_of(tokens, LENGTH, "muddy")


def test_rows_that_train_are_limited(quality: None, tokens: Path) -> None:
    import quality_data

    every, few = (quality_data.rows_of(tokens, LENGTH, "clean", most) for most in (0, 50))
    assert few.train.shape == (50, LENGTH)
    assert {tuple(row) for row in few.train.tolist()} <= {tuple(row) for row in every.train.tolist()}
    for domain, rows in every.held_out.items():
        assert (few.held_out[domain] == rows).all()


@pytest.mark.parametrize(
    ("text", "name", "layers", "ratio", "batch", "rate", "depth", "matmul"),
    [
        ("compile", "compile", None, 0.5, 32, 1.5e-3, None, False),
        ("defaultx4", "default", None, 0.5, 4, 1.5e-3, None, False),
        ("small=3x64/1e-3", "small", 3, 0.5, 64, 1e-3, None, False),
        ("oracle@0.25x128", "oracle", None, 0.25, 128, 1.5e-3, None, False),
        ("excess", "excess", None, 0.5, 32, 1.5e-3, None, False),
        ("loss-random@0.25x128/2e-3", "loss-random", None, 0.25, 128, 2e-3, None, False),
        ("token-topk@.5", "token-topk", None, 0.5, 32, 1.5e-3, None, False),
        ("token-falling@0.25", "token-falling", None, 0.25, 32, 1.5e-3, None, False),
        ("all+depth=3:0.5", "all", None, 0.5, 32, 1.5e-3, (((3, 0.5),), "copy"), False),
        ("allx64/2e-3+depth=2:0.25:random", "all", None, 0.5, 64, 2e-3, (((2, 0.25),), "random"), False),
        ("trimmed@0.5x64+depth=3:0.5:random", "trimmed", None, 0.5, 64, 1.5e-3, (((3, 0.5),), "random"), False),
        ("all+depth=3:0.25,6:0.5:copy", "all", None, 0.5, 32, 1.5e-3, (((3, 0.25), (6, 0.5)), "copy"), False),
        ("all+depth=3:0.5:zero", "all", None, 0.5, 32, 1.5e-3, (((3, 0.5),), "zero"), False),
        ("allx64+matmul", "all", None, 0.5, 64, 1.5e-3, None, True),
        ("all+depth=3:0.5+matmul", "all", None, 0.5, 32, 1.5e-3, (((3, 0.5),), "copy"), True),
    ],
)
def test_arms_are_parsed(
    quality: None,
    text: str,
    name: str,
    layers: int | None,
    ratio: float,
    batch: int,
    rate: float,
    depth: tuple | None,
    matmul: bool,
) -> None:
    from quality_arms import Arm, Depth

    assert Arm.parse(text) == Arm(name, layers, ratio, batch, rate, depth and Depth(*depth), matmul)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("topc", "'topc' is none of compile"),
        ("rows-topk", "'rows-topk' is none of"),
        ("token-oracle", "'oracle' gives scores of rows"),
        ("falling", "'falling' is none of"),
        ("loss-level", "'loss-level' is none of"),
        ("token-rising+depth=3:0.5", "a sketch takes no"),
        ("token-level@1.5", "the ratio is in"),
        ("small", "small=N"),
        ("small=0", "small=N"),
        ("all=3", "small=N"),
        ("all@0.5", "'all' takes no ratio"),
        ("topk@1.5", "the ratio is in"),
        ("topkx0", "the batch at least 1"),
        ("oracle+depth=3:0.5", "'oracle' takes no"),
        ("small=3+depth=3:0.5", "'small' takes no"),
        ("all+depth=0:0.5", "at least 1 layer"),
        ("all+depth=3:1.0", "a share in"),
        ("all+depth=3:0.5:half", "expected NAME"),
        ("all+depth=3:0.5,3:0.7", "rise"),
        ("all+depth=3:0.5,6:0.4", "rise"),
        ("all+depth=3", "expected NAME"),
        ("all+matmul=3", "expected NAME"),
        ("compile+matmul", "'compile' takes no"),
        ("topk@0.1.2", "expected NAME"),
    ],
)
def test_arms_that_mean_nothing_are_refused(quality: None, text: str, reason: str) -> None:
    import typer
    from quality_arms import Arm

    with pytest.raises(typer.BadParameter) as raised:
        Arm.parse(text)
    assert repr(text) in raised.value.message
    assert reason in raised.value.message


def test_arms_are_options(quality: None) -> None:
    from quality_arms import Arm, easiest

    depth = {"depth_layers": (3,), "depth_until": None, "grow": "copy"}
    expected = {
        "default": {},
        "all": {"ratio": 1.0},
        "small=2": {"ratio": 1.0},
        "all+matmul": {"ratio": 1.0, "matmul": "fp8"},
        "default+matmul": {"matmul": "fp8"},
        "easiest@0.25": {"ratio": 0.25, "selection": easiest, "route": "sequence"},
        "oracle": {"ratio": 0.5, "selection": "trimmed", "route": "sequence", "router_head": "sampled"},
        "loss-random": {"ratio": 0.5, "selection": "random", "route": "loss"},
        "all+depth=3:0.5": {"route": "depth", **depth},
        "random+depth=3:0.5": {"ratio": 0.5, "selection": "random", "route": ("depth", "sequence"), **depth},
    }
    assert {text: Arm.parse(text).options(on_gpu=True) for text in expected} == expected


def test_the_shapes_of_the_schedules(quality: None) -> None:
    from quality_training import FLOOR, SCHEDULES

    linear, wsd = SCHEDULES["linear"], SCHEDULES["wsd"]
    assert [linear(share) for share in (0.0, 0.05, 0.5, 0.75, 1.0, 1.1)] == [0.0, 0.95, 0.5, 0.25, FLOOR, FLOOR]
    assert linear(0.025) == 0.5 * 0.975
    shares = (0.0, 0.025, 0.05, 0.5, 0.8, 0.9, 0.95, 1.0, 1.1)
    assert [wsd(share) for share in shares] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0.25, FLOOR, FLOOR])


def test_a_stall_is_what_the_steps_after_it_do_not_take(quality: None) -> None:
    from quality_training import stall

    steady = [float(second) for second in range(10)]
    assert stall(steady) == stall(steady[:1]) == stall([]) == 0
    grows = [*steady, 11.0, 13.0, 15.0, 17.0, 19.0, 21.0]  # the steps take twice as long from then on
    assert stall(grows) == 0
    assert stall([*steady, *(second + 0.5 for second in grows[10:])]) == 0.5
    assert stall([0.0, 0.25, *(second + 1.25 for second in steady)]) == 0


def _record(arm: str, seed: int, loss: float) -> dict:
    curve = [[1.0, 5, loss + 2], [2.0, 10, loss + 1]]
    measured = {"curve": curve, "spent": 3.0, "steps": 15, "passes": 0.5, "stall": 0.1, "GiB": None}
    return {"arm": arm, "seed": seed, "mean": loss, **measured}


def test_seconds_to_a_loss(quality: None) -> None:
    from quality_report import seconds_to, share_of_budget

    record = _record("a", 0, 4.0)
    assert seconds_to(record, 7.0) == 1.0
    assert seconds_to(record, 4.5) == 2.5
    assert seconds_to(record, 4.0) == 3.0
    assert seconds_to(record, 3.9) is None
    assert share_of_budget(record, record) == 1.0
    assert share_of_budget(record, {**record, "mean": 5.5}) == 0.5
    assert share_of_budget(record, {**record, "mean": 3.9}) is None
    rises = {**record, "curve": [[1.0, 5, 6.0], [1.5, 7, 4.5], [2.0, 10, 5.0]]}
    assert seconds_to(rises, 4.6) == pytest.approx(1.0 + 0.5 * 1.4 / 1.5)


def test_the_table_compares_seed_by_seed(quality: None) -> None:
    from quality_report import table

    records = [_record(arm, seed, loss + seed) for arm, loss in (("a", 4.0), ("b", 3.5)) for seed in range(3)]
    apart = "-0.5000 (-0.5000 to -0.5000) | 0.83 (0.83 to 0.83)"  # the seeds differ by more than the arms do
    assert f"| b | 3 | 15 | 0.50 | 4.5000 | {apart} | 0.10 |  |" in table(records, "a").splitlines()[-1]
    unpaired = [*records, _record("b", 3, 0.0)]
    assert apart in table(unpaired, "a")
    two = [record for record in records if record["seed"] < 2]
    assert "| -0.5000 | 0.83 |" in table(two, "a")
    assert "| +0.5000 (+0.5000 to +0.5000) | — |" in table(records, "b")
    assert "|  |  | 0.10 |" in table(records, "not run").splitlines()[-1]
    repeated = [*records, _record("b", 0, 2.5)]
    assert "| -0.8333 (-1.5000 to -0.5000) |" in table(repeated, "a")


def test_the_table_says_what_failed_and_what_was_not_reached(quality: None) -> None:
    from quality_report import table, table_of_seconds

    failed = {"arm": "c", "seed": 0, "failed": "Traceback\nValueError: no"}
    records = [_record("a", 0, 4.0), _record("a", 1, 4.0), _record("b", 0, 3.5), _record("b", 1, 4.5), failed]
    lines = table(records, "a").splitlines()
    assert "| — (1 of 2) |" in lines[-2]
    assert "| c | failed: ValueError: no |" in lines[-1]
    assert table_of_seconds(records, [5.0, 4.0, 1.0]).splitlines() == [
        "| arm | 5 | 4 | 1 |",
        "| --- | --- | --- | --- |",
        "| a | 2.0 | 3.0 | — |",
        "| b | 2.0 | — (1 of 2) | — |",
    ]


def test_the_interval_is_that_of_the_mean(quality: None) -> None:
    from quality_report import interval

    assert interval([], ".1f") == ""
    assert interval([1.0, 3.0], ".1f") == "2.0"
    few = interval([0.0, 1.0, 2.0], ".4f")
    assert few == "1.0000 (0.0000 to 2.0000)"  # one resample in 27 is all of the lowest, more than 2.5 %
    drawn = np.random.default_rng(3).normal(size=400)
    low, high = (float(part) for part in interval(list(drawn), ".6f").partition("(")[2].rstrip(")").split(" to "))
    error = 1.96 * drawn.std() / 20
    assert low == pytest.approx(drawn.mean() - error, abs=error / 10)
    assert high == pytest.approx(drawn.mean() + error, abs=error / 10)


def test_the_page_has_a_table_for_each_setting_and_a_plot(quality: None, tmp_path: Path) -> None:
    from quality_report import page

    about = {"device": "a device", "commit": "abc", "versions": {"torch": "2"}, "size": "tiny", "length": 16}
    common = {**about, "regime": "clean", "seconds": 3.0}
    records = [{**_record(arm, 0, loss), **common} for arm, loss in (("a", 4.0), ("b", 3.5))]
    records.append({**_record("a", 0, 2.0), **common, "schedule": "wsd"})
    output = tmp_path / "runs.jsonl"
    output.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page(output, "a")
    assert text.startswith("a device, commit abc, torch 2.\n\nclean, 3 s, linear, tiny, rows of 16 tokens\n")
    assert "clean, 3 s, wsd, tiny, rows of 16 tokens" in text
    assert "| arm | 6 | 5 | 4 |" in text
    assert "| b | 1.0 | 1.5 | 2.5 |" in text
    assert "| b | 2.2 |" in page(output, "a", [4.3])
    assert output.with_suffix(".png").stat().st_size > 0


def test_what_is_finished_is_not_run_again(quality: None) -> None:
    import quality

    run = quality.Run("all", "clean", 0, 34.0, "55M", 512)
    record = asdict(run)
    older = {name: value for name, value in record.items() if name not in ("schedule", "rows")}
    assert quality.Run.key(record) == quality.Run.key(older)
    assert quality.Run.key(record) != quality.Run.key({**record, "schedule": "wsd"})


def test_a_finished_queue_runs_nothing(quality: None, tokens: Path) -> None:
    import quality

    output = tokens.with_name("runs.jsonl")
    runs = [quality.Run("all", "clean", seed, 1.0, "tiny", 8, "wsd", 50) for seed in range(2)]
    output.write_text("".join(json.dumps({**asdict(run), "mean": 1.0}) + "\n" for run in runs))
    before = output.read_text()
    quality.main(tokens, output, ["all"], None, [1.0], 2, "tiny", 8, "wsd", rows=50)
    assert output.read_text() == before


@pytest.mark.parametrize(("name", "value"), [("regime", ["muddy"]), ("schedule", "cosine"), ("size", "7B")])
def test_runs_that_could_not_start_are_refused(quality: None, tokens: Path, name: str, value: Any) -> None:
    import quality
    import typer

    with pytest.raises(typer.BadParameter, match=f"{name}: got "):
        quality.main(tokens, tokens.with_name("runs.jsonl"), **{name: value})


def test_a_folder_has_one_file_of_weights(quality: None, tmp_path: Path) -> None:
    import quality
    import quality_data
    import typer

    assert quality_data.gguf_of(tmp_path) is None
    with pytest.raises(typer.BadParameter, match="has no GGUF file"):
        quality.main(tmp_path, tmp_path / "runs.jsonl", weights=tmp_path)
    (tmp_path / "one.gguf").touch()
    assert quality_data.gguf_of(tmp_path) == "one.gguf"
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ValueError, match="several GGUF files: one"):
        quality_data.gguf_of(tmp_path)


@pytest.mark.long
def test_quick(quality: None, capsys: pytest.CaptureFixture) -> None:
    import quality

    quality.main(quick=True)
    page = capsys.readouterr().out
    assert "failed" not in page
    for arm in ("allx4", "trimmed@0.5x4", "oracle@0.5x4", "small=2x4", "defaultx4", "allx4+matmul"):
        assert f"| {arm} | 1 |" in page
    assert "wsd, tiny, 400 rows of 16 tokens" in page


def test_a_run_trains(quality: None, tokens: Path) -> None:
    import quality
    import torch

    run = quality.Run("trimmed@0.5x4/0.01", "dirty", 0, 1.0, "tiny", 8)
    record = quality.trained(run, _few(tokens), torch.device("cpu"))
    assert record["steps"] > 5
    assert record["spent"] >= 1.0
    assert record["mean"] < record["curve"][0][2]


def test_a_run_waits_for_its_turn_once_it_has_its_rows(quality: None, tokens: Path, tmp_path: Path) -> None:
    import fcntl
    import threading

    import quality
    import torch

    run = quality.Run("allx4", "clean", 0, 0.2, "tiny", 8)
    source, read, turn = _few(tokens), threading.Event(), tmp_path / "turn"
    waiting = SimpleNamespace(rows=lambda _: (source.rows(run), read.set())[0], tokens=source.tokens, weights=None)
    found: list = []
    thread = threading.Thread(
        target=lambda: found.append(quality.trained(run, waiting, torch.device("cpu"), turn)), daemon=True
    )
    with turn.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        assert read.wait(60)
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(120)
    assert found[0]["steps"] > 0
    assert found[0]["held"] >= 0.2


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["0", "1"]), ("3,5", ["3", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_the_gpus_of_a_queue_are_those_that_it_may_use(
    quality: None, visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from harness import gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == names


class Handle:
    """What a depth arm needs of the product, and what was asked of it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.asked: list[str] = []
        self.clock, self.grown_at = clock, []

    def grow(self) -> None:
        self.asked.append("grow")
        self.grown_at.append(self.clock())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.asked.append("in_use")
        yield

    def step(self) -> None:
        self.asked.append("step")


def test_a_depth_arm_grows_at_its_share(quality: None, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    import quality_arms
    import quality_training
    import torch

    run = quality.Run("allx4/0.01+depth=1:0.25,2:0.5", "clean", 0, 1.0, "tiny", 8)
    source = _few(tokens)
    training = quality_training.Training(run, source.rows(run), source, torch.device("cpu"))
    handle = Handle(lambda: training.clock.seconds())
    given: dict = {}

    def optimize(model: torch.nn.Module, **options: object) -> None:
        model.cggr = handle
        given.update(options)

    def attach(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: handle.step())

    monkeypatch.setattr(quality_arms.cggr, "optimize", optimize)
    monkeypatch.setattr(quality_arms.cggr, "attach", attach)
    training.compile()
    depth = {"route": "depth", "depth_layers": (1, 2), "depth_until": None, "grow": "copy"}
    assert given == {"cuda_graphs": False, **depth}
    assert handle.asked == []
    training.train()
    training.losses()
    assert handle.asked.count("grow") == 2
    assert [at >= share for at, share in zip(handle.grown_at, (0.25, 0.5), strict=True)] == [True, True]
    places = [place for place, asked in enumerate(handle.asked) if asked == "grow"]
    for grown, at, place in zip(training.grown, handle.grown_at, places, strict=True):
        assert grown == [pytest.approx(at, abs=0.02), handle.asked[:place].count("step")]
    assert handle.asked.count("in_use") == sum(point[1] <= training.grown[1][1] for point in training.curve)
    assert "in_use" not in handle.asked[places[1] :]


@pytest.mark.long
def test_an_oracle_scores_by_the_whole_model_off_the_clock(
    quality: None, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality
    import quality_arms
    import quality_training
    import torch

    run = quality.Run("oracle@0.5x4/0.01", "clean", 0, 0.5, "tiny", 8)
    source = _few(tokens)
    training = quality_training.Training(run, source.rows(run), source, torch.device("cpu"))
    rows = training.batches.next().rows
    losses = quality_arms.row_losses(training.model, rows)
    with torch.no_grad():
        alone = torch.stack([training.model(input_ids=row[None], labels=row[None]).loss for row in rows])
    torch.testing.assert_close(losses, alone)

    pause, whole = 0.02, quality_arms.row_losses

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(pause)
        return whole(*arguments)

    monkeypatch.setattr(quality_arms, "row_losses", slow)
    training.compile()
    started = time.perf_counter()
    spent = training.train()
    assert training.steps > 1
    assert time.perf_counter() - started >= spent + pause * training.steps


@pytest.mark.parametrize(("rule", "kept"), [("falling", [24, 16, 8]), ("level", [16] * 3), ("rising", [8, 16, 24])])
def test_tokens_are_drawn_for_each_layer(quality: None, rule: str, kept: list[int]) -> None:
    """Those that a layer does not run on pass it by, as they are."""
    from quality_arms import PROFILES, draw_tokens_by_layer

    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 5})).train()
    plain = copy.deepcopy(model)
    draw_tokens_by_layer(model, 0.5, PROFILES[rule])
    passed: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, given, out: passed.extend((given[0], out)))
    ids = token_batch(2, 32)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    changed = [(out != hidden).any(-1).sum(1) for hidden, out in zip(passed[::2], passed[1::2], strict=True)]
    assert torch.stack(changed).tolist() == [[32, 32], *([each, each] for each in kept), [32, 32]]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_zeroed_layers_are_identities_when_the_model_grows(quality: None) -> None:
    from quality_arms import Arm, Step

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 4})).train()
    batch = token_batch()
    Step(Arm.parse("all+depth=2:0.5:zero"), model, torch.device("cpu"), torch.zeros(0))
    small = model(**batch).loss
    model.cggr.grow()
    assert torch.equal(model(**batch).loss, small)


def test_scores_of_excess_and_remembered_arms(quality: None) -> None:
    import torch
    from quality_arms import Arm, Batch, Step

    given: list[torch.Tensor] = []
    scored = torch.tensor([1.0, 2.0, 3.0])

    class Routed:
        def score(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            assert batch["input_ids"] is batch["labels"] is rows
            return scored

        def use_scores(self, scores: torch.Tensor) -> None:
            given.append(scores.clone())

    rows, places = torch.zeros(3, 4, dtype=torch.int64), torch.tensor([4, 0, 2])
    for name in ("excess", "remembered"):
        step = Step.__new__(Step)
        step.__dict__.update(name=Arm.parse(name).name, device=torch.device("cpu"), known=torch.arange(5.0))
        step.model = SimpleNamespace(cggr=Routed(), zero_grad=lambda **_: None)
        step.forward = lambda **_: SimpleNamespace(loss=torch.zeros((), requires_grad=True))
        for passes in (0, 1):
            step(Batch(rows, places, passes))
            scored = scored + 10
        assert step.known.tolist() == ([0, 1, 2, 3, 4] if name == "excess" else [22, 1, 23, 3, 21])
    assert [scores.tolist() for scores in given] == [[-3, 2, 1], [7, 12, 11], [21, 22, 23], [21, 22, 23]]


@pytest.mark.long
def test_a_reference_model_trains_before_the_clock(quality: None, tokens: Path) -> None:
    import quality
    import torch

    record = quality.trained(
        quality.Run("excess@0.5x4/0.01", "noise", 0, 0.5, "tiny", 8), _few(tokens), torch.device("cpu")
    )
    assert record["steps"] > 1
    assert record["spent"] == pytest.approx(0.5, abs=0.4)


def _few(tokens: Path) -> Any:
    """The same rows with a small vocabulary, as a source."""
    from quality_training import Source

    given = np.load(tokens)
    path = tokens.with_name("few.npz")
    np.savez(path, vocabulary=50, **{name: given[name] % 50 for name in ("one", "two")})
    return Source(path, None)
