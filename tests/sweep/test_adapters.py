"""Every method of PEFT: a routed step is eager's on the rows that it selected, bitwise, or the method is refused.

docs/integrations.md says which is which. One that it does not name, of a later PEFT, may be either.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch

import cggr_compile as cggr

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
OPTIONS: dict[str, Any] = {"router_layers": 1, "inner": "eager", "seed": 5}
TARGETS = ["q_proj", "v_proj"]
# What a method needs on top of its defaults, or for layers as small as these.
SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 10},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 3},
    "POLY": {"n_tasks": 3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "with biases": {"bias": "all"},
    "with biases of its own": {"lora_bias": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": 4},
    "on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "on all linears": {"target_modules": "all-linear"},
    "with trained tokens": {"trainable_token_indices": [1, 2]},
    "with replicated layers": {"layer_replication": [(0, 2), (1, 2)]},
    "of parameters": {"target_parameters": ["o_proj.weight"]},
    "aLoRA": {"alora_invocation_tokens": [1]},
}
METHODS = sorted(str(kind.value) for kind in mapping.PEFT_TYPE_TO_CONFIG_MAPPING)


def config_of(method: str) -> Any:
    kinds = {str(kind.value): config for kind, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(method, peft.LoraConfig)
    fields = kind.__dataclass_fields__
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in fields and method != "ADAPTION_PROMPT":
        options["target_modules"] = TARGETS
    if "num_virtual_tokens" in fields:
        options["num_virtual_tokens"] = 3
    return kind(**{**options, **SMALL.get(method, {}), **VARIANTS.get(method, {})})


def adapted(method: str) -> torch.nn.Module:
    """A small Llama with a method's adapters, none of which is at zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2), config_of(method)).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def listed(heading: str) -> set[str]:
    """The methods, and options of LoRA's, that the page has behind a heading."""
    found = re.search(rf"\* \*\*{heading}\*\*: (.*?)\n(?! )", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return set(re.findall(r"`(\w+)`", found[1]))


@pytest.mark.sample(5)
@pytest.mark.parametrize(("method", "ratio"), [*((each, 0.5) for each in (*VARIANTS, *METHODS)), ("PVERA", 1.0)])
def test_every_method_is_exact_or_refused(method: str, ratio: float) -> None:
    try:
        model, eager = adapted(method), adapted(method)  # a copy has no hooks of parameters
    except ImportError as error:
        pytest.skip(str(error))
    eager.load_state_dict(model.state_dict())
    batch = token_batch(6, 16)
    if "TASK" in method or method == "POLY":
        batch["task_ids"] = torch.tensor([0, 1, 2, 0, 1, 2])
    cggr.optimize(model, ratio=ratio, **(OPTIONS if ratio < 1 else {"inner": "eager"}))
    names = {*VARIANTS.get(method, {method: None})}
    torch.manual_seed(5)
    refusal = None
    try:
        step = oracle.step(model, batch)
    except cggr.CannotOptimize as error:
        refusal = error
    if refusal is not None:
        assert refusal.source
        assert refusal.hint
        assert not names & listed("Exact")
        return
    assert ratio == 1 or not names & listed("Refused")
    torch.manual_seed(5)
    oracle.assert_same_step(*step, *oracle.step(eager, oracle.rows_of(batch, model.cggr.selected)))
