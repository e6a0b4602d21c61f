"""Plain-torch semantics of the `cggr` operators: what every provider has to compute.

The functions are traceable, read nothing back to the host and branch on shapes only where these are concrete
integers, so the same code runs eagerly, under symbolic shapes and on the CPU, CUDA and meta devices. `masked_loss`
and `gather` are differentiable by autograd; `score` detaches its inputs.

The statistics of `score` are taken of logits shifted by their row maximum m, which changes none of them
(softmax(x) = softmax(x - m), lse(x) = m + lse(x - m)) and keeps both terms of each difference small: with
Z = Σ exp(x - m), the confidence is 1 / Z and the log-sum-exp that meets shifted logits is log Z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time while scoring: 64 MiB in fp32 suits a CPU's cache, 1 GiB fills a GPU.
LOGITS_PER_CHUNK = 2**24
LOGITS_PER_CHUNK_ON_GPU = 2**28
REDUCTIONS = ("mean", "sum", "num_items")


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Head logits [..., V] of `hidden` [..., D], `weight` [V, D] and `bias` [V], in the dtype of the linear.

    The order is `* scale`, `/ divisor`, soft-cap; the soft-cap is `x / softcap`, tanh, `* softcap` as in
    transformers' Gemma 2, rounding after each step. Steps that change nothing (1, 1, 0) are left out.
    """
    return scaled(F.linear(hidden, weight, bias), scale, divisor, softcap)


def scaled(x: Tensor, scale: float, divisor: float, softcap: float) -> Tensor:
    """What a head does to its linear's result `x`, in the order and with the rounding of `logits`."""
    if scale != 1:
        x = x * scale
    if divisor != 1:
        x = x / divisor
    if softcap > 0:
        x = x / softcap
        x = torch.tanh(x)
        x = x * softcap
    return x


class ShiftedRows:
    """The softmax statistics of fp32 logits `x` [R, C]: shifted logits, their exponentials, and Z = Σ exp.

    Class c counts `class_weight[c]` times where that is given: its exponential in Z, and so its probability, is
    multiplied by it.
    """

    def __init__(self, x: Tensor, target: Tensor, class_weight: Tensor | None = None) -> None:
        self.shifted = x - x.amax(-1, keepdim=True)
        self.exponentials = self.shifted.exp()
        if class_weight is not None:
            self.exponentials = self.exponentials * class_weight
        self.total = self.exponentials.sum(-1)
        self.target = target


def _nll(rows: ShiftedRows) -> Tensor:
    return rows.total.log() - rows.shifted.gather(-1, rows.target.unsqueeze(-1)).squeeze(-1)


def _entropy(rows: ShiftedRows) -> Tensor:
    # p·x tends to 0 as x tends to -inf, where floating point would say 0 · -inf = NaN.
    finite = rows.shifted.masked_fill(rows.shifted == -math.inf, 0.0)
    return rows.total.log() - (rows.exponentials * finite).sum(-1) / rows.total


def _margin(rows: ShiftedRows) -> Tensor:
    if rows.exponentials.shape[-1] == 1:
        return 1.0 - _confidence(rows)
    # The largest exponential is exp(0) = 1, so p1 - p2 = (1 - e2) / Z: exactly 0 on a tie.
    runner_up = rows.exponentials.topk(2, dim=-1).values[..., 1]
    return 1.0 - (1.0 - runner_up) / rows.total


def _confidence(rows: ShiftedRows) -> Tensor:
    return rows.total.reciprocal()


QUANTITIES: dict[str, Callable[[ShiftedRows], Tensor]] = {
    "nll": _nll,
    "entropy": _entropy,
    "margin": _margin,
    "confidence": _confidence,
}

