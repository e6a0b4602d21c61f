"""Padded batches."""

from __future__ import annotations

import torch
from architectures import VOCABULARY


def padded(
    lengths: list[int], seed: int = 0, side: str = "right", ignored: float = 0.0, longest: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded behind or in front of their tokens; labels ignored with a probability, those of
    padding always, and of left padding those that padding predicts."""
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, longest)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    if side == "left":
        mask = mask.flip(1)
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=generator) < ignored), -100)
    if side == "left":
        labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
