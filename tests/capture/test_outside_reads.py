"""What the layers of a model read besides the residual: sizes that depend on data, the answer of a model in front that
only cuts the text, the states of an encoder.

All are shown on small models by `check`, whose eager router is independent.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import WIDTH, WORDS, Toy, toy_batch
from transformers.modeling_outputs import CausalLMOutput

import cggr_compile as cggr

EXPERTS = 3


class Model(Toy):
    """A Toy that returns what transformers' models return."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:  # type: ignore[override]
        logits = self.logits(self.middle(self.embed(input_ids)))
        return CausalLMOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)


class Dispatch(nn.Module):
    """Experts that each run on a slice of the sorted tokens; the sizes of the slices are read from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        weight, expert = self.gate(tokens).softmax(-1).max(-1)
        sizes = nn.functional.one_hot(expert, EXPERTS).sum(0).tolist()
        order = expert.argsort()
        parts = tokens[order].split(sizes, dim=0)
        left, right = torch.cat([run(part) for run, part in zip(self.experts, parts, strict=True)]).chunk(2, dim=-1)
        outputs = left.tanh() * right * weight[order, None]
        return hidden + torch.zeros_like(tokens).index_add(0, order, outputs).view(hidden.shape)


class Experts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dispatch() for _ in range(3))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_sizes_read_from_data_are_symbols_of_their_own_in_every_copy() -> None:
    """Every expert has a size of its own, and each is known to be no less than nothing, as in the capture."""
    torch.manual_seed(0)
    outcome = cggr.check(Experts(), toy_batch(), toy_batch(6, seed=1))
    assert outcome.exact, str(outcome)
    assert (outcome.layers, outcome.path) == (3, "layers")


class Cut(nn.Module):
    """A larger model in front, of which only a comparison is left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return hidden.sum(-1) > 0


class Patched(Model):
    def __init__(self) -> None:
        super().__init__()
        self.cut = Cut()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:  # type: ignore[override]
        starts = self.cut(input_ids).unsqueeze(-1)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.where(starts, layer(hidden), hidden).tanh()
        logits = self.logits(hidden)
        return CausalLMOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)


def test_layers_of_a_model_that_is_only_compared_with_are_not_the_models() -> None:
    """Its stack is longer, but the hidden states that reach the head are not its."""
    torch.manual_seed(0)
    explanation = cggr.explain(Patched(), toy_batch(), router_layers=1, inner="eager")
    layers = explanation.runtime.plans[-1].program.layers
    assert len(layers) == 3


class Block(nn.Module):
    """Reads the states of an encoder, where there is one, by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        if states is not None:
            weights = (self.other(hidden) @ states.transpose(1, 2)).softmax(-1)
            hidden = hidden + weights @ states
        return hidden + self.own(hidden).tanh()


class EncoderDecoder(Model):
    """The decoder reads the labels, moved by one place; encoder and decoder share their embedding."""

    def __init__(self, encoder_layers: int = 5) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.encoder = nn.ModuleList(Block() for _ in range(encoder_layers))
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1))

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor, decoder_input_ids: torch.Tensor | None = None
    ) -> CausalLMOutput:
        states = self.embed(input_ids)
        for layer in self.encoder:
            states = layer(states)
        if decoder_input_ids is None:
            before = nn.functional.pad(labels, (1, 0), value=1)[:, :-1]
            decoder_input_ids = before.masked_fill(before == -100, 0)
        hidden = self.embed(decoder_input_ids)
        for layer in self.layers:
            hidden = layer(hidden, states)
        logits = self.logits(hidden)
        return CausalLMOutput(loss=self.loss(logits, labels), logits=logits)


def test_a_router_is_the_encoder_and_the_first_layers_of_the_decoder() -> None:
    """Also where the encoder has more layers; the eager router, which runs the whole encoder, selects the same rows."""
    torch.manual_seed(0)
    outcome = cggr.check(EncoderDecoder(), toy_batch(ignored=0.2), toy_batch(6, seed=1))
    assert outcome.exact, str(outcome)
    assert (outcome.layers, outcome.path) == (3, "layers")


def test_tokens_of_a_decoder_are_not_dropped() -> None:
    model = cggr.optimize(EncoderDecoder(), route="token", selection="topk", router_layers=1, inner="eager")
    with pytest.raises(
        cggr.CannotOptimize, match=r"the decoder's layers read the encoder's states.*; route an encoder"
    ):
        model(**toy_batch())


def test_what_a_decoder_reads_is_made_from_the_labels() -> None:
    """Ids of its own would be those of another sequence."""
    batch = toy_batch()
    model = cggr.optimize(EncoderDecoder(), inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"the call has decoder_input_ids: .*; pass labels only"):
        model(**batch, decoder_input_ids=batch["input_ids"])
