"""Models, batches and expectations for the tests of the original's surface."""

from __future__ import annotations

from typing import Any

import torch
from architectures import VOCABULARY
from torch import Tensor, nn

LOSS_METRICS = [
    *("step", "token_ratio", "tokens_selected", "tokens_total"),
    *("avg_confidence", "avg_entropy", "avg_difficulty", "selection", "scoring"),
]
MODEL_METRICS = [
    *("step", "token_ratio", "tokens_selected", "tokens_total", "router_tokens_selected", "sequences_selected"),
    *("avg_confidence", "avg_entropy", "sequence_selection_mode", "selection", "scoring"),
]
INFO = ["confidence", "entropy", "current_ratio", "tokens_selected", "tokens_total", "selection", "scoring"]
SCORINGS = ("entropy", "margin", "loss", "combined")
SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


class Plain(nn.Module):
    """No Hugging Face model: ids to logits through a list of blocks, under names of its own."""

    def __init__(self, blocks: int = 3, width: int = 16, dropout: float = 0.0, counted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.stack = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.out = nn.Linear(width, VOCABULARY)
        self.num_layers = blocks
        self.counted = counted
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        x = self.tokens(input_ids)
        blocks = (self.stack[i] for i in range(self.num_layers)) if self.counted else self.stack
        for block in blocks:
            x = block(x)
        return self.out(x)


class Fixed(nn.Module):
    """Logits that were given, or a scorer that was."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.values = values
        self.targets: Tensor | None = None
        self.step_count = torch.tensor(0)

    def step(self) -> None:
        self.step_count += 1

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, **kwargs: Any) -> Any:
        self.targets = targets
        return self.values[0] if len(self.values) == 1 else self.values


def batch_of(rows: int = 6, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return ids, ids.clone()


def logits_of(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def chosen_tokens(scores: Tensor, valid: Tensor, k: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    return sorted([i for i in order if valid[i]][:k])
