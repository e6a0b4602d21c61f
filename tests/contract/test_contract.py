"""The contract of the sequence route, against the independent eager oracle: fp32, `inner="eager"`, bitwise unless an
architecture states why it cannot be."""

from __future__ import annotations

import copy
import functools
import inspect

import oracle
import pytest
import torch
import transformers as T
from architectures import ARCHITECTURES, build, token_batch

import cggr_compile as cggr

RATIO = 0.4
ROUTER_LAYERS = 2


# One for each mechanism in CI: the plain decoder, windows, learnt positions, fused projections, position biases,
# experts, an encoder, a recurrence. A capture takes seconds; the others run with the long profile.
IN_CI = {
    True: ("llama", "gemma3", "gpt2", "bloom", "mixtral", "qwen3_moe", "bert", "mamba"),
    False: ("llama", "gpt2", "gpt_neox"),
}
CASES = [
    pytest.param(
        a.name,
        padded,
        id=f"{a.name}-{'padded' if padded else 'unpadded'}",
        marks=() if a.name in IN_CI[padded] else pytest.mark.long,
    )
    for a in ARCHITECTURES.values()
    for padded in (True, False)
    if padded or a.takes_mask
]


@pytest.mark.sample(8)
@pytest.mark.parametrize(("name", "padded"), CASES)
def test_identity_and_sequence_route(name: str, padded: bool) -> None:
    """While every row is kept the model is the plain one; afterwards rows, loss and every gradient are those of eager
    on the rows that an eager router selects; batches of other sizes and lengths reuse the capture.

    Without a padding mask, eager's SDPA picks its causal kernel and a traced model a masked one, which differ in the
    last bit; attention written out in torch shows the rewrite itself to be exact.
    """
    architecture = ARCHITECTURES[name]
    same = functools.partial(oracle.assert_same_step, atol=architecture.tolerance)
    eager = build(name)
    if name == "opt" and "self.layerdrop > 0" not in inspect.getsource(T.models.opt.modeling_opt.OPTDecoder.forward):
        # Older transformers branch on a random number even without layerdrop.
        with pytest.raises(cggr.CannotOptimize, match=r"breaks Dynamo's graph .*: if dropout_probability"):
            cggr.optimize(eager)(**token_batch())
        return
    if not padded:
        eager.set_attn_implementation("eager")
    model = cggr.optimize(copy.deepcopy(eager), ratio=RATIO, router_layers=ROUTER_LAYERS, inner="eager", warmup_steps=1)
    batches = [
        token_batch(masked=padded, takes_mask=architecture.takes_mask, seed=1),
        token_batch(
            9, 14 if architecture.any_length else 12, masked=padded, takes_mask=architecture.takes_mask, seed=2
        ),
    ]
    for batch in batches:
        loss, gradients = oracle.step(model, batch)
        expected_loss, expected = oracle.step(eager, batch)
        same(loss, gradients, expected_loss, expected)
        assert model.cggr.selected.tolist() == list(range(len(batch["input_ids"])))
    model.cggr.step()
    for batch in batches:
        loss, gradients = oracle.step(model, batch)
        rows = oracle.expected_rows(eager, architecture, batch, RATIO, ROUTER_LAYERS)
        assert torch.equal(model.cggr.selected, rows)
        expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, rows))
        same(loss, gradients, expected_loss, expected)
    assert model.cggr.captures == 1
