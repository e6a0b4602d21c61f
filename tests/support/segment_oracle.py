"""The eager oracle of the segment route: no graph, no operator and no helper of the compiler is used here.

A batch of packed sequences is a list of documents. An eager router scores them, a greedy search takes them, and the
untouched model trains on those taken: packed anew, or each by itself.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import oracle
import torch
from architectures import VOCABULARY, Architecture
from torch import nn


class Document(NamedTuple):
    """A document's row, its places there, and how many of its labels are predicted."""

    row: int
    places: tuple[int, ...]
    counted: int


def packed(
    lengths: list[list[int]], seed: int = 0, ignored: float = 0.0, first_ignored: bool = True
) -> dict[str, torch.Tensor]:
    """Sequences of documents of these lengths, whose sums are alike; labels ignored with a probability, and, unless
    otherwise said, those of first tokens, as collators do."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([[place for length in row for place in range(length)] for row in lengths])
    ids = torch.randint(3, VOCABULARY, positions.shape, generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < ignored, -100)
    if first_ignored:
        labels = labels.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def documents_of(batch: oracle.Batch) -> list[Document]:
    found = []
    for row, (positions, labels) in enumerate(zip(batch["position_ids"], batch["labels"], strict=True)):
        starts = [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist(), len(positions)]
        for start, end in itertools.pairwise(starts):
            counted = int((labels[start + 1 : end] != -100).sum())
            found.append(Document(row, tuple(range(start, end)), counted))
    return found


def alone(batch: oracle.Batch, document: Document) -> dict[str, torch.Tensor]:
    """The document as a batch of its own."""
    at = slice(document.places[0], document.places[-1] + 1)
    return {name: tensor[document.row : document.row + 1, at] for name, tensor in batch.items()}


def expected_documents(
    model: nn.Module, architecture: Architecture, batch: oracle.Batch, k: int, layers: int
) -> list[Document]:
    """What "topk" takes: in each row the hardest first, by an eager router that reads every document by itself."""
    router, scored = oracle.truncated(model, architecture, layers), []
    for document in documents_of(batch):
        if document.counted and len(document.places) <= k:
            part = alone(batch, document)
            with torch.no_grad():
                logits = router(input_ids=part["input_ids"], position_ids=part["position_ids"]).logits
            losses = oracle.token_scores(logits, part["labels"], "loss", causal=True)
            scored.append((math.fsum(losses.flatten().tolist()) / document.counted, document))
    taken, left = [], dict.fromkeys(range(len(batch["input_ids"])), k)
    for _, document in sorted(scored, key=lambda pair: (-pair[0], pair[1].places)):
        if len(document.places) <= left[document.row]:
            taken.append(document)
            left[document.row] -= len(document.places)
    return sorted(taken)


def places_of(documents: list[Document], rows: int, k: int) -> torch.Tensor:
    """Positions [rows, k] of the documents' tokens, -1 behind the last."""
    places: list[list[int]] = [[] for _ in range(rows)]
    for document in sorted(documents):
        places[document.row] += document.places
    return torch.tensor([row + [-1] * (k - len(row)) for row in places])


def repacked(batch: oracle.Batch, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sequences of the documents at `positions` [B, k] alone, labels of their first tokens ignored; behind the last
    one documents of one token without a label, as collators pad packed sequences."""
    empty, places = positions < 0, positions.clamp(min=0)
    found = {name: tensor.gather(1, places) for name, tensor in batch.items()}
    found["position_ids"] = found["position_ids"].masked_fill(empty, 0)
    found["labels"] = found["labels"].masked_fill(found["position_ids"] == 0, -100)
    return found


def step_alone(model: nn.Module, batch: oracle.Batch, documents: list[Document]) -> oracle.Step:
    """The mean over the counted tokens of all documents, each run as a batch of its own."""
    model.zero_grad(set_to_none=True)
    total = sum(document.counted for document in documents)
    losses = [model(**alone(batch, document)).loss * document.counted for document in documents]
    loss = torch.stack(losses).sum() / total
    loss.backward()
    return loss.detach(), oracle.gradients(model)
