"""`selection="auto"`: uniform rows until a probe says that scores pay for the router.

A probe splits the rows of one training batch at random into a held-out half and candidates, takes the share `ratio` of
the candidates once by score and several times at random, and compares gradients: how well does the mean gradient of
the taken rows align with that of the held-out ones, which are a uniform sample and stand for the whole data?

The cosine is compared, not the projection: optimisers that normalise their steps (Adam) move as far on easy rows as on
hard ones, whose gradients are longer. A cosine with a held-out gradient is too small, because that gradient is noisy,
but by one factor for both ways of choosing; so their ratio, the *gain* of scores, is not affected, if it is taken of
means over probes. One probe is noisy. What is tested is therefore the contrast `scores - ω · random`, which has no
denominator, against its own standard error: the program changes only where the mean contrast lies MARGIN errors on the
other side of zero, and stays where the evidence is undecided.

Training does not notice a probe. It runs the very code of the random program (rows that are not wanted get NaN for
noise, which is never selected), so no shape is new to the inner backend and no more is saved for backward than in a
step; torch's generators are restored, neither the selections' generator nor `.grad` is touched, and autocast's weight
cache is neither read nor filled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cggr_compile.config import RoutingConfig
from cggr_compile.kernels.reference.selection import RULES
from cggr_compile.run.plan import Plan

# Random choices in one probe, whose cosines are averaged.
DRAWS = 2
# What a probe weighs once the next one has been made, relative to that: about the last 19 probes count.
MEMORY = 0.9
# Probes before the first switch, and standard errors that the contrast must be away from zero.
LEAST_PROBES = 5
MARGIN = 2.0

_log = logging.getLogger("cggr_compile")


@dataclass(frozen=True)
class Measurement:
    """What one probe found.

    Attributes:
        scores: cosine of the gradient of the candidates chosen by score with that of the held-out rows.
        random: the same for candidates chosen at random, the mean of DRAWS choices.
        rank_correlation: Spearman's, of router scores and the model's own mean token losses on the held-out rows; NaN
            where all scores or all losses are equal.
        held_out, by_score: rows of the batch, in ascending order.
        at_random: rows of the batch for each draw.
    """

    scores: float
    random: float
    rank_correlation: float
    held_out: tuple[int, ...]
    by_score: tuple[int, ...]
    at_random: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Skipped:
    """Why a probe could not measure anything."""

    reason: str


class Evidence:
    """Means of the probes' pairs (scores, random) that forget at rate MEMORY, and how sure they are."""

    def __init__(self) -> None:
        # Sums of w, w², w·s, w·r, w·s², w·s·r, w·r² over the probes, w = MEMORY^age.
        self.sums = [0.0] * 7

    def add(self, scores: float, random: float) -> None:
        """One more probe."""
        terms = (1.0, 1.0, scores, random, scores * scores, scores * random, random * random)
        decay = [MEMORY] * 7
        decay[1] = MEMORY * MEMORY
        self.sums = [rate * total + term for rate, total, term in zip(decay, self.sums, terms, strict=True)]

    @property
    def means(self) -> tuple[float, float]:
        """Mean cosine by scores and at random."""
        return self.sums[2] / self.sums[0], self.sums[3] / self.sums[0]

    @property
    def gain(self) -> float:
        """Mean by scores over mean at random; NaN where that is not positive."""
        scores, random = self.means
        return scores / random if random > 0 else math.nan

    def contrast(self, omega: float) -> tuple[float, float]:
        """Mean of `scores - omega · random` and its standard error, infinite after one probe."""
        w, w2, s, r, ss, sr, rr = self.sums
        mean = (s - omega * r) / w
        spread = (ss - 2 * omega * sr + omega * omega * rr) / w - mean * mean
        independent = 1 - w2 / (w * w)
        if independent < 1e-9:
            return mean, math.inf
        return mean, math.sqrt(max(spread, 0.0) / independent * w2) / w


