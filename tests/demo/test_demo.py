"""The demo end to end on a tiny random model and a tiny text, and the first line of each error."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from cggr_compile.demo.data import load_pretrained, make_windows
from cggr_compile.demo.main import LEARNING_RATE, Arm, Evaluation, demo, held_out_loss

pytest.importorskip("matplotlib", reason="the demo extra is not installed")

WORDS = ["sea", "and", "ship", "under", "sail", "when", "morning", "came", "we", "saw", "land", "far"]


@dataclass(frozen=True)
class Inputs:
    model: Path
    text: Path


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=600)), encoding="utf-8")
    return Inputs(tmp_path / "model", text)


def run(
    inputs: Inputs,
    *,
    model: str | None = None,
    text: Path | None = None,
    device: str = "cpu",
    steps: int = 3,
    ratio: float = 0.5,
    batch_size: int = 4,
    sequence_length: int = 16,
) -> Path:
    output = inputs.text.parent / "output"
    demo(
        model=model or str(inputs.model),
        text=text or inputs.text,
        device=device,
        output=output,
        steps=steps,
        ratio=ratio,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=0,
    )
    return output


def test_demo_leaves_every_file_and_every_sample(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(inputs)

    result = json.loads((output / "result.json").read_text())
    plain, routed = result["arms"]["plain"], result["arms"]["routed"]
    for arm, rows in ((plain, 4), (routed, 2)):
        assert len(arm["step_seconds"]) == len(arm["train_loss"]) == 3
        assert [len(step) for step in arm["rows"]] == [rows] * 3
        assert arm["tokens_trained"] == 3 * rows * 16
        assert arm["evaluations"][0] | {"loss": None} == {"step": 0, "seconds": 0, "loss": None}
        assert arm["evaluations"][-1]["step"] == 3
        assert arm["evaluations"][-1]["seconds"] == pytest.approx(sum(arm["step_seconds"]))
    assert plain["evaluations"][0]["loss"] == routed["evaluations"][0]["loss"]
    assert all(sorted(set(rows)) == rows for rows in routed["rows"])
    assert result["settings"]["sequence_length"] == 16
    assert torch.__version__.startswith(result["versions"]["torch"])

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (output / "diff.html").read_text().lower()
    json.loads((output / "report.json").read_text())
    shown = capsys.readouterr().out
    assert "later steps, median (s)" in shown
    assert "result.json" in shown


@pytest.mark.long
def test_plain_arm_is_the_eager_training_loop(inputs: Inputs) -> None:
    output = run(inputs)
    arm = json.loads((output / "result.json").read_text())["arms"]["plain"]

    pretrained = load_pretrained(str(inputs.model))
    windows = make_windows(inputs.text.read_text(), "", pretrained, sequence_length=16, batch_size=4)
    model = LlamaForCausalLM.from_pretrained(inputs.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for ids, expected in zip(windows.batches(steps=3, batch_size=4, seed=0), arm["train_loss"], strict=True):
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = model.eval()(input_ids=windows.held_out).logits[:, :-1].flatten(0, 1)
    truth = torch.nn.functional.cross_entropy(logits, windows.held_out[:, 1:].flatten()).item()
    assert arm["evaluations"][-1]["loss"] == pytest.approx(truth, rel=1e-6)
    assert held_out_loss(model, windows.held_out, batch_size=3) == pytest.approx(truth, rel=1e-6)


def test_windows_cover_the_text_once_and_hold_out_its_end(inputs: Inputs) -> None:
    pretrained = load_pretrained(str(inputs.model))
    windows = make_windows(inputs.text.read_text(), "", pretrained, sequence_length=16, batch_size=4)
    expected = [1 + WORDS.index(word) for word in inputs.text.read_text().split()][: 600 // 16 * 16]
    assert torch.cat([windows.train, windows.held_out]).flatten().tolist() == expected

    steps = 2 * len(windows.train)
    seen = torch.cat(windows.batches(steps=steps, batch_size=1, seed=3)).tolist()
    assert sorted(seen) == sorted(2 * windows.train.tolist())
    first_pass = seen[: len(windows.train)]
    assert sorted(first_pass) == sorted(windows.train.tolist())


def test_loss_at_equal_time_is_the_last_one_measured_by_then() -> None:
    arm = Arm("plain", 16, evaluations=[Evaluation(0, 0.0, 4.0), Evaluation(1, 2.0, 3.0), Evaluation(2, 5.0, 2.0)])
    assert [arm.loss_within(s) for s in (1.9, 2.0, 4.9, 5.0)] == [4.0, 3.0, 3.0, 2.0]


BAD_OPTIONS = {
    "steps": (1, "--steps 1 is too few; pass at least 2, for the first step compiles"),
    "ratio": (1.5, "--ratio 1.5 is outside (0, 1]; pass the fraction of rows to keep"),
    "batch_size": (1, "--batch-size 1 leaves nothing to select; pass at least 2"),
    "sequence_length": (64, "--sequence-length 64 exceeds the model's context of 32 tokens; pass at most 32"),
    "device": ("meta", "--device 'meta' is not supported; pass cpu or cuda"),
    "text": (
        Path("no/such.txt"),
        f"--text '{Path('no/such.txt')}' is not a file; pass a plain UTF-8 text file",
    ),
    "model": (
        "no/such/model",
        "--model 'no/such/model' is not a causal language model that transformers can load; pass a folder or "
        "hub id of an AutoModelForCausalLM checkpoint",
    ),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_option_says_what_and_what_to_do(inputs: Inputs, option: str) -> None:
    value, message = BAD_OPTIONS[option]
    assert first_line_of_error(inputs, **{option: value}) == message


def test_unknown_device(inputs: Inputs) -> None:
    assert first_line_of_error(inputs, device="gpu7") == "--device 'gpu7' is unknown; pass cpu or cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device(inputs: Inputs) -> None:
    assert first_line_of_error(inputs, device="cuda") == (
        "--device 'cuda' is not available: this torch sees 0 CUDA devices; pass --device cpu, or install a "
        "CUDA build of torch and a driver"
    )


def test_text_too_short(inputs: Inputs) -> None:
    inputs.text.write_text(" ".join(WORDS * 5), encoding="utf-8")
    assert first_line_of_error(inputs) == (
        "--text text.txt is too short: 60 tokens are 3 windows of 16, and 1 held-out and 4 training windows "
        "are needed; pass a longer text, or a smaller --batch-size or --sequence-length"
    )


def test_text_that_is_not_utf8(inputs: Inputs) -> None:
    inputs.text.write_bytes(b"abc\xff")
    assert first_line_of_error(inputs) == (
        f"--text '{inputs.text}' is not UTF-8 (byte 3); convert it, for example with iconv"
    )


def test_model_without_a_head(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    LlamaModel(tiny_config()).save_pretrained(folder)
    save_tokenizer(folder)
    assert first_line_of_error(inputs, model=str(folder)) == (
        f"--model '{folder}' has no weights for lm_head.weight; pass a checkpoint saved with its language model head"
    )


def first_line_of_error(inputs: Inputs, **options: object) -> str:
    with pytest.raises(typer.BadParameter) as caught:
        run(inputs, **options)
    return str(caught.value).splitlines()[0]
