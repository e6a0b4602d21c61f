"""LoRA over weights that bitsandbytes quantised: a routed step is eager's on the kept rows, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from architectures import build, token_batch

import cggr_compile as cggr

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantised(folder: Path, options: dict[str, Any], **lora: Any) -> torch.nn.Module:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    build("llama").save_pretrained(folder)
    config = BitsAndBytesConfig(
        **options, **({"bnb_4bit_compute_dtype": torch.float32} if "load_in_4bit" in options else {})
    )
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    targets = ["q_proj", "down_proj"]
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules=targets, **lora)
    model = peft.get_peft_model(model, adapters).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.sample(1)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_adapters_over_quantised_weights(bits: str, ratio: float, tmp_path: Path) -> None:
    eager = quantised(tmp_path, BITS[bits])
    kinds = {type(module).__name__ for module in eager.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    model = cggr.optimize(copy.deepcopy(eager), ratio=ratio, inner="eager")
    batch = token_batch(seed=3)
    loss = model(**batch).loss
    loss.backward()
    assert len(model.cggr.selected) == 6 * ratio
    expected, gradients = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    assert torch.equal(loss, expected)
    oracle.assert_same_gradients(oracle.gradients(model), gradients)
    assert sum(gradient is not None for gradient in gradients.values()) == 12  # of 3 layers, 2 products, A and B


def test_dora_over_quantised_weights_is_refused(tmp_path: Path) -> None:
    model = cggr.optimize(quantised(tmp_path, BITS["nf4"], use_dora=True), inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"breaks Dynamo's graph .*the line belongs to peft"):
        model(**token_batch())


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "bits",
    [
        pytest.param(
            "int8", marks=pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="refused by torch 2.11")
        ),
        "nf4",
    ],
)
def test_layers_of_quantised_weights_are_copied(bits: str, tmp_path: Path) -> None:
    """Weights, scales and adapters, whatever of them a layer reads in the forward and whatever for the backward."""
    eager = quantised(tmp_path, BITS[bits])
    model = cggr.optimize(copy.deepcopy(eager), route="depth", depth_layers=2, inner="eager")
    layers = eager.get_base_model().model.layers
    for grown in (False, True, True):
        batch = token_batch(seed=int(grown))
        loss = model(**batch).loss
        loss.backward()
        eager.get_base_model().model.layers = layers[:2] if not grown else layers
        expected, gradients = oracle.step(eager, batch)
        assert torch.equal(loss, expected)
        if grown:
            oracle.assert_same_gradients(oracle.gradients(model), gradients)
        model.zero_grad()
        model.cggr.grow()
        layers[2] = copy.deepcopy(layers[0])
