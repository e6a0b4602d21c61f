"""The eager side of `check` on the segment route: documents of packed sequences, chosen and packed anew.

Nothing of the compiler is used here.
"""

from __future__ import annotations

import itertools

import torch

from cggr_compile.checking.eager_layers import Batch


def documents_of(position_ids: torch.Tensor) -> list[range]:
    """The places of each document of one sequence: it begins where `position_ids` [S] do not go up by 1."""
    starts = ((position_ids.diff() != 1).nonzero().flatten() + 1).tolist()
    return [range(*pair) for pair in itertools.pairwise([0, *starts, len(position_ids)])]


def hardest_documents(
    losses: torch.Tensor, counted: torch.Tensor, position_ids: torch.Tensor, kept: int
) -> torch.Tensor:
    """Positions [B, kept] of the documents of largest mean loss that fit into `kept` tokens, -1 behind the last; of
    `losses` [B, S], 0 where nothing is `counted` [B, S]."""
    found = []
    for row, counts, positions in zip(losses, counted, position_ids, strict=True):
        means = {}
        for document in documents_of(positions):
            at = slice(document.start, document.stop)
            if counts[at].any() and len(document) <= kept:
                means[document] = (row[at].double().sum() / counts[at].sum()).float().item()
        places: list[int] = []
        for document in sorted(means, key=lambda document: (-means[document], document.start)):
            if len(places) + len(document) <= kept:
                places += document
        found.append(sorted(places) + [-1] * (kept - len(places)))
    return torch.tensor(found)


def first_ignored(labels: torch.Tensor, position_ids: torch.Tensor, shift: int, ignored: int) -> torch.Tensor:
    """Labels without those of first tokens, where they are predicted from the token before."""
    return labels.masked_fill(position_ids == 0, ignored) if shift else labels


def packed_anew(batch: Batch, positions: torch.Tensor, shift: int, ignored: int) -> Batch:
    """The sequences of the documents at `positions` [B, k] alone; behind the last one documents of one token without a
    label."""
    empty, places = positions < 0, positions.clamp(min=0)
    found = {name: tensor.gather(1, places) for name, tensor in batch.items()}
    found["position_ids"] = found["position_ids"].masked_fill(empty, 0)
    found["labels"] = first_ignored(found["labels"].masked_fill(empty, ignored), found["position_ids"], shift, ignored)
    return found
