"""`torch.compile(model, backend="cggr")`: the same rewrite, whatever the user compiled with."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.4, "router_layers": 2, "inner": "eager"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_static_or_dynamic_the_backend_routes_exactly(dynamic: bool | None) -> None:
    """A static capture is traced again with symbols; the batch sizes then share it."""
    eager = build("llama")
    compiled = torch.compile(copy.deepcopy(eager), backend="cggr", options=OPTIONS, dynamic=dynamic)
    for rows, length in [(6, 12), (9, 14)]:
        batch = token_batch(rows, length)
        loss, gradients = oracle.step(compiled, batch)
        expected_rows = oracle.expected_rows(eager, ARCHITECTURES["llama"], batch, 0.4, 2)
        expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, expected_rows))
        gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}
        oracle.assert_same_step(loss, gradients, expected_loss, expected)
    handle = cggr.handle(compiled)
    assert torch.equal(handle.selected, expected_rows)
    assert handle.captures == 1


def test_equal_batch_and_sequence_sizes_are_told_apart() -> None:
    eager = build("llama")
    compiled = torch.compile(copy.deepcopy(eager), backend="cggr", options=OPTIONS, dynamic=True)
    for rows, length in [(8, 8), (5, 11)]:
        batch = token_batch(rows, length)
        loss, _ = oracle.step(compiled, batch)
        expected_rows = oracle.expected_rows(eager, ARCHITECTURES["llama"], batch, 0.4, 2)
        assert torch.equal(loss, oracle.step(eager, oracle.rows_of(batch, expected_rows))[0])


def test_graphs_that_do_not_train_pass_through() -> None:
    eager = build("llama")
    compiled = torch.compile(copy.deepcopy(eager), backend="cggr", options=OPTIONS)
    batch = token_batch()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    torch.testing.assert_close(compiled(**inputs).logits, eager(**inputs).logits)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, eager(**batch).loss)
    compiled.eval()
    eager.eval()
    torch.testing.assert_close(compiled(**batch).loss, eager(**batch).loss)
    passive = cggr.handle(compiled).runtime.passive
    assert {"no labels were passed", "gradients are disabled", "the model is in eval mode"} <= set(passive)


def test_options_are_validated() -> None:
    compiled = torch.compile(build("llama"), backend="cggr", options={"ration": 0.4})
    with pytest.raises(Exception, match="unknown option 'ration', did you mean 'ratio'"):
        compiled(**token_batch())


def test_a_graph_break_is_refused_with_its_line() -> None:
    eager = build("llama")

    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = eager

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
            torch._dynamo.graph_break()
            logits = self.model.lm_head(hidden)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    compiled = torch.compile(Broken().train(), backend="cggr", options=OPTIONS)
    batch = token_batch()
    with pytest.raises(Exception, match=r"breaks Dynamo's graph .*test_backend\.py:\d+: torch\._dynamo\.graph_break"):
        compiled(batch["input_ids"], batch["labels"])
