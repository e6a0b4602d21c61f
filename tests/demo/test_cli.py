"""The command line, run in process on tiny configurations; the first line of each error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from torch._dynamo.exc import InternalTorchDynamoError
from transformers import BertConfig, LlamaConfig, PretrainedConfig
from typer.testing import CliRunner, Result

import cggr_compile.demo.main
from cggr_compile import __version__
from cggr_compile.cli import app, build_on_meta, read_config

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def first_line(result: Result) -> str:
    return result.output.splitlines()[0]


def saved(config: PretrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder / "config.json"


def test_explain_writes_text_page_and_json(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**TINY), tmp_path)
    html, report = tmp_path / "diff.html", tmp_path / "report.json"
    result = run("explain", str(path), "--ratio", "0.5", "--batch", "6", "--html", str(html), "--json", str(report))
    assert result.exit_code == 0, result.output
    assert first_line(result).startswith("+ router: layer 0 of 2 (model.layers)")
    assert "k = ceil(0.5 · B) = 3 of 6 rows" in result.output
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    read = json.loads(report.read_text(encoding="utf-8"))
    assert read["sizes"] == {"batch": 6, "sequence": 512, "kept": 3}


def test_explain_takes_every_option(tmp_path: Path) -> None:
    path = str(saved(LlamaConfig(**TINY), tmp_path))
    result = run("explain", path, "--option", "route=depth", "--option", "depth_layers=1", "--sequence", "8")
    assert first_line(result) == "depth: layer 0 of 2 until model.cggr.grow(), then all, as copies", result.output
    result = run(
        *("explain", path, "--sequence", "8", "--option", "cuda_graphs=true", "--option", "seed=null"),
        *("--option", 'route=["sequence", "loss"]'),
    )
    assert result.exit_code == 0, result.output
    assert run("explain", path, "--option", "route").exit_code == 1
    wrong = run("explain", path, "--option", "depth=1").output
    assert "unknown option 'depth', did you mean 'depth_layers'" in wrong


@pytest.mark.long
def test_explain_says_which_batch_fits(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**TINY), tmp_path)
    small = ("--batch", "64", "--sequence", "16", "--selection", "random")
    result = run("explain", str(path), *small, "--memory", "0.07")
    assert result.exit_code == 0, result.output
    found = re.search(r"^fits at batch (\d+), ([\d.]+) GiB \(torch.float32, AdamW\)$", result.output, re.MULTILINE)
    assert found is not None, result.output
    assert int(found[1]) > 64
    assert float(found[2]) <= 0.07


def test_explain_says_that_no_row_fits(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**TINY), tmp_path)
    result = run("explain", str(path), "--batch", "4", "--sequence", "16", "--selection", "random", "--memory", "0.01")
    assert result.exit_code == 1
    assert "one row of 16 tokens takes" in result.output


@pytest.mark.parametrize("memory", ["0", "inf"])
def test_explain_says_that_no_card_has_such_memory(memory: str) -> None:
    result = run("explain", "llama", "--memory", memory)
    assert result.exit_code == 1
    assert first_line(result) == f"error: --memory {memory} is no card's; pass a finite number of GiB above 0"


def test_explain_reads_a_folder_and_picks_the_masked_model(tmp_path: Path) -> None:
    saved(BertConfig(**TINY), tmp_path)
    result = run("explain", str(tmp_path), "--selection", "random", "--sequence", "16")
    assert result.exit_code == 0, result.output
    assert "masked: position t predicts label t" in result.output


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("bert", {}, "BertForMaskedLM"),
        ("bert", {"is_decoder": True}, "BertLMHeadModel"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
        ("modernbert", {}, "ModernBertForMaskedLM"),
        ("mistral", {}, "MistralForCausalLM"),
    ],
)
def test_a_model_type_is_built_without_memory(model_type: str, changes: dict[str, object], expected: str) -> None:
    config = read_config(model_type)
    for name, given in changes.items():
        setattr(config, name, given)
    config.num_hidden_layers = 2
    model = build_on_meta(config)
    assert type(model).__name__ == expected
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_version() -> None:
    assert run("--version").output.startswith(f"cggr-compile {__version__} (torch ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("llama", "--ratio", "2"), "error: ratio=2.0 is not in (0, 1]; give the fraction of rows to keep, e.g. 0.25"),
        (
            ("llama", "--router-layers", "few"),
            "error: router_layers='few' is neither 'auto' nor a positive integer; give the number of layers the router "
            "runs",
        ),
        (
            ("llama", "--scoring", "los"),
            "error: scoring='los', did you mean 'loss'? valid values: loss, entropy, margin, combined",
        ),
        (
            ("vit",),
            "error: ViTConfig has no language-model head: transformers maps it to neither a causal nor a masked "
            "language model",
        ),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run("explain", *arguments)
    assert (result.exit_code, result.output.splitlines()) == (1, [line])


def test_a_model_that_cannot_be_routed_is_one_line(tmp_path: Path) -> None:
    path = saved(LlamaConfig(**TINY), tmp_path)
    result = run("explain", str(path), "--ratio", "0.25", "--router-layers", "9", "--sequence", "16")
    assert (result.exit_code, result.output.splitlines()) == (
        1,
        [
            "error: cannot optimize: router_layers=9 but the model has 2 layers (model.layers); "
            "choose router_layers between 1 and 2"
        ],
    )


def test_an_unreadable_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    result = run("explain", str(path))
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert first_line(result).startswith(f"error: {path} is not a readable model configuration: ")


def test_an_unknown_name_suggests_a_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = run("explain", "lama")
    assert result.exit_code == 1
    assert first_line(result).startswith("error: 'lama' is no file, model type or reachable hub id, did you mean")


def test_a_model_that_dynamo_cannot_trace_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def explain(*arguments: object) -> None:
        raise InternalTorchDynamoError("the first line\nthe second")

    monkeypatch.setattr(cggr_compile, "explain", explain)
    path = saved(LlamaConfig(**TINY), tmp_path)
    result = run("explain", str(path))
    assert (result.exit_code, result.output.splitlines()) == (
        1,
        [f"error: torch.compile cannot trace {path} on the meta device: the first line"],
    )


def test_demo_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[object, ...]] = []
    monkeypatch.setattr(cggr_compile.demo.main, "demo", lambda *arguments: called.append(arguments))
    result = run("demo", "--text", "book.txt", "--output", str(tmp_path), "--seconds", "3", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    assert called == [(Path("book.txt"), "cpu", tmp_path, 3, 4, 128, 0)]
