"""Tiny configurations of real transformers classes, every dropout probability at zero.

`layers` is where the class keeps its layer list: the eager oracle truncates it. The compiler is never told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T

VOCABULARY = 97
LAYERS = 3
DEEP = 4

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT = {
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT_LIKE = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


@dataclass(frozen=True)
class Architecture:
    """One model family: how to build it and what the oracle must know about it."""

    name: str
    build: Callable[[], torch.nn.Module]
    layers: str
    causal: bool = True
    takes_mask: bool = True
    # Sequential recurrence in eager, associative scan when traced: the same sum in another order.
    tolerance: float = 0.0
    # A traced associative scan has one level for each power of two of the length.
    any_length: bool = True


def _experts(**options: int) -> dict:
    return {**GROUPED, "num_experts_per_tok": 2, **options}


ARCHITECTURES = {
    a.name: a
    for a in [
        Architecture("llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), "model.layers"),
        Architecture(
            "mistral", lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=4)), "model.layers"
        ),
        Architecture("qwen2", lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)), "model.layers"),
        Architecture("qwen3", lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=8)), "model.layers"),
        Architecture(
            "gemma2",
            lambda: T.Gemma2ForCausalLM(
                T.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
            ),
            "model.layers",
        ),
        Architecture(
            "gemma3",
            lambda: T.Gemma3ForCausalLM(
                T.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
            ),
            "model.layers",
        ),
        Architecture("phi3", lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, pad_token_id=0)), "model.layers"),
        Architecture("gpt2", lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)), "transformer.h"),
        Architecture("gptj", lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT, rotary_dim=4)), "transformer.h"),
        Architecture("gpt_neox", lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**COMMON)), "gpt_neox.layers"),
        Architecture(
            "falcon",
            lambda: T.FalconForCausalLM(
                T.FalconConfig(
                    hidden_size=32,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=4,
                    vocab_size=VOCABULARY,
                    max_position_embeddings=64,
                )
            ),
            "transformer.h",
        ),
        Architecture(
            "opt",
            lambda: T.OPTForCausalLM(
                T.OPTConfig(
                    hidden_size=32,
                    ffn_dim=48,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=4,
                    vocab_size=VOCABULARY,
                    max_position_embeddings=64,
                    word_embed_proj_dim=32,
                    **OPT_LIKE,
                )
            ),
            "model.decoder.layers",
        ),
        Architecture(
            "bloom",
            lambda: T.BloomForCausalLM(
                T.BloomConfig(
                    hidden_size=32,
                    n_layer=LAYERS,
                    n_head=4,
                    vocab_size=VOCABULARY,
                    hidden_dropout=0.0,
                    attention_dropout=0.0,
                )
            ),
            "transformer.h",
        ),
        Architecture("olmo2", lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**GROUPED)), "model.layers"),
        Architecture(
            "mixtral",
            lambda: T.MixtralForCausalLM(T.MixtralConfig(**_experts(num_local_experts=4), output_router_logits=True)),
            "model.layers",
        ),
        Architecture(
            "qwen3_moe",
            lambda: T.Qwen3MoeForCausalLM(
                T.Qwen3MoeConfig(
                    **_experts(num_experts=4), head_dim=8, moe_intermediate_size=16, output_router_logits=True
                )
            ),
            "model.layers",
        ),
        Architecture(
            "gpt_oss",
            lambda: T.GptOssForCausalLM(T.GptOssConfig(**_experts(num_local_experts=4), head_dim=8, sliding_window=4)),
            "model.layers",
        ),
        Architecture("cohere", lambda: T.CohereForCausalLM(T.CohereConfig(**GROUPED)), "model.layers"),
        Architecture(
            "bert", lambda: T.BertForMaskedLM(T.BertConfig(**COMMON, **NO_BERT_DROPOUT)), "bert.encoder.layer", False
        ),
        Architecture(
            "roberta",
            lambda: T.RobertaForMaskedLM(T.RobertaConfig(**COMMON, **NO_BERT_DROPOUT)),
            "roberta.encoder.layer",
            False,
        ),
        Architecture(
            "modernbert",
            lambda: T.ModernBertForMaskedLM(
                T.ModernBertConfig(
                    **COMMON,
                    pad_token_id=0,
                    cls_token_id=1,
                    sep_token_id=2,
                    bos_token_id=1,
                    eos_token_id=2,
                    local_attention=4,
                )
            ),
            "model.layers",
            False,
        ),
        Architecture(
            "mamba",
            lambda: T.MambaForCausalLM(
                T.MambaConfig(
                    hidden_size=32,
                    state_size=4,
                    num_hidden_layers=LAYERS,
                    vocab_size=VOCABULARY,
                    intermediate_size=48,
                    time_step_rank=4,
                )
            ),
            "backbone.layers",
            takes_mask=False,
            tolerance=1e-6,
            any_length=False,
        ),
    ]
}


def eager_of(architecture: Architecture) -> torch.nn.Module:
    """The architecture in training mode with reproducible weights, attention written out in torch, and no cache."""
    torch.manual_seed(0)
    model = architecture.build().train()
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    return model


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A model in training mode with reproducible weights.

    Without a key-value cache, as a routed step runs: eager's cache copies keys into another memory layout, and the
    matrix products of the backward then sum in another order.
    """
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].build().train()
    model.config.use_cache = False
    return model


def token_batch(
    batch: int = 6, length: int = 12, seed: int = 1, masked: bool = True, takes_mask: bool = True
) -> dict[str, torch.Tensor]:
    """Random ids; if `masked`, every row is padded on one side (eager then builds a mask whatever rows are selected),
    one row's labels are all ignored and a stray label is -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    labels = ids.clone()
    batch_dict = {"input_ids": ids, "labels": labels}
    if masked:
        mask = torch.ones_like(ids)
        for row in range(batch):
            padding = min(1 + row % 3, length - 2)
            mask[row, slice(0, padding) if row % 2 else slice(length - padding, length)] = 0
        labels[mask == 0] = -100
        labels[2 % batch] = -100
        labels[-1, length // 2] = -100
        if takes_mask:
            batch_dict["attention_mask"] = mask
    return batch_dict


def deep(name: str, **options: Any) -> torch.nn.Module:
    """A model of `DEEP` layers; kinds of layers that alternate do so."""
    config = copy.deepcopy(ARCHITECTURES[name].build().config)
    config.num_hidden_layers = DEEP
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention" if i % 2 else "full_attention" for i in range(DEEP)]
    for option, setting in options.items():
        setattr(config, option, setting)
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    return type(model)(config).train()
