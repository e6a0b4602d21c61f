"""Null routing against hand-written eager models whose middle layers call their experts with the kept tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers as T
from architectures import GROUPED, VOCABULARY, Architecture, eager_of, token_batch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from typing import Any
LAYERS, CHOICES = 4, 2
MIXTURE = {**GROUPED, "num_hidden_layers": LAYERS, "num_experts_per_tok": CHOICES}
BALANCED = {"num_experts": 4, "moe_intermediate_size": 16, "output_router_logits": True}

class Layer(nn.Module):
    """Adds the mean of the real tokens so far, and what an MLP makes of the sum."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        hidden = hidden + (hidden * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return hidden + self.mlp(hidden)


class Mixture(nn.Module):
    """Layers with the experts and the shared expert of Qwen2-MoE, but for layer 2, which has a dense MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.config = T.Qwen2MoeConfig(**MIXTURE, **BALANCED, shared_expert_intermediate_size=16, mlp_only_layers=[2])
        self.embed = nn.Embedding(VOCABULARY, self.config.hidden_size)
        self.layers = nn.ModuleList(Layer(layer.mlp) for layer in T.Qwen2MoeModel(self.config).layers)
        self.head = nn.Linear(self.config.hidden_size, VOCABULARY)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask.unsqueeze(-1))
        logits = self.head(hidden)
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return CausalLMOutput(loss=F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1)), logits=logits)
MIXTURE_ = Architecture("mixture", Mixture, "layers")
