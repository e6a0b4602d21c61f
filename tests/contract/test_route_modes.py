"""The token and the loss route under checkpointing, autocast and dropout, on one row, and through compiled backends."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import token_oracle
import torch
import torch.nn.functional as F
import transformers as T
from architectures import GROUPED, Architecture, eager_of, token_batch
from torch import nn

import cggr_compile as cggr

LAYERS, RATIO, ROUTER_LAYERS = 3, 0.5, 2
MIDDLE = range(1, LAYERS - 1)

LLAMA = Architecture(
    "llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**{**GROUPED, "num_hidden_layers": LAYERS})), "model.layers"
)
DROPPING = Architecture(
    "gpt2 with dropout",
    lambda: T.GPT2LMHeadModel(
        T.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "transformer.h",
)

BOTH = ("token", "loss")
ROUTES = [pytest.param("token", marks=pytest.mark.long), pytest.param("loss", marks=pytest.mark.long), BOTH]
Step = tuple[torch.Tensor, dict[str, torch.Tensor | None]]


def routed(eager: nn.Module, route: Any, **options: Any) -> nn.Module:
    options = {"ratio": RATIO, "selection": "topk", "router_layers": ROUTER_LAYERS, "inner": "eager", **options}
    return cggr.optimize(copy.deepcopy(eager), route=route, **options)


def expected_step(
    eager: nn.Module, batch: dict[str, torch.Tensor], route: Any, selected: Any, architecture: Architecture = LLAMA
) -> Step:
    """Eager's step with its middle layers on the selected positions, its loss over the selected tokens, or both."""
    selection = dict(zip(route, selected, strict=True)) if isinstance(route, tuple) else {route: selected}
    if "loss" not in selection:
        return token_oracle.step(eager, architecture, batch, MIDDLE, selection["token"])
    model, positions = copy.deepcopy(eager), selection.get("token")
    if positions is not None:
        model = token_oracle.shortened(eager, architecture, MIDDLE, positions)
    model.zero_grad(set_to_none=True)
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    mask = selection["loss"]
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(logits[mask].float(), labels[mask])
    loss.backward()
    return loss.detach(), token_oracle.renamed(oracle.gradients(model))


def tolerances(route: Any) -> dict[str, float]:
    """The token route is bitwise; the loss route multiplies gathered rows, in other blocks than eager."""
    return {} if route == "token" else {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("route", ["token", pytest.param("loss", marks=pytest.mark.long)])
def test_gradient_checkpointing_is_exact(route: str) -> None:
    eager = eager_of(LLAMA)
    eager.gradient_checkpointing_enable()
    model, batch = routed(eager, route), token_batch(6, 12)
    actual = oracle.step(model, batch)
    expected = expected_step(eager, batch, route, model.cggr.selected)
    oracle.assert_same_step(*actual, *expected, **tolerances(route))


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_loses_no_gradient(route: Any) -> None:
    eager = eager_of(LLAMA)
    model, batch = routed(eager, route), token_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected = expected_step(eager, batch, route, model.cggr.selected)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=1e-3)
    actual = oracle.gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            apart = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert apart < 5e-2, f"{name}: relative error {apart:.3f}"


def test_dropout_is_eagers_under_the_same_generator_state() -> None:
    """The middle layers draw masks of the kept tokens' size; the router draws nothing and drops nothing."""
    eager = eager_of(DROPPING)
    assert eager.config.resid_pdrop > 0
    model, batch = routed(eager, "token"), token_batch()
    model(**batch)
    torch.manual_seed(7)
    actual = oracle.step(model, batch)
    torch.manual_seed(7)
    expected = expected_step(eager, batch, "token", model.cggr.selected, DROPPING)
    oracle.assert_same_step(*actual, *expected)
    quiet = copy.deepcopy(eager)
    for module in quiet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    positions = token_oracle.expected_positions(quiet.eval(), DROPPING, batch, RATIO, ROUTER_LAYERS)
    assert torch.equal(model.cggr.selected, positions)


@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_of_one_row_is_routed(route: Any) -> None:
    eager = eager_of(LLAMA)
    ids = token_batch(1, 12, masked=False)["input_ids"]
    mask = (torch.arange(12) < 9).long().unsqueeze(0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = routed(eager, route)
    actual = oracle.step(model, batch)
    selected = model.cggr.selected
    if "token" in route:
        positions = selected[0] if isinstance(selected, tuple) else selected
        assert torch.equal(positions, token_oracle.expected_positions(eager, LLAMA, batch, RATIO, ROUTER_LAYERS))
    expected = expected_step(eager, batch, route, selected)
    oracle.assert_same_step(*actual, *expected, **tolerances(route))


@pytest.mark.sample(2)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_inner_backends_agree_within_rounding(route: Any, inner: str) -> None:
    eager = eager_of(LLAMA)
    model, batch = routed(eager, route, inner=inner), token_batch()
    actual = oracle.step(model, batch)
    expected = expected_step(eager, batch, route, model.cggr.selected)
    oracle.assert_same_step(*actual, *expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.sample(6)
@pytest.mark.parametrize("route", ["token", "loss", BOTH])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_steady_step_on_the_gpu_is_eagers_and_never_synchronises(route: Any, inner: str, autocast: bool) -> None:
    eager = eager_of(LLAMA).cuda()
    model = routed(eager, route, inner=inner)
    batch = {name: tensor.cuda() for name, tensor in token_batch().items()}
    context = torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext()
    with context:
        for _ in range(2):
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        with oracle.without_sync():
            loss = model(**batch).loss
            loss.backward()
        expected_loss, expected = expected_step(eager, batch, route, model.cggr.selected)
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-2 if autocast else 1e-4, atol=1e-3)
    for name, gradient in oracle.gradients(model).items():
        apart = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert apart < (5e-2 if autocast else 1e-3), f"{name}: relative error {apart:.4f}"
