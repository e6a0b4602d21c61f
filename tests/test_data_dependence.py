"""Sizes and masks that depend on data: expert dispatch by lists of sizes, and models in front that only cut the text.

Both are shown on small models by `check`, whose eager router is independent.
"""

from __future__ import annotations

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
