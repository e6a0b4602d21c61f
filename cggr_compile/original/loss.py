"""The surface of the original CGGR library, for code that was written against it: change the import and run it.

Thin layers over the operators' reference and the selection rules. docs/original-cggr.md says, name by name, what is
the same and what changed. Sizes that only the device knows stay there: k is a tensor, a selection a mask, a metric a
tensor until `get_metrics` reads it. The two places that need a size on the host say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr_compile.kernels.reference import rows as reference
from cggr_compile.kernels.reference import selection
from cggr_compile.original.router import checked_module, logits_of

IGNORED = -100
SCORINGS = ("entropy", "margin", "loss", "combined")
SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")


def sequence_aware_places(scores: Tensor, valid: Tensor, least: int) -> Tensor:
    """int64 [B, S]: each token's place in the whole batch: first the `least` hardest of each sequence, then the rest,
    both by score, then those of score NaN; invalid ones come last."""
    first = (selection.topk_places(scores, valid) < least) & selection.known_rows(scores, valid)
    place = selection.topk_places(scores.flatten(), valid.flatten()).view_as(scores)
    # Places are distinct, so these keys are, and no sort has a tie to break.
    key = torch.where(first, place, place + place.numel())
    return key.flatten().argsort().argsort().view_as(scores)


class _Selector(nn.Module):
    """Options, curriculum and selection that the loss and the scorer share."""

    def __init__(
        self,
        scoring: str,
        selection: str,
        dynamic_threshold: bool,
        threshold_sensitivity: float,
        min_tokens_ratio: float,
        warmup_steps: int,
        num_strata: int,
        min_tokens_per_sequence: int,
    ) -> None:
        super().__init__()
        for name, value, known in (("scoring", scoring, SCORINGS), ("selection", selection, SELECTIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name, number, allowed, expected in (
            ("min_tokens_ratio", min_tokens_ratio, 0 < min_tokens_ratio <= 1, "in (0, 1]"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("threshold_sensitivity", threshold_sensitivity, 0 <= threshold_sensitivity <= 1, "in [0, 1]"),
            ("num_strata", num_strata, num_strata >= 1, "at least 1"),
            ("min_tokens_per_sequence", min_tokens_per_sequence, min_tokens_per_sequence >= 1, "at least 1"),
        ):
            if not allowed:
                raise ValueError(f"{name} is {number}, expected {expected}")
        self.scoring = scoring
        self.selection = selection
        self.dynamic_threshold = dynamic_threshold
        self.threshold_sensitivity = threshold_sensitivity
        self.min_tokens_ratio = min_tokens_ratio
        self.warmup_steps = warmup_steps
        self.num_strata = num_strata
        self.min_tokens_per_sequence = min_tokens_per_sequence
        self.register_buffer("step_count", torch.tensor(0, dtype=torch.long))

    def step(self) -> None:
        """Counts one optimiser step of the curriculum; call it after `optimizer.step()`."""
        self.step_count += 1

    def _score(self, logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [R] difficulty, confidence and entropy of logits [R, V]; targets [R] are class indices."""
        parts = reference.SCORINGS[self.scoring]
        if targets is None:
            targets = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
            parts = tuple(name for name in parts if name != "nll") or ("entropy",)
        names = tuple(dict.fromkeys(("confidence", "entropy", *parts)))

        def rows_of(some_logits: Tensor, some_targets: Tensor) -> reference.ShiftedRows:
            return reference.ShiftedRows(some_logits.float(), some_targets)

        # No class index is -1: every row is scored.
        values = reference.statistics(rows_of, logits.detach(), targets, names, logits.shape[-1], -1)
        by_name = dict(zip(names, values, strict=True))
        difficulty = sum((by_name[name] for name in parts[1:]), by_name[parts[0]])
        return difficulty, by_name["confidence"], by_name["entropy"]

    def _current_ratio(self, confidence: Tensor, valid: Tensor) -> Tensor:
        """0-d: the curriculum's ratio, raised where the mean confidence of the valid rows is low."""
        # Metal has no float64.
        exact = torch.float32 if confidence.device.type == "mps" else torch.float64
        step = self.step_count.to(exact)
        progress = (step / self.warmup_steps).clamp(max=1.0) if self.warmup_steps else torch.ones_like(step)
        # lerp is exact at both ends.
        ratio = torch.lerp(torch.ones_like(step), torch.full_like(step, self.min_tokens_ratio), progress)
        if self.dynamic_threshold and self.selection != "fixed_quota":
            mean = mean_of(confidence.to(exact), valid & ~confidence.isnan())
            ratio = (ratio * (1 + (1 - mean) * self.threshold_sensitivity)).clamp(max=1.0)
        return ratio

    def _select(self, difficulty: Tensor, valid: Tensor, ratio: Tensor) -> Tensor:
        """bool [B, S]: max(1, floor(ratio · valid)) of the valid tokens, by the selection's order of preference."""
        k = selection.fraction_of(ratio, valid.sum()).clamp(min=1)
        if self.selection == "sequence_aware":
            places = sequence_aware_places(difficulty, valid, self.min_tokens_per_sequence)
            k = k.maximum(valid.sum(1).clamp(max=self.min_tokens_per_sequence).sum())
            return valid & (places < k)
        flat = difficulty.flatten(), valid.flatten()
        if self.selection == "stratified":
            places = selection.stratified_places(*flat, flat[0], self.num_strata)
        else:
            places = selection.topk_places(*flat)
        return valid & (places < k).view_as(valid)


