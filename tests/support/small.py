"""A small decoder with transformers' manners: resizing, adapters, checkpointing, attention masks.

`stop` and `kept` are the oracle's: what the compiler never passes. `Small.forward(stop=n)` is the router, the first n
layers, final norm and head; `kept` has the positions [B, k] on which a layer runs, by the layer's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

HEADS, HEAD = 2, 4


class SmallConfig(PreTrainedConfig):
    """Sizes of a `Small`."""

    model_type = "small"

    def __init__(self, vocab_size: int = 31, layers: int = 3, dropout: float = 0.0, **kwargs: Any) -> None:
        self.vocab_size, self.layers, self.dropout = vocab_size, layers, dropout
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        width = HEADS * HEAD
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.back = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.norm(hidden)).view(batch, length, 3, HEADS, HEAD)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * HEAD**-0.5 + bias).softmax(-1)
        hidden = hidden + self.back((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return hidden + self.dropout(self.down(self.up(hidden).tanh()))


class Small(PreTrainedModel):
    """A causal language model of `Layer`s."""

    config_class = SmallConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, HEADS * HEAD)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(HEADS * HEAD)
        self.head = nn.Linear(HEADS * HEAD, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        stop: int | None = None,
        kept: Mapping[int, Tensor] | None = None,
    ) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, None, :] != 0)
        bias = torch.zeros((), dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, -1e4)
        for index, layer in enumerate(self.layers[:stop]):
            if kept is not None and index in kept:
                hidden = on_tokens(layer, hidden, bias, kept[index])
            elif self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, bias, use_reentrant=False)
            else:
                hidden = layer(hidden, bias)
        logits = self.head(self.norm(hidden))
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
        return CausalLMOutput(loss=loss, logits=logits)


def on_tokens(layer: nn.Module, hidden: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    """The layer on each row's tokens at `kept` [B, k]; the others keep what they have."""
    rows = torch.arange(len(hidden)).unsqueeze(1)
    bias = bias.expand(len(hidden), 1, *bias.shape[-2:])
    among = bias[rows.unsqueeze(2), 0, kept.unsqueeze(2), kept.unsqueeze(1)].unsqueeze(1)
    return hidden.index_put((rows, kept), layer(hidden[rows, kept], among))


def small(**options: Any) -> Small:
    """A `Small` in training mode, the same at each call."""
    torch.manual_seed(0)
    model = Small(SmallConfig(**options)).train()
    for parameter in model.parameters():  # far enough from 0 for rows to differ
        nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model
