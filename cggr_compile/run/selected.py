"""What the last routed step kept, as users read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_SELECTIONS = {"sequence": "rows", "token": "positions", "loss": "loss_mask"}


def selected(routes: tuple[str, ...], last: Mapping[str, Any]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """The selection of each route, in a tuple where there are two; None before the first step."""
    found = tuple(last.get(_SELECTIONS[route]) for route in routes)
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        return None
    return found if len(found) > 1 else found[0]


def token_metrics(routes: tuple[str, ...], last: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`token_kept_ratio` of the token route; of the loss route, `tokens_selected` and `loss_kept_ratio`."""
    found: dict[str, torch.Tensor] = {}
    if "token" in routes:
        positions = last["positions"]
        found["token_kept_ratio"] = torch.full((), positions.shape[-1] / last["length"], device=positions.device)
    if "loss" in routes:
        mask = last["loss_mask"]
        found["tokens_selected"] = mask.sum()
        found["loss_kept_ratio"] = mask.float().mean()
    return found
