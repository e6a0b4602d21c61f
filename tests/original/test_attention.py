"""The original's flash attention: transformers' own switch, and what it refuses."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build, token_batch
from torch import nn

import cggr_compile as cggr
from cggr_compile.original import attention


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    info = cggr.get_flash_attention_info()
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in metadata.distributions()}
    assert info == {
        "sdpa_available": hasattr(nn.functional, "scaled_dot_product_attention"),
        "flash_attn_available": "flash-attn" in installed,
        "flash_attn_version": installed.get("flash-attn"),
        "cuda_available": torch.cuda.is_available(),
        "recommended_backend": "sdpa",
    }
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(metadata, "version", lambda name: {"flash-attn": "2.8"}[name])
    there = cggr.get_flash_attention_info()
    assert [there[key] for key in list(info)[1:3]] == [True, "2.8"]
    assert there["recommended_backend"] == "flash_attention_2"


def used(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention functions that a forward calls."""
    calls = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(
            nn.functional, "scaled_dot_product_attention", noted("sdpa", nn.functional.scaled_dot_product_attention)
        )
        patch.setattr(nn.functional, "softmax", noted("eager", nn.functional.softmax))
        model(token_batch(2, 8)["input_ids"])
    return sorted(set(calls))


def test_enable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama")
    assert cggr.enable_flash_attention(model, "eager") is model
    assert used(model, monkeypatch) == ["eager"]
    eager = model(token_batch(2, 8)["input_ids"]).logits
    assert capsys.readouterr().out == "LlamaForCausalLM uses eager attention\n"
    cggr.enable_flash_attention(model, verbose=False)
    assert used(model, monkeypatch) == ["sdpa"]
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(model(token_batch(2, 8)["input_ids"]).logits, eager)


def test_an_encoder_stays_bidirectional() -> None:
    """The original told every module with "attention" in its name that it is causal."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config).eval()
    ids = torch.arange(6)[None]
    want = model(ids).last_hidden_state
    got = cggr.enable_flash_attention(model, verbose=False)(ids).last_hidden_state
    torch.testing.assert_close(got, want)


def test_what_cannot_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend is 'flash', expected one of auto, flash_attention_2"):
        cggr.enable_flash_attention(build("llama"), "flash")
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        cggr.enable_flash_attention(nn.Linear(1, 1))
    model = build("llama")
    with pytest.raises(ImportError, match=r"[Ff]lash"):
        cggr.enable_flash_attention(model, "flash_attention_2")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    other = "eager" if model.config._attn_implementation == "sdpa" else "sdpa"
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot change its attention"):
        cggr.enable_flash_attention(model, other)


@pytest.mark.parametrize("asked", [None, torch.float16])
def test_load(asked: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = build("llama").to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = cggr.load_model_with_flash_attention(str(tmp_path), "eager", torch_dtype=asked, device_map=None)
    assert model.dtype == (asked or torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    assert cggr.load_model_with_flash_attention(tmp_path, device_map=None).config._attn_implementation == "sdpa"
    given: dict[str, Any] = {}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **kwargs: given.update(kwargs))
    cggr.load_model_with_flash_attention("name", "flash_attention_2", asked, revision="r")
    assert given == {
        "attn_implementation": "flash_attention_2",
        "dtype": asked or torch.bfloat16,
        "device_map": "auto",
        "revision": "r",
    }


def test_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    ids = token_batch(2, 8)["input_ids"]
    calls: list[str] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module.config._attn_implementation))
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(attention.time, "perf_counter", lambda: next(clock))
    results = cggr.benchmark_attention_backends(model, ids, warmup_steps=1, benchmark_steps=4)
    assert results == {name: {"avg_time_ms": 500.0, "throughput": 2.0} for name in ("eager", "sdpa")}
    assert calls == ["eager"] * 5 + ["sdpa"] * 5
    assert model.config._attn_implementation == "eager"
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    results = cggr.benchmark_attention_backends(model, ids, 0, 1)
    assert list(results) == ["eager", "sdpa", "flash_attention_2"]
    assert "lash" in results["flash_attention_2"]["error"]
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="benchmark_steps is 0"):
        cggr.benchmark_attention_backends(model, ids, 1, 0)
    with pytest.raises(ValueError, match="no model of transformers"):
        cggr.benchmark_attention_backends(nn.Linear(1, 1), ids)