class CGGRLoss(_Selector):
    """Cross-entropy over the hard tokens of a batch.

    `criterion(logits, targets)` takes logits [B, S, V] and targets [B, S], or [N, V] and [N], in any floating dtype:
    each logit row predicts the target beside it, nothing is shifted. It returns the 0-d float32 mean loss of the
    selected tokens. Targets of -100 are never selected nor counted; without a counted target the loss is 0, connected
    to the logits.

    Args:
        scoring: what makes a token hard: `"entropy"`, `"margin"` (1 - (p1 - p2)), `"loss"` (negative log-likelihood)
            or `"combined"` (their sum), in float32.
        selection: `"topk"`, `"stratified"` (the hardest of each stratum, more of the harder ones),
            `"sequence_aware"` (top-k with a minimum for each sequence) or `"fixed_quota"` (top-k of a ratio that
            the dynamic threshold leaves alone).
        dynamic_threshold, threshold_sensitivity: multiply the ratio by 1 + (1 - mean confidence) · sensitivity,
            at most to 1; sensitivity in [0, 1].
        min_tokens_ratio: fraction of the counted tokens that is kept after the warm-up, in (0, 1];
            max(1, floor(ratio · counted)) tokens are.
        warmup_steps: optimiser steps over which the ratio falls linearly from 1.
        num_strata: strata of `"stratified"`.
        min_tokens_per_sequence: minimum of `"sequence_aware"`; where the ratio allows fewer, the minimum wins.
        base_loss: module of (logits [n, V], targets [n]) used instead of cross-entropy, on the selected tokens
            only, whose number the host then has to read; the loss is the mean of what it returns.

    Raises ValueError for options out of range, and for logits or targets of another shape.
    """

    def __init__(
        self,
        scoring: str = "combined",
        selection: str = "topk",
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        base_loss: nn.Module | None = None,
    ) -> None:
        super().__init__(
            scoring,
            selection,
            dynamic_threshold,
            threshold_sensitivity,
            min_tokens_ratio,
            warmup_steps,
            num_strata,
            min_tokens_per_sequence,
        )
        self.base_loss = base_loss
        self._measured: dict[str, Any] = {}

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the selected tokens."""
        if logits.dim() not in (2, 3):
            raise ValueError(f"Unsupported logits shape {tuple(logits.shape)}, expected [B, S, V] or [N, V]")
        if logits.shape[:-1] != targets.shape:
            raise ValueError(f"logits shape {tuple(logits.shape)} does not match targets shape {tuple(targets.shape)}")
        # [N] tokens are one sequence.
        shape = targets.shape if targets.dim() == 2 else (1, *targets.shape)
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        with torch.no_grad():
            valid = targets != IGNORED
            difficulty, confidence, entropy = self._score(logits, targets.masked_fill(~valid, 0))
            ratio = self._current_ratio(confidence, valid)
            mask = self._select(difficulty.view(shape), valid.view(shape), ratio).flatten()
        self._measured = {
            "step": self.step_count.clone(),
            "token_ratio": ratio,
            "tokens_selected": mask.sum(),
            "tokens_total": valid.sum(),
            "avg_confidence": mean_of(confidence, valid),
            "avg_entropy": mean_of(entropy, valid),
            "avg_difficulty": mean_of(difficulty, valid),
            "selection": self.selection,
            "scoring": self.scoring,
        }
        if self.base_loss is None:
            return mean_cross_entropy(logits, targets.masked_fill(~mask, IGNORED))
        rows = mask.nonzero().squeeze(1)
        if rows.numel() == 0:
            return logits[:0].float().sum()
        return self.base_loss(logits[rows], targets[rows]).mean()

    def get_metrics(self) -> dict[str, Any]:
        """The last call's metrics as Python numbers, read from the device here; empty before the first call.

        Keys: step, token_ratio, tokens_selected, tokens_total, avg_confidence, avg_entropy, avg_difficulty,
        selection, scoring. Totals and averages are over the counted tokens.
        """
        return read_metrics(self._measured)


class CGGRScorer(_Selector):
    """Scores the tokens of a batch with a router and marks the hard ones; all shapes are static.

    `scorer(input_ids, targets=None, **kwargs)` calls `router(input_ids, **kwargs)`, which returns logits [B, S, V],
    an object with `.logits`, or a tuple that starts with them. It returns `(difficulty, mask, info)`: float32 [B, S],
    bool [B, S] (True is hard), and a dict of `confidence` and `entropy` (float32 [B, S]), `current_ratio`,
    `tokens_selected` and `tokens_total` (0-d tensors), `selection` and `scoring`. Nothing is read back to the host.

    With `targets` [B, S] (the labels, unshifted), logits at t are scored against targets at t + 1; the last position
    and those whose next target is -100 have difficulty 0 and are neither selected nor counted. Without targets,
    `"combined"` is entropy + margin, `"loss"` is entropy, and positions that a 2-D `attention_mask` masks are left
    out instead.

    The router runs without gradient, in evaluation mode and outside autocast's weight cache, through which it would
    take the main pass's gradients away. The options are those of `CGGRLoss`. Raises ValueError for options out of
    range, a router that is not a module, input_ids that are not 2-D, and targets or logits of another shape.
    """

    def __init__(
        self,
        router: nn.Module,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        selection: str = "topk",
        scoring: str = "combined",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
    ) -> None:
        super().__init__(
            scoring,
            selection,
            dynamic_threshold,
            threshold_sensitivity,
            min_tokens_ratio,
            warmup_steps,
            num_strata,
            min_tokens_per_sequence,
        )
        self.router = checked_module("router", router)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Difficulty, mask and info of a batch; see the class."""
        check_ids(input_ids)
        if targets is not None and targets.shape != input_ids.shape:
            raise ValueError(
                f"targets must match input_ids: shapes {tuple(targets.shape)} and {tuple(input_ids.shape)}"
            )
        with _scoring(self.router):
            logits = logits_of(self.router(input_ids, **kwargs))
            if logits.dim() != 3 or logits.shape[:2] != input_ids.shape:
                raise ValueError(
                    f"the router returned logits of shape {tuple(logits.shape)}, expected [B, S, V] for input_ids of "
                    f"shape {tuple(input_ids.shape)}"
                )
            next_target = None if targets is None else next_targets(targets)
            valid = counted_positions(input_ids, next_target, kwargs.get("attention_mask"))
            flat_target = None if next_target is None else next_target.masked_fill(~valid, 0).flatten()
            scored = self._score(logits.reshape(-1, logits.shape[-1]), flat_target)
            difficulty, confidence, entropy = (values.view(input_ids.shape) for values in scored)
            ratio = self._current_ratio(confidence, valid)
            mask = self._select(difficulty, valid, ratio)
            info = {
                "confidence": confidence,
                "entropy": entropy,
                "current_ratio": ratio,
                "tokens_selected": mask.sum(),
                "tokens_total": valid.sum(),
                "selection": self.selection,
                "scoring": self.scoring,
            }
            return difficulty.masked_fill(~valid, 0.0), mask, info


