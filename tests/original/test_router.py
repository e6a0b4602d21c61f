"""The router that the original cuts out of a model."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch
from original_models import Plain, batch_of
from torch import Tensor, nn

from cggr_compile import CGGRScorer, TruncatedRouter, create_truncated_router


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bert", "mamba", "mixtral"])
def test_cut_model_equals_a_truncated_copy(name: str) -> None:
    architecture, model = ARCHITECTURES[name], build(name).eval()
    model.config.use_cache = True
    batch = token_batch(takes_mask=architecture.takes_mask)
    labels = batch.pop("labels")
    before = (model.config.to_dict(), list(model.state_dict()), model(**batch).logits)
    router = TruncatedRouter(model, 2)
    without_cache = {} if name == "bert" else {"use_cache": False}
    with torch.no_grad():
        expected = oracle.truncated(model, architecture, 2)(**batch, **without_cache).logits
        assert router(**batch).equal(expected)
    assert not router.passthrough
    after = (model.config.to_dict(), list(model.state_dict()), model(**batch).logits)
    assert before[:2] == after[:2]
    assert before[2].equal(after[2])
    assert CGGRScorer(router)(targets=labels, **batch)[1].any()


def test_router_keeps_no_cache() -> None:
    model, (ids, _), caches = build("llama").eval(), batch_of(), []
    model.config.use_cache = True
    model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    TruncatedRouter(model)(ids)
    model(ids)
    assert caches[0] is None
    assert caches[1] is not None


@pytest.mark.parametrize("counted", [True, False])
def test_plain_modules_are_cut_too(counted: bool) -> None:
    model, (ids, _) = Plain(counted=counted), batch_of()
    x = model.tokens(ids)
    x = model.stack[0](x)
    assert create_truncated_router(model, 1)(ids).equal(model.out(x))
    assert (len(model.stack), model.num_layers) == (3, 3)


def test_model_is_put_back_after_an_error() -> None:
    model = build("llama")
    layers, config = model.model.layers, model.config.to_dict()
    with pytest.raises(RuntimeError):
        TruncatedRouter(model)(torch.zeros(2, 4))
    assert model.model.layers is layers
    assert model.config.to_dict() == config


class NoList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.tokens(input_ids),)


class TwoStacks(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.stack)


class Indexed(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.stack[2](self.stack[0](self.tokens(input_ids))))


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (NoList(), "NoList cannot be cut: it has no list of layers of one class"),
        (TwoStacks(), "stack and other are equally long"),
        (Plain(blocks=2), "stack has no more than num_layers=2 layers"),
        (Indexed(), "its forward indexes stack"),
    ],
    ids=["no list", "two lists", "short list", "indexed list"],
)
def test_passthrough_with_a_warning(model: nn.Module, obstacle: str) -> None:
    ids, _ = batch_of()
    expected = model(ids)
    with pytest.warns(RuntimeWarning, match=obstacle):
        logits = (router := create_truncated_router(model))(ids)
    assert router.passthrough is True
    assert logits.equal(expected[0] if isinstance(expected, tuple) else expected)
    assert router(ids).equal(logits)
    with pytest.raises(ValueError, match="use architecture='passthrough'"):
        TruncatedRouter(model, architecture="llama")(ids)


def test_an_index_error_of_the_ids_stays_one() -> None:
    router = TruncatedRouter(Plain())
    with pytest.raises(IndexError):
        router(torch.full((1, 2), VOCABULARY))
    assert not router.passthrough


def test_experts_inside_layers_are_not_the_layers() -> None:
    model = Plain(blocks=2)
    for block in model.stack:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    ids, _ = batch_of()
    assert TruncatedRouter(model, 1)(ids).equal(model.out(model.stack[0](model.tokens(ids))))


def test_explicit_passthrough_and_headless_models() -> None:
    model, (ids, _) = build("llama").eval(), batch_of()
    router = TruncatedRouter(model, architecture="passthrough")
    assert router.passthrough
    assert router(ids).equal(model(ids).logits)
    headless = TruncatedRouter(model.model, architecture="llama")
    assert headless(ids).shape == (6, 8, 32)
