"""The original CGGR's model wrapper: it trains on the hard sequences of each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.kernels.reference import selection
from cggr_compile.original.loss import (
    IGNORED,
    CGGRScorer,
    check_ids,
    mean_cross_entropy,
    mean_of,
    next_targets,
    read_metrics,
)
from cggr_compile.original.router import checked_module, logits_of

# Indices of the sequence, which would pass for a batch where both are equally long.
_UNBATCHED = ("cache_position",)


class CGGRModel(nn.Module):
    """Trains a causal language model on the hard sequences of each batch.

    `model(input_ids, labels=None, **kwargs)` returns the wrapped model's own output where there are no labels, and
    otherwise the 0-d float32 mean next-token loss over the counted labels of the chosen sequences: those with a token
    that the scorer selects, or, where that is every one and the ratio is below 1, the ceil(B · ratio) of the largest
    mean difficulty. Without any selected token it is the whole batch, and without any counted label the loss is 0,
    connected.

    Keyword arguments go to the router as they are and to the model cut to the chosen sequences: tensors whose first
    dimension is B, also inside dicts, lists and tuples. How many sequences are chosen depends on the data: the host
    reads it once, between the two passes.

    Attributes: `model`, `router` (the model itself where None was given) and `scorer`, which may be replaced by any
    module with the call of `CGGRScorer`. The options are those of `CGGRScorer`. Raises ValueError for a missing model,
    a router that is not a module, input_ids that are not 2-D and labels of another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        router: nn.Module | None = None,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        selection: str = "topk",
        scoring: str = "combined",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
    ) -> None:
        super().__init__()
        self.model = checked_module("model", model)
        self.router = self.model if router is None else checked_module("router", router)
        self.scorer: nn.Module = CGGRScorer(
            self.router,
            min_tokens_ratio,
            warmup_steps,
            dynamic_threshold,
            threshold_sensitivity,
            selection,
            scoring,
            num_strata,
            min_tokens_per_sequence,
        )
        self._measured: dict[str, Any] = {}

    def step(self) -> None:
        """Counts one optimiser step of the scorer's curriculum."""
        self.scorer.step()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The loss of the chosen sequences, or the model's output without labels."""
        if labels is None:
            return self.model(input_ids, **kwargs)
        check_ids(input_ids)
        check_labels(input_ids, labels)
        difficulty, mask, info = self.scorer(input_ids, targets=labels, **kwargs)
        batch = input_ids.shape[0]
        with torch.no_grad():
            counted = next_targets(labels) != IGNORED
            mask = mask.view(input_ids.shape) > 0.5
            chosen, quota = _choose(difficulty.view(input_ids.shape).float(), mask, counted, info["current_ratio"])
            rows = chosen.nonzero().squeeze(1)  # the one read
            labels = labels[rows]
        logits = logits_of(self.model(input_ids[rows], **cut_rows(kwargs, rows, batch)))
        self._measured = {
            "step": torch.as_tensor(self.scorer.step_count).clone(),
            "token_ratio": info["current_ratio"],
            "tokens_selected": (labels[:, 1:] != IGNORED).sum(),
            "tokens_total": counted.sum(),
            "router_tokens_selected": mask.sum(),
            "sequences_selected": rows.shape[0],
            "avg_confidence": mean_of(info["confidence"], counted),
            "avg_entropy": mean_of(info["entropy"], counted),
            "sequence_selection_mode": quota,
            "selection": info["selection"],
            "scoring": info["scoring"],
        }
        return mean_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def get_metrics(self) -> dict[str, Any]:
        """The last training call's metrics as Python values, read from the device here; empty before the first.

        Keys: step, token_ratio, tokens_selected (counted labels of the chosen sequences), tokens_total,
        router_tokens_selected, sequences_selected, avg_confidence, avg_entropy, sequence_selection_mode
        ("mask_any" or "quota_fallback"), selection, scoring.
        """
        metrics = read_metrics(self._measured)
        if metrics:
            metrics["sequence_selection_mode"] = "quota_fallback" if metrics["sequence_selection_mode"] else "mask_any"
        return metrics


def _choose(difficulty: Tensor, mask: Tensor, counted: Tensor, ratio: float | Tensor) -> tuple[Tensor, Tensor]:
    """bool [B], the sequences that train, and 0-d bool, whether the quota chose them."""
    any_selected = mask.any(1)
    ratio = torch.as_tensor(ratio, dtype=torch.float32)
    quota = any_selected.all() & (ratio < 1)
    # ceil(B · ratio), where float32 may have rounded the ratio up.
    amount = (len(mask) * (ratio - 1e-6)).ceil().clamp(min=1)
    hardest = selection.topk_places(mean_difficulty(difficulty, counted), any_selected) < amount
    return torch.where(quota, hardest, any_selected | ~any_selected.any()), quota


def check_labels(input_ids: Tensor, labels: Tensor) -> None:
    """ValueError for labels of another shape than input_ids."""
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must match input_ids: shapes {tuple(labels.shape)} and {tuple(input_ids.shape)}")


def mean_difficulty(difficulty: Tensor, counted: Tensor) -> Tensor:
    """[B]: each sequence's mean over the counted tokens [B, S], NaN where it has none."""
    known = counted & ~difficulty.isnan()
    return torch.where(known, difficulty, 0.0).sum(1) / known.sum(1)


def cut_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """`value` with every tensor of first dimension `batch` in it reduced to the rows."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: part if key in _UNBATCHED else cut_rows(part, rows, batch) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cut_rows(part, rows, batch) for part in value)
    return value
