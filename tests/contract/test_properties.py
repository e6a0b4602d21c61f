"""The contract as a property over random architectures, shapes, masks, labels and options.

Attention is written out in torch (`attn_implementation="eager"`): SDPA in eager mode picks its kernel by looking at
the mask's data, which no traced graph can, and the kernels differ in the last bit.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import oracle
import torch
import transformers as T
from architectures import Architecture
from hypothesis import given, note, settings
from hypothesis import strategies as st

import cggr_compile as cggr
from cggr_compile.schedule import kept_of

# Each example captures a new model, which takes seconds.
EXAMPLES = 2 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else 200


@st.composite
def causal_models(draw: st.DrawFn) -> tuple[Architecture, dict[str, Any]]:
    """A small configuration of one of several families, with the knobs that change the graph."""
    family = draw(st.sampled_from(["Llama", "Mistral", "Qwen3", "Gemma2", "Cohere", "GPTNeoX"]))
    heads = draw(st.sampled_from([1, 2, 4]))
    options: dict[str, Any] = {
        "hidden_size": 8 * heads,
        "intermediate_size": draw(st.sampled_from([8, 24, 31])),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": heads,
        "vocab_size": draw(st.sampled_from([17, 64, 127, 130])),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
    }
    if family != "GPTNeoX":
        options["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    extra: dict[str, Any] = {
        "Llama": {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())},
        "Mistral": {"sliding_window": draw(st.sampled_from([None, 2, 5]))},
        "Qwen3": {"head_dim": draw(st.sampled_from([4, 8])), "attention_bias": draw(st.booleans())},
        "Gemma2": {
            "head_dim": 8,
            "sliding_window": 3,
            "final_logit_softcapping": draw(st.sampled_from([None, 30.0, 7.0])),
            "attn_logit_softcapping": draw(st.sampled_from([None, 50.0])),
        },
        "Cohere": {"logit_scale": draw(st.sampled_from([0.0625, 1.0, 0.3]))},
        "GPTNeoX": {"use_parallel_residual": draw(st.booleans())},
    }[family]
    config = getattr(T, f"{family}Config")(**options, **extra)
    model = getattr(T, f"{family}ForCausalLM")
    layers = "gpt_neox.layers" if family == "GPTNeoX" else "model.layers"
    return Architecture(family, lambda: model(config), layers), {**options, **extra}


@st.composite
def batches(draw: st.DrawFn, vocabulary: int) -> dict[str, torch.Tensor]:
    """Ids, optionally a padding mask on either side, and labels ignored at random."""
    length = draw(st.integers(2, 12))
    rows = draw(st.one_of(st.integers(2, 9), st.just(length), st.just(2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.7]))
    labels = ids.masked_fill(ignored, -100)
    batch = {"input_ids": ids, "labels": labels}
    if draw(st.booleans()):
        pads = torch.randint(0, length - 1, (rows, 1), generator=generator)
        positions = torch.arange(length).expand(rows, length)
        padded = positions < pads if draw(st.booleans()) else positions >= length - pads
        batch["attention_mask"] = (~padded).long()
        batch["labels"] = labels.masked_fill(padded, -100)
    return batch


OPTIONS = st.fixed_dictionaries(
    {
        "ratio": st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]),
        "scoring": st.sampled_from(["loss", "entropy", "margin", "combined"]),
        "selection": st.sampled_from(["topk", "random"]),
        "router_layers": st.sampled_from([1, 2]),
        "keep_logits": st.booleans(),
    }
).map(lambda drawn: drawn if drawn["selection"] != "random" else {**drawn, "scoring": "loss"})


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_contract_of_the_sequence_route(data: st.DataObject) -> None:
    torch._dynamo.reset()
    architecture, described = data.draw(causal_models())
    batch = data.draw(batches(described["vocab_size"]))
    options = data.draw(OPTIONS)
    note(f"{architecture.name} {described} {options}")
    torch.manual_seed(0)
    eager = architecture.build().train()
    eager.set_attn_implementation("eager")
    eager.config.use_cache = False
    model = cggr.optimize(copy.deepcopy(eager), **options, inner="eager", seed=1)
    loss, gradients = oracle.step(model, batch)
    selected = model.cggr.selected
    counts = oracle.counted(batch["labels"], causal=True)
    valid = int((counts > 0).sum())
    wanted = min(kept_of(model.cggr.config.ratio, len(counts)), len(counts))
    assert len(selected) == wanted
    assert torch.equal(selected, selected.sort().values)
    rows = selected.unique()
    if valid == 0:
        assert loss == 0
        assert all(g is None or not g.any() for g in gradients.values())
        return
    if wanted < len(counts):
        assert len(rows) == min(wanted, valid)
        assert (counts[rows] > 0).all()
        if options["selection"] == "topk":
            expected_rows = oracle.expected_rows(
                eager, architecture, batch, options["ratio"], options["router_layers"], options["scoring"]
            )
            assert torch.equal(rows, expected_rows)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, rows))
    # Rows that only fill up change the shapes of the matrix products, hence the order of their sums.
    tolerance = {} if len(rows) == len(selected) else {"rtol": 1e-4, "atol": 1e-6}
    oracle.assert_same_step(loss, gradients, expected_loss, expected, **tolerance)
