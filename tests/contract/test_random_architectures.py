"""The contract on decoder models composed at random, with and without numbered layers; none is a transformers class.

`HYPOTHESIS_PROFILE=fuzz pytest tests/contract/test_random_architectures.py --hypothesis-seed=1` runs 500 of them.
"""

from __future__ import annotations

import copy
import os

import oracle
import pytest
import torch
from hypothesis import Phase, event, given, note, settings
from hypothesis import strategies as st
from random_models import VOCABULARY, Layer, RandomModel, Spec, specs

import cggr_compile as cggr

# Each example captures a new model, which takes seconds.
EXAMPLES = {"ci": 1, "long": 200, "fuzz": 500}[os.environ.get("HYPOTHESIS_PROFILE", "ci")]
RATIO = 0.4


def random_batch(rows: int, length: int, padded: bool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
        batch["attention_mask"] = (torch.arange(length) < lengths).long()
        batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def assert_contract(spec: Spec, batch: dict[str, torch.Tensor]) -> str:
    """Identity while all rows are kept; then the eager router's rows, and eager's step on them. Returns the proof."""
    torch.manual_seed(0)
    eager = RandomModel(spec).train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=RATIO, router_layers=1, inner="eager", warmup_steps=1)
    try:
        step = oracle.step(model, batch)
    except cggr.CannotOptimize as error:
        # Unnumbered layers are found by repetition, so there must be one.
        repeats = spec.layers >= 2 * len(set(spec.kinds))
        if spec.has_layer_list or repeats or "no equal blocks make up the graph" not in error.reason:
            raise
        return "refused"
    oracle.assert_same_step(*step, *oracle.step(eager, batch))
    model.cggr.step()
    step = oracle.step(model, batch)
    rows = model.cggr.selected
    oracle.assert_same_step(*step, *oracle.step(eager, oracle.rows_of(batch, rows)))
    found = model.cggr.runtime.plans[-1].program.layers
    block = spec.layers // len(found)
    assert spec.layers // block == len(found)
    if spec.has_layer_list:
        assert (len(found), found.proof.split(" +")[0]) == (spec.layers, "metadata")
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = eager(**inputs, stop=spec.layers - (len(found) - 1) * block).logits
    scores = oracle.token_scores(logits, batch["labels"], "loss", causal=True).sum(1)
    means = scores / oracle.counted(batch["labels"], causal=True)
    assert rows.tolist() == sorted(means.topk(len(rows)).indices.tolist())
    return found.proof


# Shrinking a failure would take minutes; the spec is in the failure's note.
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(specs(), st.integers(2, 7), st.integers(2, 9), st.booleans(), st.integers(0, 2**16))
def test_contract(spec: Spec, rows: int, length: int, padded: bool, seed: int) -> None:
    torch._dynamo.reset()
    note(str(spec))
    event(assert_contract(spec, random_batch(rows, length, padded, seed)))


PLAIN = Spec((Layer("pre", None, "gated"),), 4, 2, 1, True, False, "rotary", "list", False, False, False, 0.0, 1.0)


@pytest.mark.parametrize("naming", ["attributes"])
def test_layers_without_numbers_are_found_by_repetition(naming: str) -> None:
    spec = Spec(**{**vars(PLAIN), "naming": naming})
    assert assert_contract(spec, random_batch(5, 7, True, 0)) == "repetition + single-residual cut"


def test_equal_attentions_of_layers_that_differ_are_no_stack() -> None:
    """Only the second layer has a feed-forward, which would end up behind the stack."""
    layers = (Layer("post", None, "none"), Layer("post", 2, "plain"))
    spec = Spec(layers, 2, 1, 1, False, True, "learned", "attributes", False, False, False, 7.0, 1.0)
    assert assert_contract(spec, random_batch(2, 5, True, 1000)) == "refused"


def test_two_norms_behind_layers_that_differ_are_no_stack() -> None:
    """A post-norm layer ends in a norm, and the model's own follows."""
    layers = (Layer("pre", 5, "none"), Layer("post", 2, "none"))
    spec = Spec(**{**vars(PLAIN), "kinds": layers, "layers": 2, "rms": False, "naming": "dict"})
    assert assert_contract(spec, random_batch(3, 5, True, 30872)) == "refused"
