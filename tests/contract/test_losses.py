"""Losses beside the plain language model's: each equals eager's on the rows that an eager router selects, or is refused
by name. The table of docs/integrations.md says which."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import ARCHITECTURES, COMMON, GROUPED, NO_BERT_DROPOUT, VOCABULARY, token_batch
from segment_oracle import packed
from small import Small, SmallConfig
from torch import Tensor

import cggr_compile as cggr

TAGS = 3
OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 1, "inner": "eager"}


def assert_exact(
    eager: torch.nn.Module, batch: dict[str, Tensor], layers: str, causal: bool, atol: float = 0.0
) -> None:
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    loss, gradients = oracle.step(model, batch)
    architecture = dataclasses.replace(ARCHITECTURES["llama"], layers=layers, causal=causal)
    rows = oracle.expected_rows(eager, architecture, batch, 0.5, 1)
    assert torch.equal(model.cggr.selected, rows)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(batch, rows)), atol=atol)


def tags_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.where(batch["labels"] == -100, -100, batch["labels"] % TAGS)}


def llama() -> torch.nn.Module:
    config = {**GROUPED, "num_hidden_layers": 2, "num_labels": TAGS, "classifier_dropout": 0.0, "use_cache": False}
    return transformers.LlamaForTokenClassification(transformers.LlamaConfig(**config))


def bert() -> torch.nn.Module:
    config = {**COMMON, **NO_BERT_DROPOUT, "num_hidden_layers": 2, "num_labels": TAGS}
    return transformers.BertForTokenClassification(transformers.BertConfig(**config))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("build", "layers"), [(bert, "bert.encoder.layer"), (llama, "model.layers")])
def test_token_classification_is_routed_by_its_heads_loss(build: Callable[[], torch.nn.Module], layers: str) -> None:
    torch.manual_seed(0)
    assert_exact(build().train(), tags_of(token_batch(6, 12)), layers, causal=False)


def batch_of(route: str) -> dict[str, Tensor]:
    if route == "segment":
        return packed([[5, 7], [12], [4, 4, 4], [6, 6]], ignored=0.2)
    return token_batch(6, 12)


@pytest.mark.sample(4)
@pytest.mark.parametrize("ignored", [0, 5, -1, VOCABULARY - 1])
@pytest.mark.parametrize("route", ["sequence", "segment", "token", "loss"])
def test_any_number_may_stand_for_labels_that_are_ignored(route: str, ignored: int) -> None:
    """`ignore_index`, also a word's: a step gives what -100 in its place gives, and what eager gives on these rows."""
    torch.manual_seed(0)
    eager = ARCHITECTURES["llama"].build().train()
    batch = batch_of(route)
    usual = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == ignored, -100)}
    other = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, ignored), "ignore_index": ignored}
    first, second = (cggr.optimize(copy.deepcopy(eager), **OPTIONS, route=route, selection="topk") for _ in range(2))
    loss, gradients = oracle.step(second, other)
    oracle.assert_same_step(loss, gradients, *oracle.step(first, usual))
    assert torch.equal(first.cggr.selected, second.cggr.selected)
    if route == "sequence":
        rows = oracle.expected_rows(eager, ARCHITECTURES["llama"], usual, 0.5, 1)
        assert torch.equal(second.cggr.selected, rows)
        oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(usual, rows)))


class ZLoss(Small):
    """PaLM's z-loss (arXiv 2204.02311, section 5) beside the cross-entropy."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss + 1e-2 * out.logits.float().logsumexp(-1).square().mean()
        return out


class Smoothed(Small):
    """A cross-entropy with options."""

    options: ClassVar[dict[str, Any]] = {"label_smoothing": 0.1}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        if labels is not None:
            out.loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **self.options)
        return out


class Weighted(Smoothed):
    """A weight for each class."""

    options: ClassVar[dict[str, Any]] = {"weight": torch.ones(VOCABULARY)}


def test_a_z_loss_is_of_the_selected_rows() -> None:
    """Within rounding: its logits are computed apart from the cross-entropy's, and the gradients are added later."""
    torch.manual_seed(0)
    eager = ZLoss(SmallConfig(vocab_size=VOCABULARY)).train()
    batch = {name: tensor for name, tensor in token_batch(6, 12).items() if name in ("input_ids", "labels")}
    assert_exact(eager, batch, "layers", causal=True, atol=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [Smoothed, Weighted])
def test_a_cross_entropy_with_options_is_refused(kind: type[Small]) -> None:
    model = cggr.optimize(kind(SmallConfig(vocab_size=VOCABULARY)).train(), **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match=r"class weights or label smoothing \(node .*test_losses\.py:"):
        model(**token_batch(6, 12))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.tensor([0, 2, 1]),
            r"shape \(3,\) are one for each row: sequence classification is not routed",
        ),
        (torch.ones(3, TAGS), r"labels are torch\.float32.*losses of regression and of several labels are not routed"),
    ],
)
def test_sequence_classification_is_refused(labels: Tensor, message: str) -> None:
    config = transformers.LlamaConfig(**GROUPED, num_labels=TAGS, pad_token_id=0)
    model = cggr.optimize(transformers.LlamaForSequenceClassification(config).train(), **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match=message):
        model(**{**token_batch(3, 12), "labels": labels})


def test_question_answering_is_refused() -> None:
    with pytest.raises(cggr.CannotOptimize, match=r"LlamaForQuestionAnswering\.forward takes no labels"):
        cggr.optimize(transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**GROUPED)), **OPTIONS)
