"""Selection rules: which k rows train, and with which weights.

A rule is a function `(scores, valid, k, noise, **options) -> (index, weight)` over the last dimension: `scores` and
`noise` are float32 [..., N], `valid` is bool [..., N], k is a Python int; index is int64 [..., k], sorted, and weight
float32 [..., k]. The last dimension may hold the rows of a batch or its tokens, flattened or per row.

What holds for every rule here: a row is *selectable* where it is valid and the noise that it is drawn by is no NaN;
each of min(k, selectable) rows is selected once, none of the others; missing places repeat one of the selected rows
(row 0 where there is none) with weight 0; ties go to the lower index; all randomness comes from `noise`, uniform in
[0, 1) (`draw_noise`), and nothing is read back to the host.

A score of NaN says nothing about its row. Rules that read scores deal with the rows whose score is *known*; only where
these are fewer than k do others complete the selection, in the order of the index and with the weight of a row that is
certain to be drawn. So one row that overflows does not train, and a model that has diverged does, with a loss of NaN.

Most rules are an order of preference of which the first k rows are taken. The orders are public as `*_places`, for
callers whose k is known to the device only: the selection is then the mask `places < k` of the valid rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cggr_compile.kernels.reference import rows as reference
from torch import Tensor

RuleFunction = Callable[..., tuple[Tensor, Tensor]]

# Inclusion probabilities are integers over 2**30, so that they add up to k exactly.
_UNIT = 2**30

# scores, valid, k and noise, which a rule takes by position.
_OPERANDS = 4


@dataclass(frozen=True)
class Rule:
    """One selection rule.

    Attributes:
        name: what options and reports call it.
        function: the rule, with the signature of this module.
        needs_scores: whether it reads the scores; a rule that does not needs no router.
        needs_noise: whether it raises where `noise` is None.
        weighting: how the weights w of the selected rows estimate the mean of l over the M selectable ones: `"none"`
            (they only say which rows count), `"share"` (Σ w·l / Σ w) or `"inverse"` (Σ w·l).
        ranking: the ranking of `reference.select` that the rule is, None for a rule that is more than one.
    """

    name: str
    function: RuleFunction
    needs_scores: bool
    needs_noise: bool
    weighting: str = "none"
    ranking: str | None = None


def draw_noise(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform float32 noise in [0, 1) of the shape and on the device of `scores`, from a generator that should be on
    that device too: elsewhere the noise is copied."""
    noise = torch.rand(scores.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return noise.to(scores.device)


def known_rows(scores: Tensor, valid: Tensor) -> Tensor:
    """bool [..., N]: the valid rows whose score is not NaN."""
    return valid & ~scores.isnan()


def topk_places(scores: Tensor, valid: Tensor) -> Tensor:
    """int64 [..., N]: each row's place by score, the highest first, then those of score NaN; invalid ones come last."""
    known = known_rows(scores, valid)
    return _places(valid, ~known, torch.where(known, -scores, 0.0))


def stratified_places(scores: Tensor, valid: Tensor, within: Tensor, num_strata: int) -> Tensor:
    """int64 [..., N]: each row's place in the order that fills strata in proportion to their share.

    The M rows of known score, ranked by it, fall into strata of M / num_strata rows (± 1). The hardest has share
    num_strata, the easiest 1, as in the original CGGR. The j-th row of a stratum of share s, counted from 0 in
    descending order of `within` [..., N], comes at time (2j + 1) / s. That is Webster's method of apportionment: of
    the k first rows each stratum has its share of k, rounded, and a stratum that runs out leaves its part to the
    others, so that the total is exactly k. Rows of score NaN come behind, invalid ones last. Raises ValueError for
    num_strata < 1.
    """
    if num_strata < 1:
        raise ValueError(f"num_strata is {num_strata}, expected at least 1")
    stratum = _strata(scores, valid, num_strata)
    known = known_rows(scores, valid)
    # Strata lie one after the other in this order, so a row's place less that of its stratum's first is its j.
    place = _places(known, stratum, -within)
    first = torch.where(known, place, place.shape[-1])
    starts = torch.full((*place.shape[:-1], num_strata), place.shape[-1], device=place.device)
    starts = starts.scatter_reduce(-1, stratum, first, "amin")
    time = (2 * (place - starts.gather(-1, stratum)) + 1).float() / (num_strata - stratum)
    return _places(valid, ~known, torch.where(known, time, 0.0), stratum)


def trimmed_places(
    scores: Tensor, valid: Tensor, noise: Tensor, k: int, tau: float, epsilon: float, sizes: Tensor | None = None
) -> Tensor:
    """int64 [..., N]: each row's place in the order of `trimmed`, invalid ones last. A row takes `sizes` of k (int64
    [..., N]), or 1. Raises ValueError for tau or epsilon outside [0, 1]."""
    for name, value in (("tau", tau), ("epsilon", epsilon)):
        if not 0 <= value <= 1:
            raise ValueError(f"trimmed: {name} is {value}, expected a fraction in [0, 1]")
    known = known_rows(scores, valid)
    place = topk_places(scores, valid)
    outlier = place < fraction_of(tau, known.sum(-1, keepdim=True))
    taken = torch.where(outlier, 0, 1 if sizes is None else sizes)
    # A row's place is its index in the order by place, so scattering by place sorts.
    taken = torch.zeros_like(taken).scatter(-1, place, taken).cumsum(-1).gather(-1, place)
    hard = ~outlier & (taken <= k - math.floor(epsilon * k + 1e-9))
    preference = torch.where(known, torch.where(outlier, 2, torch.where(hard, 0, 1)), 3)
    by_place = place.to(noise.dtype)
    among = torch.where(outlier, -by_place, torch.where(hard | ~known, by_place, -noise))
    return _places(valid, preference, among)


def topk(scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k highest scores, weight 1. Registered as `topk` and as `fixed_quota`: the two differ in what k is, which
    `fixed_quota` says is the ratio's, whatever the dynamic threshold says."""
    _check("topk", scores, valid, k, noise)
    return reference.select(scores, valid, k, "topk")


def random(scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k uniformly drawn valid rows, weight 1: those of the largest noise. The scores give the shape and device."""
    _check("random", scores, valid, k, noise)
    return reference.select(scores, valid, k, "random", noise)


def stratified(
    scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None, *, num_strata: int = 4
) -> tuple[Tensor, Tensor]:
    """Uniform draws from strata of equal size by score, more from the harder ones (`stratified_places`).

    With M_h of M rows of known score and m_h of m selected rows in stratum h, a row's weight is (M_h / M) / (m_h / m).
    The weighted mean Σ w·l / Σ w is then Σ_h (M_h / M) · mean of stratum h, the stratified estimate of the mean over
    these M: unbiased where every stratum has a draw, which k = num_strata² ensures; one without draws is not
    represented. Raises ValueError for missing noise and num_strata < 1.
    """
    noise = _check_noise("stratified", scores, valid, k, noise)
    # A row whose noise is NaN cannot be drawn, nor counted.
    valid = valid & ~noise.isnan()
    place = stratified_places(scores, valid, noise, num_strata)
    stratum = _strata(scores, valid, num_strata)
    index, drawn = _first(place, valid, k)
    taken = valid & (place < k)
    # Rows of score NaN are taken where all others are: all weights are then 1.
    weight = _share(stratum, known_rows(scores, valid) | taken, num_strata) / _share(stratum, taken, num_strata)
    # Only strata without draws divide by 0, and no selected row is of them.
    return index, torch.where(drawn == 1, weight.gather(-1, _of_stratum(stratum, index)), 0.0)


def trimmed(
    scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None, *, tau: float = 0.05, epsilon: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Top-k without the outliers, and a uniform share; weight 1.

    Of M rows of known score the floor(tau · M) hardest are outliers. Preferred are the k - floor(epsilon · k) hardest
    others, then uniform draws from the rest of the others; where these are too few for k, outliers complete it, the
    least extreme first. Raises ValueError for missing noise and for tau or epsilon outside [0, 1].
    """
    noise = _check_noise("trimmed", scores, valid, k, noise)
    valid = valid & ~noise.isnan()
    return _first(trimmed_places(scores, valid, noise, k, tau, epsilon), valid, k)


def importance(
    scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None, *, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Systematic sampling (Madow 1949) with inclusion probabilities π_i = min(1, c·q_i), Σ π = min(k, M).

    Over the M rows of known score, q_i = (1 - floor) · s_i / Σ s + floor / M, where s is the score, shifted to 0 where
    one is negative, -inf is the least and +inf outweighs every finite score. The defensive share `floor` keeps every
    π positive. The weight of a selected row is 1 / (M·π_i): Σ w·l has the expectation Σ l / M, for any l. Rows are
    laid out by score and one uniform number, the hardest row's noise, draws them all. π are integers over 2**30 that
    sum to min(k, M) exactly, so that the draws are exact and distinct (for k < 2**20 and floor · k > M · 2**-30; the
    comments give the argument). Raises ValueError for missing noise and a floor outside (0, 1].
    """
    noise = _check_noise("importance", scores, valid, k, noise)
    if not 0 < floor <= 1:
        raise ValueError(f"importance: floor is {floor}, expected a share in (0, 1]; 0 would leave rows unreachable")
    if scores.shape[-1] == 0:
        return reference.select(scores, valid, k, "topk")
    known = known_rows(scores, valid & ~noise.isnan())
    unknown = valid & ~noise.isnan() & ~known
    # Where fewer than k are known, the first others join them, and every π is 1.
    selectable = known | (unknown & (unknown.cumsum(-1) <= k - known.sum(-1, keepdim=True)))
    scores = torch.where(known, scores, -math.inf)
    count = selectable.sum(-1, keepdim=True)
    draws = count.clamp(max=k)
    order = _places(selectable, -scores).argsort(-1)
    laid_out = selectable.gather(-1, order)
    q = _proposal(scores, selectable, floor).gather(-1, order)
    share = _fixed_point(q, laid_out, draws)

    total = share.cumsum(-1)
    offset = (noise.gather(-1, order[..., :1]).double() * _UNIT).long()
    # Threshold j is offset + j units. A share is at most one unit, so they meet different rows, and the last is below
    # the total. How many of them lie below a total is a quotient of data: j units themselves, products of an index,
    # are beyond the 32 bits that inductor computes those in.
    below = (total - offset + (_UNIT - 1)) // _UNIT
    places = torch.arange(k, device=scores.device).expand(*scores.shape[:-1], k)
    met = torch.searchsorted(below, places.contiguous(), right=True)
    drawn = places < draws
    row = torch.where(drawn, met, met[..., :1]).clamp(max=scores.shape[-1] - 1)
    weight = _UNIT / (count * share.gather(-1, row).clamp(min=1)).double()
    index = torch.where(count > 0, order.gather(-1, row), 0)
    # Stable, so that a row's own place precedes its repetitions.
    index, moved = index.sort(dim=-1, stable=True)
    return index, torch.where(drawn, weight, 0.0).gather(-1, moved).float()


def fraction_of(ratio: float | Tensor, count: Tensor) -> Tensor:
    """int64: floor(ratio · count), exact for fractions such as 0.29 that floats cannot represent."""
    # Metal has no float64.
    exact = count.float() if count.device.type == "mps" else count.double()
    return (exact * ratio + 1e-9).floor().long()


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("topk", topk, needs_scores=True, needs_noise=False, ranking="topk"),
        Rule("fixed_quota", topk, needs_scores=True, needs_noise=False, ranking="topk"),
        Rule("random", random, needs_scores=False, needs_noise=True, ranking="random"),
        Rule("stratified", stratified, needs_scores=True, needs_noise=True, weighting="share"),
        Rule("trimmed", trimmed, needs_scores=True, needs_noise=True),
        Rule("importance", importance, needs_scores=True, needs_noise=True, weighting="inverse"),
    )
}
"""The rules by name."""


def rule_of(rule: str | RuleFunction) -> Rule:
    """The registered rule of a name, or a rule that calls a user's function and checks what it returns.

    The function has the signature of this module and always gets noise. Its results' types, dtypes and shapes are
    checked at each call, from shapes alone; what it selects is its own affair. Its weights are shares: weights that
    are all equal weigh nothing. Raises ValueError for an unknown name and TypeError for what is neither a name nor
    callable.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule: got {rule!r}, expected one of {list(RULES)} or a function")
        return RULES[rule]
    if not callable(rule):
        raise TypeError(f"rule: got {type(rule).__name__}, expected one of {list(RULES)} or a function")
    name = rule_name(rule)

    def checked(
        scores: Tensor, valid: Tensor, k: int, noise: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        _check(name, scores, valid, k, noise)
        result = rule(scores, valid, k, noise, **options)
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
            raise TypeError(f"selection rule {name!r} returned {type(result).__name__}, expected (index, weight)")
        shapes = ((*scores.shape[:-1], k), (k,))
        for part, tensor, dtype in (("index", result[0], torch.int64), ("weight", result[1], torch.float32)):
            if tensor.dtype != dtype:
                raise TypeError(f"selection rule {name!r} returned {part} of {tensor.dtype}, expected {dtype}")
            if tuple(tensor.shape) not in shapes or result[0].shape != tensor.shape:
                raise ValueError(
                    f"selection rule {name!r} returned {part} of shape {tuple(tensor.shape)}, "
                    f"expected {shapes[0]}, or {shapes[1]} for the flattened scores"
                )
        return result

    return Rule(name, checked, needs_scores=True, needs_noise=True, weighting="share")


def rule_name(rule: str | RuleFunction) -> str:
    """What reports and errors call a rule: its name, a function's `__name__`, or the class of another callable."""
    return rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)


def options_of(rule: str | RuleFunction) -> dict[str, int | float | None]:
    """The options of a registered rule or of a user's function, with their defaults.

    An option is a keyword parameter behind the four positional ones whose default is a number, None or missing, which
    both read None here. Raises ValueError for a function whose signature Python cannot tell.
    """
    function = RULES[rule].function if isinstance(rule, str) else rule
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = 0
    found: dict[str, int | float | None] = {}
    for parameter in inspect.signature(function).parameters.values():
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and positional < _OPERANDS:
            positional += 1
        elif parameter.kind in kinds and (default is None or is_number(default)):
            found[parameter.name] = default
    return found


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(rule: str, scores: Tensor, valid: Tensor, k: int, noise: Tensor | None) -> None:
    if scores.dim() == 0 or scores.dtype != torch.float32:
        raise ValueError(
            f"{rule}: scores is {scores.dtype} of shape {tuple(scores.shape)}, expected float32 of shape [..., N]"
        )
    if valid.shape != scores.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"{rule}: valid is {valid.dtype} of shape {tuple(valid.shape)}, expected bool of {tuple(scores.shape)}"
        )
    if k < 0:
        raise ValueError(f"{rule}: k is {k}, expected at least 0")
    if noise is not None and (noise.shape != scores.shape or noise.dtype != torch.float32):
        raise ValueError(
            f"{rule}: noise is {noise.dtype} of shape {tuple(noise.shape)}, expected float32 of {tuple(scores.shape)}"
        )


def _check_noise(rule: str, scores: Tensor, valid: Tensor, k: int, noise: Tensor | None) -> Tensor:
    _check(rule, scores, valid, k, noise)
    if noise is None:
        raise ValueError(f"noise: the rule {rule!r} draws by noise, which is None; see draw_noise")
    return noise


def _places(selectable: Tensor, *keys: Tensor) -> Tensor:
    """Each row's place when the selectable rows come first, sorted by the keys in ascending order, then by index.

    No key of a selectable row is NaN."""
    order = torch.arange(selectable.shape[-1], device=selectable.device).expand(selectable.shape)
    # Stable sorts, the least significant key first.
    for key in (*reversed(keys), ~selectable):
        key = key.byte() if key.dtype == torch.bool else key
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, stable=True).indices)
    return order.argsort(-1)


def _first(place: Tensor, selectable: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # float32 holds places exactly up to 2**24.
    return reference.select(-place.float(), selectable, k, "topk")


def _strata(scores: Tensor, valid: Tensor, num_strata: int) -> Tensor:
    """int64 [..., N]: the stratum of each row by score, 0 the hardest; rows without one are in the last."""
    count = known_rows(scores, valid).sum(-1, keepdim=True).clamp(min=1)
    return (topk_places(scores, valid) * num_strata // count).clamp(max=num_strata - 1)


def _share(stratum: Tensor, counted: Tensor, num_strata: int) -> Tensor:
    """float32 [..., num_strata]: the share of each stratum in the counted rows."""
    counts = torch.zeros((*stratum.shape[:-1], num_strata), dtype=torch.float32, device=stratum.device)
    counts = counts.scatter_add(-1, stratum, counted.float())
    return counts / counted.sum(-1, keepdim=True).clamp(min=1)


def _of_stratum(stratum: Tensor, index: Tensor) -> Tensor:
    # Without rows every place repeats the absent row 0.
    return stratum.gather(-1, index) if stratum.shape[-1] else torch.zeros_like(index)


def _proposal(scores: Tensor, selectable: Tensor, floor: float) -> Tensor:
    """float64 [..., N]: q of `importance`, 0 for unselectable rows."""
    finite = selectable & scores.isfinite()
    infinite = selectable & (scores == math.inf)
    known = torch.where(finite, scores.double(), 0.0)
    lifted = torch.where(finite, known - known.amin(-1, keepdim=True).clamp(max=0.0), 0.0)
    s = torch.where(infinite.any(-1, keepdim=True), infinite.double(), lifted)
    total = s.sum(-1, keepdim=True)
    count = selectable.sum(-1, keepdim=True).clamp(min=1).double()
    s = torch.where(total > 0, s / torch.where(total > 0, total, 1.0), 1.0 / count)
    return torch.where(selectable, (1 - floor) * s + floor / count, 0.0)


def _fixed_point(q: Tensor, selectable: Tensor, draws: Tensor) -> Tensor:
    """int64 [..., N]: π in units of 2**-30 for q [..., N] in descending order, `draws` · 2**30 in total.

    With the t largest saturated, c_t = (draws - t) / Σ_{i >= t} q_i; the right t is the first for which the next row
    stays within 1, c_t · q_t <= 1. It is found for all t at once; t = draws always qualifies.
    """
    taken = torch.arange(q.shape[-1], device=q.device)
    left = q.flip(-1).cumsum(-1).flip(-1)
    fits = (draws - taken) * q <= left
    saturated = fits.byte().argmax(-1, keepdim=True)
    rate = (draws - saturated).double() / left.gather(-1, saturated).clamp(min=torch.finfo(torch.float64).tiny)
    pi = torch.where(taken < saturated, 1.0, (rate * q).clamp(max=1.0))
    # Every row takes all where no row must be left out.
    pi = torch.where(draws == selectable.sum(-1, keepdim=True), selectable.double(), pi)
    share = torch.where(selectable, (pi * _UNIT).long(), 0)
    # Each open share lost less than one unit to the floor, so at most one unit each is missing: the first `missing`
    # of them get it back and none exceeds one. float64 rounds the sum by far less than a unit for draws < 2**20.
    open_share = selectable & (share < _UNIT)
    missing = draws * _UNIT - share.sum(-1, keepdim=True)
    return share + (open_share & (open_share.cumsum(-1) <= missing)).long()