class Probe:
    """When to probe, what was found so far, and which program is in force.

    Attributes:
        pays: whether scores are in force.
        probes, skipped: how many measured, how many could not.
        reason: why the program in force is, in a sentence.
        last: the last measurement.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self.choices = (uniform(config), by_score(config))
        self.every = config.probe_every
        self.due = max(config.probe_every, config.warmup_steps)
        self.pays = False
        self.probes = self.skipped = 0
        self.reason = f"no probe before step {self.due}"
        self.evidence = Evidence()
        self.break_even = math.nan
        self.last: Measurement | None = None

    @property
    def in_force(self) -> RoutingConfig:
        """The options with `"random"` or `"trimmed"` in place of `"auto"`."""
        return self.choices[self.pays]

    def before_step(self, plan: Plan, inputs: Sequence[Any], steps: int, generator: torch.Generator) -> None:
        """Probes with the inputs of a step where one is due, and decides which program runs from this step on; the
        generator is that of the selections.

        The gradients' dot products and the rows' scores are read back, in this step only.
        """
        if steps < self.due:
            return
        self.due = steps + self.every
        found = measure(plan, inputs, steps, generator)
        if isinstance(found, Skipped):
            self.skipped += 1
            self.reason = f"{self._standing()}; the probe at step {steps} was skipped: {found.reason}"
            _log.info("probe at step %d skipped: %s", steps, found.reason)
            return
        self.probes += 1
        self.last = found
        self.evidence.add(found.scores, found.random)
        self.break_even = plan.break_even
        before = self.pays
        decided = self._decided()
        self.pays = before if decided is None else decided
        self.reason = self._standing()
        _log.info(
            "probe %d at step %d: cosine %.3f by scores, %.3f at random, rank correlation %.2f; %s",
            *(self.probes, steps, found.scores, found.random, found.rank_correlation, self.reason),
        )
        if self.pays != before:
            _log.info("step %d: selection switches to %r: %s", steps, self.in_force.selection, self.reason)

    def _decided(self) -> bool | None:
        """Whether scores pay; None where the probes so far do not say."""
        mean, error = self.evidence.contrast(self.break_even)
        if self.probes < LEAST_PROBES or abs(mean) <= MARGIN * error:
            return None
        return mean > 0 and self.evidence.means[0] > 0

    def _standing(self) -> str:
        if not self.probes:
            return "nothing is known yet"
        scores, random = self.evidence.means
        mean, error = self.evidence.contrast(self.break_even)
        unknown = "undecided" if self.probes >= LEAST_PROBES else f"{LEAST_PROBES} probes are needed"
        verdict = {True: "scores pay", False: "scores do not pay", None: unknown}[self._decided()]
        return (
            f"mean cosines {scores:.3f} by scores and {random:.3f} at random, gain {self.evidence.gain:.2f}, "
            f"break-even {self.break_even:.2f}, contrast {mean:.3f} ± {error:.3f}: {verdict}"
        )

    def metrics(self, device: torch.device) -> dict[str, Tensor]:
        """`auto_scores` (1 where scores are in force), `probes`, `probes_skipped`; after the first probe also
        `probe_gain` (NaN where random rows do not align), `probe_break_even`, `probe_rank_correlation`."""
        found: dict[str, float] = {"auto_scores": int(self.pays), "probes": self.probes, "probes_skipped": self.skipped}
        if self.last is not None:
            found["probe_gain"] = self.evidence.gain
            found["probe_break_even"] = self.break_even
            found["probe_rank_correlation"] = self.last.rank_correlation
        return {name: torch.full((), number, device=device) for name, number in found.items()}

    def __str__(self) -> str:
        return f"{self.in_force.selection} in force; {self.reason}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on and metrics show; numbers, strings and containers of them."""
        return {
            **{name: getattr(self, name) for name in _STATE},
            "sums": list(self.evidence.sums),
            "last": None if self.last is None else asdict(self.last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.evidence.sums = list(state["sums"])
        self.last = None if state["last"] is None else Measurement(**state["last"])


_STATE = ("due", "pays", "probes", "skipped", "reason", "break_even")


def uniform(config: RoutingConfig) -> RoutingConfig:
    """The options of the random program."""
    return replace(config, selection="random", selection_options=None)


def by_score(config: RoutingConfig) -> RoutingConfig:
    """The options of the program that scores."""
    return replace(config, selection="trimmed")


def measure(plan: Plan, inputs: Sequence[Any], steps: int, generator: torch.Generator) -> Measurement | Skipped:
    """One probe on the inputs of a step; the model, its gradients and every generator stay as they are.

    Only rows with a counted label take part: half of them, drawn at random, are held out. Of the others, k =
    `config.kept_rows` are taken.
    """
    config = plan.owner.config
    rows = plan.sizes(inputs)[0]
    kept = config.kept_rows(rows, steps)
    if kept >= rows:
        return Skipped(f"every one of the {rows} rows is kept")
    seed = _seed(generator, steps)
    host = torch.Generator().manual_seed(seed)
    with _undisturbed(plan.device, inputs):
        scores, counts = router_scores(plan, inputs, torch.Generator(plan.device).manual_seed(seed + 1))
        usable = counts.nonzero().squeeze(1)
        drawn = usable[torch.randperm(len(usable), generator=host)]
        held_out, candidates = (part.sort().values for part in (drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]))
        k = config.kept_rows(len(candidates), steps)
        if len(held_out) < 2 or k >= len(candidates):
            return Skipped(
                f"{len(usable)} of {rows} rows have labels: too few to hold half of them out and take {k} of the "
                f"{len(candidates)} others"
            )
        noise = torch.rand(len(candidates), generator=host)
        everyone = torch.ones(len(candidates), dtype=torch.bool)
        options = config.selection_options or {}
        index, weight = RULES["trimmed"].function(scores[candidates], everyone, k, noise, **options)
        hard = candidates[index[weight > 0]]
        if len(hard) < k:
            return Skipped("a row's score is NaN")
        draws = [candidates[torch.randperm(len(candidates), generator=host)[:k]].sort().values for _ in range(DRAWS)]
        target = _gradient(plan, inputs, held_out, counts, kept)
        cosines = [_cosine(target, _gradient(plan, inputs, taken, counts, kept)) for taken in (hard, *draws)]
        losses = main_losses(plan, inputs)
    if not all(map(math.isfinite, cosines)):
        return Skipped("a gradient is zero or not finite")
    return Measurement(
        scores=cosines[0],
        random=math.fsum(cosines[1:]) / DRAWS,
        rank_correlation=spearman(scores[held_out], losses[held_out]),
        held_out=tuple(held_out.tolist()),
        by_score=tuple(hard.tolist()),
        at_random=tuple(tuple(taken.tolist()) for taken in draws),
    )


def _seed(generator: torch.Generator, steps: int) -> int:
    """Another seed for each step, from that of the selections' generator, whose state stays as it is."""
    return (generator.initial_seed() + 0x9E3779B97F4A7C15 * (steps + 1)) % 2**63


@contextmanager
def _undisturbed(device: torch.device, inputs: Sequence[Any]) -> Iterator[None]:
    """Restores torch's generators afterwards and keeps autocast's weight cache out of it.

    A cast of a weight made for a probe would otherwise be found by the step, with a graph that is freed already.
    """
    used = {tensor.device for tensor in inputs if isinstance(tensor, Tensor) and tensor.device.type == device.type}
    others = {} if device.type == "cpu" else {"device_type": device.type}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(used) if others else [], **others))
        if torch.amp.is_autocast_available(device.type):
            dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
            stack.enter_context(torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False))
        yield


