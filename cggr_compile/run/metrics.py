"""The figures of a routed step: what each means (`METRICS`), and how they come from what the step left behind.

Every figure is a 0-d tensor on the model's device, computed when it is asked for and read back by nobody here; none is
NaN where scores and weights are finite.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cggr_compile.ir.program import StepOutputs
from cggr_compile.torch_internals.distributed import Ranks

METRICS: dict[str, str] = {
    "rows_total": "rows of the batch; of all ranks where these selected together, as in every figure of rows, scores "
    "and counted tokens",
    "steps_selected_locally": "steps in which the ranks' batches differed, so that each rank selected among its own "
    "rows; selection_scope='global' on several ranks only",
    "rows_selected": "rows that trained, without those that only fill up",
    "kept_ratio": "rows_selected / rows_total",
    "ratio_target": "the fraction that k was computed from: ratio, or where warm-up and dynamic threshold have it",
    "effective_sample_size": "(Σw)² / Σw² of the selected rows' weights; rows_selected where all weigh the same",
    "weight_max": "the largest weight of a selected row",
    "parameters_without_gradient": "trainable parameters that the last backward left without a gradient; absent "
    "before the first, and while all gradients are cleared unless step() saw them",
    "tokens_total": "counted tokens of the batch; absent, as what follows, where every row is kept unrouted, unless by "
    "selection='auto', whose scores are then the rows' own losses",
    "tokens_selected": "counted tokens of the rows or documents that trained; with the loss route, tokens in the loss",
    "selection_rate_short": "share that was selected of the rows with fewer counted tokens than the median row; rows "
    "without any are left out; 0 where there is none",
    "selection_rate_long": "the same of the rows with at least as many as the median row",
    "score_mean": "mean score of the rows with counted tokens; 0 where there is none; needs a selection by scores, as "
    "what follows",
    "score_selected_mean": "mean score of the rows that trained",
    "score_cv": "standard deviation over mean of the scores of the rows with counted tokens; 0 where the mean is",
    "rows_nan_score": "rows with counted tokens whose score is NaN: they train only where others are fewer than k",
    "router_seconds": "median time of the router by itself on one batch; absent before `Handle.time_router()`",
    "mean_confidence": "mean over the counted tokens of the router's largest probability, with dynamic_threshold only",
    "auto_selects": "1 while selection='auto' selects rows (but for the probes among these steps, see rows_selected), "
    "0 while every row trains",
    "auto_progress": "what that goes by: the fall of hard rows' losses over that of the median; absent before it can "
    "be told",
    "token_kept_ratio": "share of each sequence's tokens that the middle layers, or their experts, ran on, or that are "
    "of kept documents; token and segment route only",
    "documents_total": "documents with counted tokens; segment route only, as what follows, where it selects",
    "documents_selected": "documents that trained",
    "documents_too_long": "documents of more than k tokens, which never train at this ratio",
    "entropy": "mean entropy, in nats, of the model's predictions of the tokens in the loss, whatever their weights; "
    "prediction_metrics only, as what follows",
    "mean_token_accuracy": "share of these tokens that no other is predicted to be likelier than",
    "loss_kept_ratio": "tokens in the loss over all positions of the batch; loss route only",
}
"""Every metric by name."""


@dataclass(frozen=True)
class LastStep:
    """What the last step left: `kept` of `total` rows of `length` tokens, the `fraction` that k was computed from, and
    what the graph put out; where the `ranks` selected together, `total` rows of all of them, of which each kept `kept`.
    """

    total: int
    length: int
    kept: int
    fraction: float
    found: StepOutputs
    ranks: Ranks | None = None


def metrics_of(last: LastStep, without_gradient: int | None, router_seconds: float | None = None) -> dict[str, Tensor]:
    """The metrics of a step, of those in `METRICS` that it has.

    Args:
        last: what the step left (`Runtime.last`).
        without_gradient: number of trainable parameters without a gradient, None where it is not known.
        router_seconds: time of the router by itself, None where it was not measured.
    """
    left = last.found
    rows, scores, counts = left.rows, left.scores, left.counts
    weights = left.weights
    if weights is None:
        weights = torch.ones_like(rows, dtype=torch.float32)
    trained = weights > 0

    def number(value: float) -> Tensor:
        # Filled by the device: torch.tensor would copy from the host and wait.
        return torch.full((), value, device=rows.device)

    found = {
        "rows_total": number(last.total),
        "rows_selected": trained.sum(),
        "kept_ratio": trained.sum() / last.total,
        "ratio_target": number(last.fraction),
        "effective_sample_size": _over(weights.sum() ** 2, (weights**2).sum()),
        "weight_max": weights.max(),
    }
    if without_gradient is not None:
        found["parameters_without_gradient"] = number(without_gradient)
    if router_seconds is not None:
        found["router_seconds"] = number(router_seconds)
    if counts is not None:
        found["tokens_total"] = counts.sum()
    if counts is not None and left.documents_kept is None:
        selected = torch.zeros_like(counts).index_add(0, rows, trained.long()) > 0
        found["tokens_selected"] = (counts * selected).sum()
        counted = counts > 0
        median = counts.float().where(counted, torch.nan).nanquantile(0.5)
        found["selection_rate_short"] = _mean(selected, counted & (counts < median))
        found["selection_rate_long"] = _mean(selected, counted & (counts >= median))
        if scores is not None:
            known = counted & ~scores.isnan()
            found["rows_nan_score"] = (counted & scores.isnan()).sum()
            found["score_mean"] = _mean(scores, known)
            found["score_selected_mean"] = _mean(scores, known & selected)
            spread = _mean((scores - found["score_mean"]) ** 2, known).sqrt()
            found["score_cv"] = _over(spread, found["score_mean"].abs())
    if left.confidence is not None:
        found["mean_confidence"] = left.confidence
    if left.figures is not None:
        tokens, entropy, hits = left.figures
        found["entropy"], found["mean_token_accuracy"] = _over(entropy, tokens), _over(hits, tokens)
    return found


def token_metrics(routes: tuple[str, ...], last: LastStep) -> dict[str, Tensor]:
    """`token_kept_ratio` of the token and segment route, the latter's documents, `tokens_selected` of it and of the
    loss route, and this one's `loss_kept_ratio`."""
    found: dict[str, Tensor] = {}
    if "token" in routes:
        positions = last.found.positions
        found["token_kept_ratio"] = torch.full((), positions.shape[-1] / last.length, device=positions.device)
    if "segment" in routes:
        positions = last.found.positions
        found["token_kept_ratio"] = (positions >= 0).sum() / (len(positions) * last.length)
        if last.found.documents_kept is not None:
            names = ("documents_total", "documents_selected", "documents_too_long", "tokens_selected")
            found |= zip(names, last.found.documents_kept.sum(0), strict=True)
    if "loss" in routes:
        mask = last.found.loss_mask
        found["tokens_selected"] = mask.sum()
        found["loss_kept_ratio"] = mask.float().mean()
    return found


