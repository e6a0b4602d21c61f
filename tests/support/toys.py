"""A small language model that is captured in a second, and its router in plain eager code."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, WORDS = 16, 31

AS_IT_IS = "as_it_is"
"""An inner backend that compiles nothing, for counting what would be compiled."""
torch._dynamo.register_backend(lambda gm, inputs: gm.forward, name=AS_IT_IS)


class Toy(nn.Module):
    """A small language model with a replaceable middle, head and loss."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
        logits = self.logits(self.middle(self.embed(input_ids)))
        if labels is None:
            return (logits,)
        return (self.loss(logits, labels), logits)


class Statistics(Toy):
    """Batch norm, a mean over steps changed in place and read in the next step, and a buffer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("unread", torch.zeros((), dtype=torch.long))

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = super().middle(hidden - self.mean)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(hidden.mean((0, 1)))
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


def toy_batch(rows: int = 4, length: int = 6, seed: int = 0, ignored: float = 0.0) -> dict[str, torch.Tensor]:
    """Random ids; labels are -100 with probability `ignored`, where that is not 0 in all of row 1 as well."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < ignored, -100)
    if ignored:
        labels[1] = -100
    return {"input_ids": ids, "labels": labels}


class Routed(NamedTuple):
    """What a router of the first layers says: scores [B] (mean nll), counted tokens [B], mean confidence."""

    scores: torch.Tensor
    counts: torch.Tensor
    confidence: float

    def hardest(self, k: int) -> list[int]:
        """The k hardest rows that have a counted token, sorted."""
        rows = [row for row, count in enumerate(self.counts.tolist()) if count]
        return sorted(sorted(rows, key=lambda row: (-self.scores[row].item(), row))[:k])


@torch.no_grad()
def route(model: Toy, batch: dict[str, torch.Tensor], layers: int = 2) -> Routed:
    """The router of a Toy, layer by layer."""
    hidden = model.embed(batch["input_ids"])
    for layer in list(model.layers)[:layers]:
        hidden = hidden + layer(hidden).tanh()
    logs = model.head(hidden)[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    nll = -logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counts = counted.sum(1)
    scores = (nll * counted).sum(1) / counts.clamp(min=1)
    return Routed(scores, counts, logs.exp().amax(-1)[counted].mean().item() if counted.any() else 0.0)


def row_losses(model: Toy, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of each row's token losses [B], with a gradient."""
    logits = model(batch["input_ids"])[0][:, :-1]
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


def noisy(rows: int, seed: int, share: float) -> dict[str, torch.Tensor]:
    """Rows that count upwards, and a share of random ones."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(1, WORDS, (rows, 1), generator=generator)
    ids = (start + torch.arange(12)) % (WORDS - 1) + 1
    spoilt = torch.rand(rows, 1, generator=generator) < share
    ids = torch.where(spoilt, torch.randint(1, WORDS, ids.shape, generator=generator), ids)
    return {"input_ids": ids, "labels": ids.clone()}
