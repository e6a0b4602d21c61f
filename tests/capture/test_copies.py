"""Calls that are replayed leave the graph that tracing them leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as T
from architectures import DEEP, GPT, VOCABULARY, deep, token_batch
from torch import fx, nn
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.capture import capture, retrace
from cggr_compile.capture.copies import Calls
from cggr_compile.ir.program import describe

# Written by the tracer, and never the same in two traces: counts of autograd's nodes, identities of graphs.
OF_THE_TRACE = {"seq_nr", "from_node"}


class Both:
    """Traces every captured graph a second time, with nothing replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Calls] = []
        self.graphs: tuple[fx.Graph, fx.Graph] | None = None
        self._patch = monkeypatch
        self._trace = retrace.functional_aten
        monkeypatch.setattr(capture, "functional_aten", self)

    def __call__(self, gm: fx.GraphModule, fakes: list[Any]) -> fx.GraphModule:
        def counted() -> Calls:
            self.calls.append(Calls())
            return self.calls[-1]

        with self._patch.context() as patch:
            patch.setattr(retrace, "Calls", counted)
            replayed = self._trace(gm, fakes)
            patch.setattr(retrace, "Calls", lambda: None)
            traced = self._trace(gm, fakes)
        self.graphs = replayed.graph, traced.graph
        return replayed

    @property
    def replayed(self) -> int:
        return self.calls[-1].replayed

    def assert_equal(self) -> None:
        assert self.graphs is not None
        replayed, traced = map(table, self.graphs)
        assert len(replayed) == len(traced)
        for actual, expected in zip(replayed, traced, strict=True):
            assert actual == expected


def table(graph: fx.Graph) -> list[dict[str, Any]]:
    """Everything about the nodes of a graph but their names, which count nodes that were dropped too."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    rows = []
    for node in graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda old: f"node {places[old]}")
        row = {"op": node.op, "target": node.target, "arguments": str(arguments)}
        if "val" in node.meta:
            row["value"] = describe(node.meta["val"])
            if isinstance(node.meta["val"], torch.Tensor):
                row["offset"] = describe(node.meta["val"].storage_offset())
        meta = {name: str(entry) for name, entry in node.meta.items() if name not in {"val", *OF_THE_TRACE}}
        rows.append({**row, **meta})
    return rows


def step(model: nn.Module, autocast: bool = False) -> None:
    optimized = cggr.optimize(model, inner="eager", ratio=1.0)
    batch = token_batch()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        optimized(**batch)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt2", "bert", "gpt_neox", "bloom")),
    ],
)
def test_the_graph_is_the_traced_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    step(deep(name))
    both.assert_equal()
    assert both.replayed > len(both.graphs[0].nodes) / 3


@pytest.mark.long
def test_deeper_stacks_are_traced_with_as_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    class Counted(Calls):
        def run(self, call: Callable[..., Any], *given: Any) -> Any:
            def counted(*arguments: Any) -> Any:
                traced[-1] += 1
                return call(*arguments)

            return super().run(counted, *given)

    monkeypatch.setattr(retrace, "Calls", Counted)
    for layers in (DEEP, 2 * DEEP):
        traced.append(0)
        step(deep("llama", num_hidden_layers=layers))
    assert traced[0] == traced[1] > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_autocast(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    config = T.GPT2Config(**{**GPT, "n_layer": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    step(T.GPT2LMHeadModel(config).train(), autocast)
    both.assert_equal()
    assert both.replayed


def test_checkpointed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    model = deep("llama", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model)
    both.assert_equal()
    assert both.replayed
    regions = {node.meta.get("ac_graph_id") for node in both.graphs[0].nodes}
    assert regions >= {1, 2}


@pytest.mark.long
def test_experts_whose_graph_mutates(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    step(deep("mixtral"))
    both.assert_equal()


@pytest.mark.long
def test_an_encoder_and_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": VOCABULARY}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = T.T5Config(**sizes, **ends, num_layers=DEEP, num_decoder_layers=DEEP)
    step(T.T5ForConditionalGeneration(config).train())
    both.assert_equal()
    assert both.replayed


def halves(hidden: torch.Tensor) -> torch.Tensor:
    left, right = hidden.chunk(2, -1)
    return torch.cat((right, left), -1)


def itself(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.to(hidden.dtype).contiguous() * 1.0 + hidden * -0.0 + hidden * 0.0


def frozen(hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = hidden.abs().amax(-1, keepdim=True)
    return hidden / (scale.detach() + 1) + hidden.abs().amax(-1, keepdim=True)


def sizes(hidden: torch.Tensor) -> torch.Tensor:
    rows, length, width = hidden.shape
    flat = hidden.reshape(rows * length, width)
    return flat.view(rows, length, width) / (rows * length) + flat.size(0)


def constants(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * torch.tensor([1.0, 2.0]).sum() + torch.zeros(hidden.shape[-1])


def written(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[:, :1].mul_(2)
    return hidden


def repeated(hidden: torch.Tensor) -> torch.Tensor:
    other = hidden.tanh()
    return hidden * other + other * other + hidden * hidden


class Stack(Toy):
    """Layers that apply one function each to the residual."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(DEEP)
        self.function = function

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + self.function(layer(hidden))
        return hidden


@pytest.mark.sample(3)
@pytest.mark.parametrize("function", [halves, itself, frozen, sizes, constants, written, repeated])
def test_calls_that_are_not_plain(function: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(monkeypatch)
    torch.manual_seed(0)
    eager = Stack(function).train()
    routed = cggr.optimize(copy.deepcopy(eager), ratio=1.0, inner="eager")
    batch = toy_batch()
    actual, expected = routed(**batch)[0], eager(**batch)[0]
    both.assert_equal()
    actual.backward()
    expected.backward()
    assert torch.equal(actual, expected)
    for wanted, found in zip(eager.parameters(), routed.parameters(), strict=True):
        assert torch.equal(wanted.grad, found.grad)