_SELECTIONS = {"sequence": "rows", "segment": "positions", "token": "positions", "loss": "loss_mask"}


def selected(routes: tuple[str, ...], last: LastStep | None) -> Tensor | tuple[Tensor, ...] | None:
    """The selection of each route, in a tuple where there are two, all rows where there is none; None before the first
    step."""
    if last is None:
        return None
    if not routes:
        return last.found.rows
    if last.ranks is not None:
        return last.found.rows.view(last.kept, -1)[:, last.ranks.rank]
    found = tuple(getattr(last.found, _SELECTIONS[route]) for route in routes)
    return found if len(found) > 1 else found[0]


def _over(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / torch.where(whole == 0, 1.0, whole))


def _mean(values: Tensor, of: Tensor) -> Tensor:
    return values.float().where(of, 0.0).sum() / of.sum().clamp(min=1)


class Gradients:
    """How many trainable parameters the last backward left without a gradient.

    Gradients are gone soon after the optimiser's step, so `count` counts them there; of parameters listed once for each
    capture and each reading, because finding them takes a walk over the modules, and weakly, because they may be
    replaced.
    """

    def __init__(self) -> None:
        self._parameters: list[weakref.ref[nn.Parameter]] = []
        self._captures = -1
        self._seen: int | None = None

    def count(self, model: nn.Module, captures: int) -> None:
        """Counts them where a parameter has a gradient; where none has (none yet, or cleared) the number stays."""
        parameters = [parameter for each in self._parameters if (parameter := each()) is not None]
        if captures != self._captures or len(parameters) < len(self._parameters):
            parameters, self._captures = list(model.parameters()), captures
            self._parameters = list(map(weakref.ref, parameters))
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        without = sum(parameter.grad is None for parameter in trainable)
        if without < len(trainable):
            self._seen = without

    def read(self, model: nn.Module, captures: int) -> int | None:
        """The number, of the parameters that there are now if their gradients are; None before the first."""
        self._captures = -1
        self.count(model, captures)
        return self._seen
