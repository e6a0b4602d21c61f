"""Layers that are compiled by themselves: the same step, fewer compilations, and no sharing of what differs."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import oracle
import plans
import pytest
import token_oracle
import torch
import transformers as T
from architectures import ARCHITECTURES, GROUPED, Architecture, eager_of, token_batch
from cggr_compile.passes.lower.outline_layers import is_size, outline_layers
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.errors import Refusal
from cggr_compile.ir.program import Program

LAYERS = 4
DEEP = {**GROUPED, "num_hidden_layers": LAYERS}
LLAMA = Architecture("llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**DEEP)), "model.layers")
OPTIONS = {"inner": "aot_eager", "outline_layers": True, "ratio": 0.5, "router_layers": 2}
# aot_eager runs eager's operators; gradients of what several pieces read are added in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = eager_of(LLAMA)
    return model, plans.captured(model, token_batch())


def counts(routed: plans.Routed) -> tuple[int, int]:
    variant = routed.plan.route.variant
    return variant.pieces, variant.bodies


class Scaled(nn.Module):
    """Layers that differ in a constant only, with a dropout each."""

    def __init__(self, scales: list[float], dropout: float) -> None:
        super().__init__()
        self.scales = scales
        self.checkpointed = False
        self.drop = nn.Dropout(dropout)
        self.embed = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in scales)
        self.head = nn.Linear(8, 31)

    def block(self, hidden: torch.Tensor, layer: nn.Module, scale: float) -> torch.Tensor:
        return hidden + self.drop(layer(hidden)).tanh() * scale

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = self.embed(input_ids)
        for layer, scale in zip(self.layers, self.scales, strict=True):
            given = (hidden, layer, scale)
            hidden = checkpoint(self.block, *given, use_reentrant=False) if self.checkpointed else self.block(*given)
        return (nn.functional.cross_entropy(self.head(hidden).view(-1, 31), labels.view(-1)),)


def ids_batch(rows: int = 6, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids.flip(0)}


def scaled(*scales: float, dropout: float = 0.0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Scaled(list(scales), dropout).train(), ids_batch()


@pytest.mark.sample(1)
@pytest.mark.parametrize("selection", ["topk", "random"])
def test_the_sequence_route_is_eagers_on_the_selected_rows(selection: str) -> None:
    eager, batch = scaled(*[1.0] * LAYERS)
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS, selection=selection)
    for each in (batch, ids_batch(9, 8)):  # the second batch has other sizes
        actual = oracle.step(model, each)
        oracle.assert_same_step(*actual, *oracle.step(eager, oracle.rows_of(each, model.cggr.selected)), **CLOSE)
    # In front with layer 0, one of the three alike, and the rest: for the first sizes, and for all others.
    variant = model.cggr.runtime.plans[-1].route.variant
    assert (variant.pieces, variant.bodies) == (2 * (LAYERS + 1), 2 * 3)


def test_the_token_route_is_eagers_with_its_middle_layers_on_the_selected_tokens(
    llama: tuple[nn.Module, Program],
) -> None:
    eager, batch = copy.deepcopy(llama[0]), token_batch(7, 10)
    routed = plans.Routed(*llama, **OPTIONS, route="token")
    actual = routed.step(batch)
    expected = token_oracle.step(eager, LLAMA, batch, range(1, LAYERS - 1), routed.selected)
    oracle.assert_same_step(*actual, *expected, **CLOSE)
    # Layers 1 (it gathers), 2 (it scatters) and 3 (it is on all tokens) differ.
    assert counts(routed) == (LAYERS + 1, LAYERS + 1)


def test_a_step_on_everything_is_divided_too() -> None:
    eager, batch = scaled(*[1.0] * LAYERS)
    model = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, "ratio": 1.0})
    oracle.assert_same_step(*oracle.step(model, batch), *oracle.step(eager, batch), **CLOSE)
    unrouted = model.cggr.runtime.plans[-1].unrouted
    assert (unrouted.pieces, unrouted.bodies) == (LAYERS + 1, 3)


@pytest.mark.long  # that layers of two kinds are two bodies, `test_a_constant_makes_another_body` shows
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt2"])
def test_other_families(name: str) -> None:
    """Windows in turn, experts whose statistics reach the loss, another block."""
    built = ARCHITECTURES[name].build
    config = copy.deepcopy(built().config)
    config.num_hidden_layers = LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention" if i % 2 else "full_attention" for i in range(LAYERS)]
    architecture = Architecture(name, lambda: type(built())(config), ARCHITECTURES[name].layers)
    eager = eager_of(architecture)
    batch = token_batch()
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    actual = oracle.step(model, batch)
    oracle.assert_same_step(*actual, *oracle.step(eager, oracle.rows_of(batch, model.cggr.selected)), **CLOSE)
    variant = model.cggr.runtime.plans[-1].route.variant
    assert not isinstance(variant.outline, Refusal)
    assert variant.bodies <= 4  # of windows there are two kinds of layers


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["checkpointing", "autocast"])
def test_modes(mode: str) -> None:
    eager, batch = scaled(*[1.0] * LAYERS)
    eager.checkpointed = mode == "checkpointing"
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = model(**batch)[0]
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        expected = eager(**oracle.rows_of(batch, model.cggr.selected))[0]
    expected.backward()
    close = CLOSE if mode == "checkpointing" else {"rtol": 2e-2, "atol": 2e-3}
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager), **close)
    assert model.cggr.runtime.plans[-1].route.variant.bodies == 3


def test_dropout_draws_what_eager_draws() -> None:
    eager, batch = scaled(*[1.0] * LAYERS, dropout=0.5)
    model = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, "selection": "random"})
    model(**batch)
    torch.manual_seed(7)
    actual = oracle.step(model, batch)
    torch.manual_seed(7)
    oracle.assert_same_step(*actual, *oracle.step(eager, oracle.rows_of(batch, model.cggr.selected)), **CLOSE)
    assert not isinstance(model.cggr.runtime.plans[-1].route.variant.outline, Refusal)


def test_frozen_layers_are_compiled_apart_and_keep_no_gradient() -> None:
    eager, batch = scaled(1.0, 1.0, 1.0, 1.0, 1.0)
    eager.layers[2].requires_grad_(False)
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    actual = oracle.step(model, batch)
    oracle.assert_same_step(*actual, *oracle.step(eager, oracle.rows_of(batch, model.cggr.selected)), **CLOSE)
    # In front with layer 0, the one that is frozen, one of the two alike, and the rest.
    assert model.cggr.runtime.plans[-1].route.variant.bodies == 4


def test_a_constant_makes_another_body() -> None:
    eager, batch = scaled(1.0, 0.5, 0.25, 0.5)
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    loss = model(**batch)[0]
    loss.backward()
    expected = eager(**oracle.rows_of(batch, model.cggr.selected))[0]
    expected.backward()
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager), **CLOSE)
    # Layers 1 and 3 are one body.
    assert model.cggr.runtime.plans[-1].route.variant.bodies == 4
    assert "5 pieces, 4 compiled" in str(model.cggr.report())


def test_pieces_hold_every_call_once_and_read_only_what_came_before(llama: tuple[nn.Module, Program]) -> None:
    program = plans.Routed(*llama, **{**OPTIONS, "inner": "eager"}).plan.program
    pieces = outline_layers(program)
    order = [node for piece in pieces for node in piece]
    place = {node: index for index, node in enumerate(order)}
    assert len(place) == len(order)
    assert set(place) == {n for n in program.graph.nodes if n.op == "call_function" and not is_size(n)}
    for node in order:
        assert all(place[source] < place[node] for source in node.all_input_nodes if source in place)
    residuals = program.layers.residuals
    assert [piece[-1] for piece in pieces[1:-1]] == list(residuals[1:])
    assert all(left in pieces[i] for i, (left, _) in enumerate(pairwise(residuals)))


def test_what_cannot_be_divided_is_compiled_whole_and_says_why() -> None:
    eager, batch = scaled(1.0, 0.5)
    model = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, "router_layers": 1})
    loss = model(**batch)[0]
    loss.backward()
    expected = eager(**oracle.rows_of(batch, model.cggr.selected))[0]
    expected.backward()
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager))
    assert model.cggr.report().outlined == "0 pieces, 0 compiled; not divided: 2 layers are fewer than 3"


def test_a_model_without_a_stack_says_what_is_missing() -> None:
    class Flat(Toy):
        def middle(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.layers[0](hidden).tanh()

    torch.manual_seed(0)
    model = cggr.optimize(Flat().train(), **OPTIONS, selection="random")
    model(**toy_batch())[0].backward()
    assert "not divided: no layer stack: no equal blocks" in model.cggr.report().outlined


@pytest.mark.parametrize(("options", "text"), [({}, "off"), ({"outline_layers": True}, "off: the eager backend")])
def test_the_report_says_where_nothing_is_outlined(options: dict[str, Any], text: str) -> None:
    torch.manual_seed(0)
    model = cggr.optimize(Toy(), ratio=0.5, router_layers=1, inner="eager", **options)
    model(**toy_batch())[0].backward()
    assert model.cggr.report().outlined.startswith(text)


def test_auto_follows_the_cuda_graphs() -> None:
    assert not cggr.RoutingConfig().outlines
    assert cggr.RoutingConfig(cuda_graphs=True).outlines
    assert not cggr.RoutingConfig(cuda_graphs=True, outline_layers=False).outlines
    with pytest.raises(cggr.ConfigError, match="outline_layers=1 is neither a bool nor 'auto'"):
        cggr.RoutingConfig(outline_layers=1)
