"""The demo end to end on a tiny text for a second, its arms against plain loops, and the first line of each error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer

import cggr_compile as cggr
from cggr_compile.demo import main
from cggr_compile.demo.data import windows_of
from cggr_compile.demo.main import Arm, Evaluation, Settings, build, demo, held_out_loss, train

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

WORDS = ["sea", "and", "ship", "under", "sail", "when", "morning", "came", "we", "saw", "land", "far"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(main, "LAYERS", 4)
    monkeypatch.setattr(main, "WIDTH", 16)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=600)), encoding="utf-8")
    return path


def run(written: Path, **options: Any) -> Path:
    given: dict[str, Any] = {"device": "cpu", "seconds": 0.5, "batch_size": 4, "sequence_length": 16, "seed": 0}
    output = written.parent / "output"
    demo(**{"text": written, "output": output, **given, **options})
    return output


def test_demo_leaves_every_file_and_every_sample(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "LAYERS", 2)
    monkeypatch.setattr(main, "FIRST_LAYERS", 1)
    output = run(text)
    result = json.loads((output / "result.json").read_text())
    plain, grown = result["arms"]["plain"], result["arms"]["cggr"]
    for arm in (plain, grown):
        assert len(arm["step_seconds"]) == len(arm["train_loss"])
        assert sum(arm["step_seconds"][:-1]) < 0.5 <= sum(arm["step_seconds"])
        assert arm["evaluations"][0] | {"loss": None} == {"step": 0, "seconds": 0, "loss": None}
        assert arm["evaluations"][-1]["step"] == len(arm["step_seconds"])
        assert arm["evaluations"][-1]["seconds"] == pytest.approx(sum(arm["step_seconds"]))
    assert plain["evaluations"][0]["loss"] == grown["evaluations"][0]["loss"]
    assert result["settings"]["sequence_length"] == 16
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (output / "diff.html").read_text().lower()
    json.loads((output / "report.json").read_text())
    shown = capsys.readouterr().out
    assert "predicted from counted operations, on any device, not measured:" in shown
    width, inner = main.WIDTH, 8 * main.WIDTH // 3
    layer = 16 * (4 * width**2 + 3 * width * inner) + 2 * 16**2 * width
    share = (layer + 16 * width * main.BYTES) / (2 * layer + 16 * width * main.BYTES)
    assert f"a step of the first 1 of 2 layers  {share:.0%} of a whole one" in shown
    assert "measured in this run, on cpu" in shown
    assert "result.json" in shown


def settings_of(length: int = 16, seconds: float = 10.0) -> Settings:
    return Settings("", "cpu", "fp32", seconds, batch_size=4, sequence_length=length, seed=0)


def test_both_arms_are_plain_loops_on_the_same_batches(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of one second a step: six steps, and growth where 70 % of six are over."""
    ticks = iter(range(1000))
    monkeypatch.setattr(main, "_clock", lambda device: float(next(ticks)))
    windows, settings = windows_of(text.read_text(), "", 16, 4), settings_of(seconds=6.0)
    plain, grown = Arm("plain"), Arm("cggr")
    list(train(build(settings), plain, windows, settings))
    optimized = cggr.optimize(build(settings), route="depth", depth_layers=main.FIRST_LAYERS)
    list(train(optimized, grown, windows, settings))
    assert grown.grown_at == 5
    model = build(settings)
    whole = model.model.layers
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator, expected = torch.Generator().manual_seed(0), []
    model.model.layers = whole[: main.FIRST_LAYERS]
    for number in range(6):
        if number == 5:
            model.model.layers = whole
            whole[3].load_state_dict(whole[0].state_dict())
        share = number / 6
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, share / 0.05) * (1 - share)
        ids = windows.train[torch.randint(len(windows.train), (4,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert grown.train_loss == expected
    assert plain.train_loss[0] == build(settings)(**_batch_of(windows, 0)).loss.item()
    logits = model.eval()(input_ids=windows.held_out).logits[:, :-1].flatten(0, 1)
    truth = F.cross_entropy(logits, windows.held_out[:, 1:].flatten()).item()
    assert grown.evaluations[-1].loss == pytest.approx(truth, rel=1e-5)
    assert held_out_loss(model, windows.held_out) == pytest.approx(truth, rel=1e-5)


def _batch_of(windows: Any, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(windows.train), (4,), generator=generator) for _ in range(number + 1)]
    return {"input_ids": windows.train[picks[number]], "labels": windows.train[picks[number]]}


def test_windows_cover_the_text_once_and_hold_out_its_end(text: Path) -> None:
    written = text.read_text()
    windows = windows_of(written, "", 16, 4)
    expected = list(written.encode())[: len(written) // 16 * 16]
    assert torch.cat([windows.train, windows.held_out]).flatten().tolist() == expected


def test_seconds_to_a_loss_are_those_of_the_first_evaluation_that_has_it() -> None:
    arm = Arm("plain", evaluations=[Evaluation(0, 0.0, 4.0), Evaluation(1, 2.0, 3.0), Evaluation(2, 5.0, 2.0)])
    assert [arm.seconds_to(loss) for loss in (4.0, 3.5, 2.0, 1.0)] == [0.0, 2.0, 5.0, None]


BAD_OPTIONS = {
    "seconds": (0, "--seconds 0 is no time; pass how long each arm trains, e.g. 60"),
    "batch_size": (0, "--batch-size 0 is no batch; pass at least 1"),
    "sequence_length": (1, "--sequence-length 1 has no next byte; pass at least 2"),
    "device": ("meta", "--device 'meta' is not supported; pass cpu or cuda"),
    "text": (
        Path("no/such.txt"),
        f"--text '{Path('no/such.txt')}' is not a file; pass a plain UTF-8 text file",
    ),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_option_says_what_and_what_to_do(text: Path, option: str) -> None:
    value, message = BAD_OPTIONS[option]
    assert first_line_of_error(text, **{option: value}) == message


def first_line_of_error(written: Path, **options: Any) -> str:
    with pytest.raises(typer.BadParameter) as caught:
        run(written, **options)
    return str(caught.value).splitlines()[0]


def test_unknown_device(text: Path) -> None:
    assert first_line_of_error(text, device="gpu7") == "--device 'gpu7' is unknown; pass cpu or cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device(text: Path) -> None:
    assert first_line_of_error(text, device="cuda") == (
        "--device 'cuda' is not available: this torch sees 0 CUDA devices; pass --device cpu, or install a "
        "CUDA build of torch and a driver"
    )


def test_text_too_short(text: Path) -> None:
    text.write_text("a few words, and that is all of it", encoding="utf-8")
    assert first_line_of_error(text) == (
        "--text text.txt is too short: 34 bytes are 2 windows of 16, and 1 held-out and 4 training windows "
        "are needed; pass a longer text, or a smaller --batch-size or --sequence-length"
    )


def test_text_that_is_not_utf8(text: Path) -> None:
    text.write_bytes(b"abc\xff")
    assert first_line_of_error(text) == f"--text '{text}' is not UTF-8 (byte 3); convert it, for example with iconv"