def router_scores(plan: Plan, inputs: Sequence[Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The router's score and the counted labels of every row, both [B] and on the host."""
    scores, counts = plan.row_scores(inputs, by_score(plan.owner.config), generator)
    return scores.cpu(), counts.cpu()


def main_losses(plan: Plan, inputs: Sequence[Any]) -> Tensor:
    """The model's own mean token loss of every row, without dropout: float32 [B], on the host.

    That is what a router of all layers with exact body and head scores by loss.
    """
    exact = replace(plan.owner.config, router_body="exact", router_head="exact", scoring="loss")
    whole = replace(exact, router_layers=len(plan.analysed.stack))
    losses, _ = plan.scoring("main losses", whole).variant(*inputs)
    return losses.cpu()


def _gradient(plan: Plan, inputs: Sequence[Any], chosen: Tensor, counts: Tensor, kept: int) -> list[Tensor | None]:
    """The gradient of the mean loss over the tokens of some rows, up to a factor, by parameter.

    The random program runs on at most `kept` rows at a time. Its loss is, up to a factor, the mean over the tokens of
    the selected rows, whether the model divides by their number or by the caller's; weighed by that number, the parts
    add up to the sum over tokens. Rows whose noise is NaN are not selected; where that leaves fewer than `kept`, the
    rest fills up and counts for nothing.
    """
    route = plan.routed(uniform(plan.owner.config))
    parameters = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    total: list[Tensor | None] = []
    for part in chosen.split(kept):
        noise = torch.full((len(counts),), math.nan)
        noise[part] = 0.5
        loss = route.variant(*inputs, kept, noise.to(plan.device))[route.program.loss_output]
        tokens = counts[part].sum().to(loss)
        gradients = torch.autograd.grad(loss, parameters, tokens, allow_unused=True)
        total = total or [None] * len(gradients)
        for index, gradient in enumerate(gradients):  # one by one, so that only one sum exists beside both lists
            total[index] = _added(total[index], gradient)
    return total


def _added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _cosine(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """Cosine of two gradients over all parameters; NaN where one is zero."""
    squares = _dot(left, left) * _dot(right, right)
    return _dot(left, right) / math.sqrt(squares) if squares > 0 else math.nan


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """Products in float32, read back once."""
    pairs = zip(left, right, strict=True)
    products = [(a.float() * b.float()).sum() for a, b in pairs if a is not None and b is not None]
    if not products:
        return 0.0
    return math.fsum(torch.stack([product.to(products[0].device) for product in products]).tolist())


def spearman(left: Tensor, right: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; NaN where one is constant."""
    ranks = torch.stack([_mean_ranks(left), _mean_ranks(right)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return (centred[0].dot(centred[1]) / (norms[0] * norms[1])).item()


def _mean_ranks(x: Tensor) -> Tensor:
    above = (x.unsqueeze(1) > x).sum(1)
    equal = (x.unsqueeze(1) == x).sum(1)
    return (above + (equal + 1) / 2).double()