def check_ids(input_ids: Tensor) -> None:
    """ValueError for input_ids that are not [B, S]."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected [B, S]")


def next_targets(targets: Tensor) -> Tensor:
    """Targets [B, S] seen from the position before them; the last position has none."""
    return F.pad(targets[:, 1:], (0, 1), value=IGNORED)


def counted_positions(input_ids: Tensor, next_target: Tensor | None, attention_mask: Any) -> Tensor:
    """bool [B, S]: the positions with a counted target, or without targets those that a 2-D mask leaves."""
    if next_target is not None:
        return next_target != IGNORED
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        return attention_mask != 0
    return torch.ones_like(input_ids, dtype=torch.bool)


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """0-d: the mean of the counted values, 0 where there are none."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """0-d float32: the mean over the targets that count, 0 and connected where none does."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


@contextlib.contextmanager
def _scoring(router: nn.Module) -> Iterator[None]:
    """No gradient, evaluation mode, and no entry in autocast's weight cache, all put back at the end."""
    modes = [(module, module.training) for module in router.modules()]
    cached = torch.is_autocast_cache_enabled()
    try:
        for module, _ in modes:
            module.training = False
        torch.set_autocast_cache_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, training in modes:
            module.training = training


def read_metrics(measured: dict[str, Any]) -> dict[str, Any]:
    """Metrics as Python values; this waits for the device."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in measured.items()}
