"""What the original CGGR's two further model wrappers share: a fixed quota of each batch's sequences trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.kernels.reference import selection
from cggr_compile.original.loss import IGNORED, counted_positions, mean_cross_entropy, next_targets, read_metrics
from cggr_compile.original.model import check_labels, cut_rows, mean_difficulty
from cggr_compile.original.router import checked_module, logits_of


class QuotaModel(nn.Module):
    """Trains on the max(1, floor(B · ratio)) sequences of the largest mean difficulty.

    The mean is over tokens whose next label counts and which `attention_mask` does not mask; ties go to the earlier
    sequence. The loss is the 0-d float32 mean next-token loss over their counted labels, 0 and connected where there is
    none. Batched keyword arguments are cut as in `CGGRModel`. The host reads which sequences they are, once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = checked_module("model", model)
        self._measured: dict[str, Any] = {}

    def train_on(
        self,
        input_ids: Tensor,
        labels: Tensor,
        scored: tuple[Tensor, Tensor, dict[str, Any]],
        kwargs: dict[str, Any],
        step: Tensor,
    ) -> Tensor:
        """The loss, by what a scorer returned for the batch."""
        check_labels(input_ids, labels)
        difficulty, _, info = scored
        with torch.no_grad():
            valid = next_targets(labels) != IGNORED
            counted = valid & counted_positions(input_ids, None, kwargs.get("attention_mask"))
            places = selection.topk_places(mean_difficulty(difficulty, counted), torch.ones_like(valid[:, 0]))
            amount = selection.fraction_of(info["current_ratio"], torch.tensor(len(labels), device=places.device))
            rows = (places < amount.clamp(min=1)).nonzero().squeeze(1)  # the one read
            labels = labels[rows]
        logits = logits_of(self.model(input_ids[rows], **cut_rows(kwargs, rows, len(input_ids))))
        self._measured = {
            "step": step.clone(),
            "token_ratio": info["current_ratio"],
            "tokens_selected": (labels[:, 1:] != IGNORED).sum(),
            "tokens_total": valid.sum(),
        }
        return mean_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def get_metrics(self) -> dict[str, Any]:
        """The last training call's metrics as Python values, read from the device here; empty before the first.

        Keys: step, token_ratio, tokens_selected (counted labels of the sequences that trained), tokens_total (of all),
        and what the class adds.
        """
        return read_metrics(self._measured)