SCORINGS = {
    "loss": ("nll",),
    "entropy": ("entropy",),
    "margin": ("margin",),
    "combined": ("nll", "entropy", "margin"),
}
"""What each scoring adds up."""


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    quantities: Sequence[str],
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-row statistics of the head's prediction, float32 [len(quantities), N], without a gradient.

    `hidden` [N, D], `weight` [V, D] and `bias` [V] are of one floating dtype; `target` [N] holds class indices
    of any integer dtype. With p = softmax(logits) and p1 >= p2 its two largest entries, the quantities are
    `"nll"` = lse - x[target], `"entropy"` = lse - Σ p·x, `"margin"` = 1 - (p1 - p2) and `"confidence"` = p1.

    Rows whose target is `ignore_index` hold 0 in every quantity. A logit of -inf has probability 0; rows with a
    NaN or +inf logit, or with -inf only, are NaN (as in `F.cross_entropy`). Raises ValueError for an unknown
    quantity; torch reports targets outside [0, V).
    """
    # Detached inputs rather than no_grad: a trace then holds no grad-mode nodes, which have no data edges.
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()

    def rows_of(hidden: Tensor, target: Tensor) -> ShiftedRows:
        return ShiftedRows(logits(hidden, weight, bias, scale, divisor, softcap).float(), target)

    return statistics(rows_of, hidden, target, quantities, weight.shape[0], ignore_index)


def statistics(
    rows_of: Callable[[Tensor, Tensor], ShiftedRows],
    hidden: Tensor,
    target: Tensor,
    quantities: Sequence[str],
    classes: int,
    ignore_index: int,
) -> Tensor:
    """The quantities [len(quantities), N] of the rows that `rows_of` makes of (hidden [R, D], targets in bounds [R]).

    It is called on chunks of rows that bound the logits of `classes` classes; rows whose target is `ignore_index` hold
    0. Raises ValueError for an unknown quantity.
    """
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown or not quantities:
        raise ValueError(f"quantities: got {list(quantities)}, expected a non-empty list of {list(QUANTITIES)}")

    def of_rows(hidden: Tensor, target: Tensor) -> Tensor:
        ignored = target == ignore_index
        rows = rows_of(hidden, target.long().masked_fill(ignored, 0))
        values = torch.stack([QUANTITIES[name](rows) for name in quantities])
        return values.masked_fill(ignored, 0.0)

    chunk = _rows_per_chunk(hidden.shape[0], classes, hidden.device)
    if chunk is None:
        return of_rows(hidden, target)
    pairs = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([of_rows(some_hidden, some_target) for some_hidden, some_target in pairs], dim=1)


def _rows_per_chunk(rows: int | torch.SymInt, vocabulary: int | torch.SymInt, device: torch.device) -> int | None:
    """Rows that bound a chunk's logits, or None where one chunk does or the loop would specialise a symbol."""
    # Dynamo shows a symbolic size as an int; everywhere else it is a SymInt, which is none.
    if torch.compiler.is_dynamo_compiling() or not (isinstance(rows, int) and isinstance(vocabulary, int)):
        return None
    most = LOGITS_PER_CHUNK_ON_GPU if device.type == "cuda" else LOGITS_PER_CHUNK
    return max(1, most // vocabulary) if rows * vocabulary > most else None


def _rank_topk(scores: Tensor, valid: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    return scores, valid


def _rank_random(scores: Tensor, valid: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    if noise is None:
        raise ValueError("noise: the rule 'random' ranks by noise, which is None")
    return noise, valid & ~noise.isnan()


RANKINGS: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]] = {
    "topk": _rank_topk,
    "random": _rank_random,
}
"""The rules of `select`: each maps (scores, valid, noise) to the key [..., N] that rows are ranked by, largest first,
and to those that are selectable."""


def select(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k highest ranked valid rows of the last dimension: index int64 [..., k] and weight float32 [..., k].

    `scores` and `noise` are float32 [..., N], `valid` is bool [..., N]. Invalid rows are never selected, nor by
    "random" those whose noise is NaN. +inf ranks highest, a score of NaN lowest, behind -inf: it is no reason to select
    a row, and where nothing else is left, as in a diverged model, the loss must show it. Ties go to the lower index.
    The result is sorted by index. Each selected row appears once with weight 1; where fewer than k rows are selectable,
    the missing places repeat the highest ranked one with weight 0, or row 0 where none is. Raises ValueError for an
    unknown rule and for a rule whose noise is missing.
    """
    if rule not in RANKINGS:
        raise ValueError(f"rule: got {rule!r}, expected one of {list(RANKINGS)}")
    key, selectable = RANKINGS[rule](scores, valid, noise)
    # Two stable sorts order by (tier, key, index): a row with key -inf still precedes one of NaN, and that an
    # unselectable one.
    tier = torch.where(selectable, key.isnan().to(torch.uint8), 2)
    by_key = key.masked_fill(tier > 0, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    by_tier = tier.gather(-1, by_key).sort(dim=-1, stable=True).indices
    ranked = by_key.gather(-1, by_tier)
    # With no rows at all there is no highest ranked one; the padding keeps place 0 addressable.
    ranked = F.pad(ranked, (0, 1))

    place = torch.arange(k, device=scores.device)
    filled = place < selectable.sum(-1, keepdim=True)
    index = ranked.gather(-1, torch.where(filled, place, 0))
    # The stable sort keeps a row's own place, of weight 1, before its repetitions.
    index, order = index.sort(dim=-1, stable=True)
    return index, filled.gather(-1, order).float()


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Slices `index` [k] of `x` along `dim`, repeats included; torch reports an index out of range."""
    return x.index_select(dim, index)


def _cross_entropy(x: Tensor, target: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """torch's own, whatever a library has put into `torch.nn.functional` for models to call."""
    code = {"none": 0, "mean": 1, "sum": 2}[reduction]
    return torch.ops.aten.cross_entropy_loss.default(x, target, None, code, ignore_index, 0.0)


class LossArguments(NamedTuple):
    """The arguments of `masked_loss`, in their order: those of the operator and of all that computes it.

    Attributes:
        hidden, weight, bias: [N, D], [V, D] and [V], of one floating dtype.
        target: [N], of any integer dtype.
        row_weight: [M], of any floating dtype, weighs the selected rows.
        scale, divisor, softcap: see `logits`.
        ignore_index: the target of rows that do not count.
        reduction: one of REDUCTIONS.
        rows: [M] (int32 or int64, repeats included) selects the rows that are read at all, None is every row (M = N).
        num_items: 0-d, for the reduction of that name.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_weight: Tensor | None = None
    scale: float = 1.0
    divisor: float = 1.0
    softcap: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    rows: Tensor | None = None
    num_items: Tensor | None = None

    @property
    def factor(self) -> float:
        """What the head's outputs are multiplied by."""
        return self.scale / self.divisor


DIFFERENTIABLE = ("hidden", "weight", "bias", "row_weight")
"""What `masked_loss` has gradients for."""


def masked_loss(*args: Any, **options: Any) -> Tensor:
    """Cross-entropy of the rows whose target is not `ignore_index`: a 0-d float32 tensor of `LossArguments`.

    With w = 1 where `row_weight` is None and l = lse - x[target], `"sum"` gives Σ w·l over the counted rows,
    `"num_items"` divides it by `num_items`, and `"mean"` by the number of counted rows or, with `row_weight`, by Σ w
    over them; it is 0 where that is 0. Where every row is ignored the loss is 0 and stays connected to every input.
    Raises ValueError for an unknown reduction; torch reports targets outside [0, V).

    Without `row_weight` the mean equals `F.cross_entropy(..., reduction="mean")` to the bit on the CPU in float32:
    torch divides the same sum by the same count, forward and backward.
    """
    given = LossArguments(*args, **options)
    x, target = _logits_of(given)
    return _reduced(x, target, given)


def measured_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`masked_loss`, and what it is made of, from the same logits and without gradient; `args` are `LossArguments` and
    whether figures are wanted.

    The second result is each row's l float32 [M], 0 where it is ignored, whatever its weight. The third are figures of
    the predictions float32 [3], or [0] where they are not wanted: sums over the counted rows, whatever their weights,
    of 1, of the entropy lse - Σ p·x in nats, and of whether no class has a larger logit than the target. A row with a
    NaN logit makes the entropy NaN.
    """
    *loss, figures = args
    given = LossArguments(*loss)
    x, target = _logits_of(given)
    of_each = _cross_entropy(x.detach(), target, "none", given.ignore_index)
    return _reduced(x, target, given), of_each, _figures(x.detach(), target, given) if figures else x.new_empty(0)


def _figures(x: Tensor, target: Tensor, given: LossArguments) -> Tensor:
    counted = target != given.ignore_index
    of_rows = ShiftedRows(x, target.masked_fill(~counted, 0))
    hit = of_rows.shifted.gather(-1, of_rows.target.unsqueeze(-1)).squeeze(-1) == 0
    figures = torch.stack([torch.ones_like(of_rows.total), _entropy(of_rows), hit.float()])
    return figures.masked_fill(~counted, 0.0).sum(-1)


def _logits_of(given: LossArguments) -> tuple[Tensor, Tensor]:
    """fp32 logits [M, V] and targets int64 [M] of the selected rows."""
    hidden, target = given.hidden, given.target
    if given.rows is not None:
        hidden, target = hidden.index_select(0, given.rows), target.index_select(0, given.rows)
    return logits(hidden, given.weight, given.bias, given.scale, given.divisor, given.softcap).float(), target.long()


def _reduced(x: Tensor, target: Tensor, given: LossArguments) -> Tensor:
    """`masked_loss` of fp32 logits."""
    row_weight, reduction = given.row_weight, given.reduction
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {list(REDUCTIONS)}")
    counted = target != given.ignore_index
    if row_weight is None:
        total = _cross_entropy(x, target, "sum", given.ignore_index)
        amount = counted.sum()
    else:
        nll = _cross_entropy(x, target, "none", given.ignore_index)
        counted_weight = torch.where(counted, row_weight.float(), 0.0)
        total = (counted_weight * nll).sum()
        amount = counted_weight.sum()
    if reduction == "sum":
        return total
    if reduction == "num_items":
        if given.num_items is None:
            raise ValueError("num_items: the reduction 'num_items' divides by it, and it is None")
        return (total / given.num_items).to(total.dtype)
    if row_weight is None:
        return total / amount.clamp(min=1)
    weightless = amount == 0
    # The division happens in either branch of `where`, so its denominator must be safe there too.
    return torch.where(weightless, 0.0, total / torch.where(weightless, 1.0, amount))


def masked_loss_backward(grad: Tensor, wanted: Sequence[bool], loss: LossArguments) -> list[Tensor]:
    """Gradients of `masked_loss`, scaled by `grad` (0-d), for the wanted of DIFFERENTIABLE.

    The loss is recomputed and differentiated by autograd with respect to the wanted inputs only: an unwanted one costs
    nothing and has no entry in the result, which holds contiguous tensors like their inputs, in that order.
    """
    leaves: dict[str, Any] = {
        name: None if (x := getattr(loss, name)) is None else x.detach().requires_grad_(want)
        for name, want in zip(DIFFERENTIABLE, wanted, strict=True)
    }
    with torch.enable_grad():
        value = masked_loss(*loss._replace(**leaves))
    sought = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    return [g.contiguous() for g in torch.autograd.grad(value, sought, grad)]
