"""Documents of packed sequences: where each is, and which of them fill a budget of tokens.

A packed sequence holds documents one behind another; `position_ids` count the tokens of each from 0, so a document
begins wherever they do not go up by 1 (transformers' `find_packed_sequence_indices`). Documents are numbered in each
sequence from 0; what is said of them is held in tensors [B, S], of which a sequence of n documents uses the first n.

Shapes are static, everything is computed on the device, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from cggr_compile.kernels.reference import selection
from torch import Tensor

SEARCHES = 8
"""How often the order of preference is gone through. Each time ends at a document that does not fit any more."""

FIGURES = ("documents", "kept", "too_long", "tokens")
"""What `select_documents` counts in each sequence: documents with counted tokens, those of them that are kept, those of
more than k tokens, and counted tokens of those kept."""


def document_ids(position_ids: Tensor) -> Tensor:
    """int64 [B, S]: the number of each token's document, of `position_ids` int64 [B, S]."""
    return (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)


class DocumentArguments(NamedTuple):
    """The arguments of `select_documents`, in their order: those of the operator and of all that computes it.

    Attributes:
        position_ids: int64 [B, S].
        counted: bool [B, S].
        scores: float32 [B, S], None for a rule without.
        k: the most tokens of a sequence.
        rule: one that weighs nothing: `topk`, `fixed_quota`, `random`, or `trimmed`, whose shares are of the documents
            that can be taken, and of k.
        noise: uniform float32 [B, S], one number for each document; None for a rule without.
        names, values: the rule's options.
    """

    position_ids: Tensor
    counted: Tensor
    scores: Tensor | None
    k: int
    rule: str
    noise: Tensor | None
    names: Sequence[str]
    values: Sequence[float]


def select_documents(*args: Any) -> tuple[Tensor, Tensor]:
    """The tokens of the documents that train, at most k of each sequence: int64 [B, k], ascending, -1 behind the last;
    and int64 [B, 4], the FIGURES. `args` are `DocumentArguments`.

    A document's score is the mean of the scores of its counted tokens, computed in float64. Documents are taken whole,
    in the rule's order of preference; one that does not fit into what is left of k is passed over. Never taken are
    those without a counted token and those of more than k tokens. After SEARCHES searches the rest is left empty.
    Raises ValueError for a rule that has weights.
    """
    given = DocumentArguments(*args)
    ids, k = document_ids(given.position_ids), given.k
    length, count = (_of_documents(ids, x) for x in (torch.ones_like(ids), given.counted.long()))
    valid = (count > 0) & (length <= k)
    taken = _filled(_places(given, _means(ids, given.scores, count), valid, length), valid, length, k)
    kept = taken.gather(1, ids)
    place = torch.where(kept, kept.cumsum(1) - 1, k)
    tokens = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = torch.full((ids.shape[0], k + 1), -1, device=ids.device).scatter(1, place, tokens)[:, :k]
    figures = (count > 0, taken, (count > 0) & (length > k), count * taken)
    return positions.contiguous(), torch.stack([figure.sum(1) for figure in figures], dim=1)


def _of_documents(ids: Tensor, x: Tensor) -> Tensor:
    """Sums [B, S] over each document's tokens."""
    return torch.zeros_like(x).scatter_add(1, ids, x)


def _means(ids: Tensor, scores: Tensor | None, count: Tensor) -> Tensor | None:
    """float32 [B, S]. The order in which a device adds would move the last bits of a sum in float32."""
    if scores is None:
        return None
    return (_of_documents(ids, scores.double()) / count.clamp(min=1)).float()


def _places(given: DocumentArguments, means: Tensor | None, valid: Tensor, length: Tensor) -> Tensor:
    """int64 [B, S]: each document's place in the rule's order of preference, invalid ones last."""
    rule, noise = given.rule, given.noise
    if rule == "random" and noise is not None:
        return selection.topk_places(noise, valid)
    if rule in ("topk", "fixed_quota") and means is not None:
        return selection.topk_places(means, valid)
    if rule == "trimmed" and means is not None and noise is not None:
        known = {**selection.options_of(rule), **dict(zip(given.names, given.values, strict=True))}
        tau, epsilon = (float(known[name] or 0) for name in ("tau", "epsilon"))
        return selection.trimmed_places(means, valid, noise, given.k, tau, epsilon, length)
    raise ValueError(f"rule: {rule!r} selects no documents, or its scores or noise are None")


def _filled(place: Tensor, valid: Tensor, length: Tensor, k: int) -> Tensor:
    """bool [B, S]: the documents taken of k tokens, in the order of `place`."""
    # A document's place is its index in that order, so scattering by place sorts, and gathering sorts back.
    size = torch.zeros_like(length).scatter(1, place, length)
    open_ = torch.zeros_like(valid).scatter(1, place, valid)
    taken, left = torch.zeros_like(valid), torch.full_like(length[:, :1], k)
    for _ in range(SEARCHES):
        fits = open_ & (size <= left)
        now = fits & (torch.where(fits, size, 0).cumsum(1) <= left)
        taken, open_ = taken | now, fits & ~now
        left = left - torch.where(now, size, 0).sum(1, keepdim=True)
    return taken.gather(1, place)
