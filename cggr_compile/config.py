"""`RoutingConfig`: every option of the compiler, checked where it is given.

An unknown or ill-typed option raises `ConfigError` naming the option, what was given, what is valid and, for a
misspelt name, the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cggr_compile.kernels.providers import PROVIDERS
from cggr_compile.kernels.selection import RULES
from cggr_compile.kernels.selection_ops import DRAWING, options_of

ROUTES = ("sequence", "token", "loss")
COMPOSITIONS = (("sequence", "loss"), ("token", "loss"))
RESAMPLES = ("block", "layer")
SCORINGS = ("loss", "entropy", "margin", "combined")
SELECTIONS = ("topk", "random", *DRAWING)
ROUTER_HEADS = ("exact", "sampled", "low_rank", "fp8")
FALLBACKS = ("raise", "eager")

# Warm-up moves the kept fraction on this many equal rungs between 1 and `ratio`, so that a curriculum costs at
# most LADDER_RUNGS + 1 compilations of the inner backend for each batch shape.
LADDER_RUNGS = 8


class ConfigError(ValueError):
    """An option of `RoutingConfig` is unknown, ill-typed or out of range."""


def nearest(name: str, names: list[str]) -> str:
    """`did you mean 'x'?` or an empty string."""
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class RoutingConfig:
    """Options of the rewrite; immutable, compared by value.

    Attributes:
        route: what is routed. `"sequence"`: whole rows of the batch; `"token"`: the middle layers run on k tokens of
            each sequence, the others pass on the residual; `"loss"`: head and softmax run on k tokens of the batch. Two
            of them as a tuple: `("sequence", "loss")` or `("token", "loss")`.
        ratio: fraction kept, in (0, 1]: k = max(1, ceil(ratio * N)), N the batch size (sequence), the sequence length
            (token) or both multiplied (loss).
        router_layers: layers of the router, a positive int, or `"auto"` for max(2, L // 8), at most L - 1.
        scoring: `"loss"` (negative log-likelihood), `"entropy"`, `"margin"` (1 - (p1 - p2)) or `"combined"`
            (their sum); a row's score is the mean over its counted tokens, in fp32.
        router_head: how the router's logits are computed: `"exact"`, or estimated by `"sampled"` (a sample of the
            vocabulary; `"loss"` and `"entropy"` only), `"low_rank"` or `"fp8"`. The loss is always exact.
        router_head_frequent, router_head_sampled: sampled head: how many of the batch's most frequent tokens, and how
            many others drawn at random, stand for the vocabulary.
        router_head_rank: low-rank head: directions of the hidden space that are kept, at most all.
        router_head_refresh: low-rank head: routed steps between refreshes of these directions; the first refreshes
            come after 1, 2, 4, 8, … steps.
        selection: `"topk"` (hardest rows), `"random"` (uniform rows; no router is run), or a rule that draws by the
            scores (`kernels/selection.py`): `"trimmed"` (top-k without outliers, and a uniform share),
            `"stratified"` (uniform within strata by score; the loss is the stratified estimate of the batch's) or
            `"importance"` (rows with probability by score; the loss is an unbiased estimate of the batch's).
        selection_options: options of that rule, e.g. `{"tau": 0.05}`; None for its defaults.
        warmup_steps: optimiser steps over which the kept fraction falls from 1 to `ratio`.
        dense_after_steps: optimiser step from which everything is kept; the kept fraction rises to 1 from the end of
            the warm-up until then, on the warm-up's rungs. None keeps `ratio`.
        first_layers, last_layers: token route: layers at either end that run on every token, at least 1 and 0.
        resample: token route: `"block"` selects once for all middle layers, `"layer"` for each of them.
        allow_compressed_recurrence: token route: let convolutions, scans and shifts of the middle layers run on the
            kept tokens as if these were neighbours; without it they raise `CannotOptimize`.
        inner: torch.compile backend that runs the rewritten graph; `"auto"` is inductor on CUDA and eager elsewhere.
        kernels: implementations of the operators: `"auto"` (the best that can run), the name of a provider for every
            operator that has it (`"triton"`, `"reference"`), or a mapping from operators to providers, e.g.
            `{"masked_loss": "triton_recompute"}`. One that cannot run raises `CannotOptimize`.
        keep_logits: return the logits of the kept rows instead of None.
        fallback: `"raise"`, or `"eager"` to train unrouted, with a warning, where routing is impossible.
        seed: seed of the model's own generator, for random selections and router heads; None draws one from torch's
            global seed.
    """

    route: str | tuple[str, ...] = "sequence"
    ratio: float = 0.5
    router_layers: int | str = "auto"
    scoring: str = "loss"
    router_head: str = "exact"
    router_head_frequent: int = 1024
    router_head_sampled: int = 1024
    router_head_rank: int = 128
    router_head_refresh: int = 100
    selection: str = "topk"
    selection_options: Mapping[str, float] | None = None
    warmup_steps: int = 0
    dense_after_steps: int | None = None
    first_layers: int = 1
    last_layers: int = 1
    resample: str = "block"
    allow_compressed_recurrence: bool = False
    inner: str = "auto"
    kernels: str | Mapping[str, str] = "auto"
    keep_logits: bool = False
    fallback: str = "raise"
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_route()
        _choice("scoring", self.scoring, SCORINGS)
        _choice("router_head", self.router_head, ROUTER_HEADS)
        _choice("selection", self.selection, SELECTIONS)
        self._check_selection_options()
        _choice("fallback", self.fallback, FALLBACKS)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio={self.ratio!r} is not in (0, 1]; give the fraction of rows to keep, e.g. 0.25")
        if self.router_layers != "auto" and not _is_int(self.router_layers, 1):
            raise ConfigError(
                f"router_layers={self.router_layers!r} is neither 'auto' nor a positive integer; "
                "give the number of layers the router runs"
            )
        self._check_router_head()
        if not _is_int(self.warmup_steps, 0):
            raise ConfigError(f"warmup_steps={self.warmup_steps!r} is not a non-negative integer")
        if self.dense_after_steps is not None and not _is_int(self.dense_after_steps, self.warmup_steps + 1):
            raise ConfigError(
                f"dense_after_steps={self.dense_after_steps!r} is neither None nor an integer above "
                f"warmup_steps={self.warmup_steps}"
            )
        self._check_token_route()
        if not isinstance(self.inner, str):
            raise ConfigError(f"inner={self.inner!r} is not the name of a torch.compile backend")
        self._check_kernels()
        if not isinstance(self.keep_logits, bool):
            raise ConfigError(f"keep_logits={self.keep_logits!r} is not a bool")
        if self.seed is not None and not _is_int(self.seed, 0):
            raise ConfigError(f"seed={self.seed!r} is neither None nor a non-negative integer")

    @property
    def routes(self) -> tuple[str, ...]:
        """`route` as a tuple."""
        return (self.route,) if isinstance(self.route, str) else self.route

    def _check_route(self) -> None:
        if not isinstance(self.route, tuple):
            _choice("route", self.route, ROUTES)
        elif self.route not in COMPOSITIONS:
            raise ConfigError(
                f"route={self.route!r} is not a combination of routes; "
                f"valid combinations: {', '.join(map(str, COMPOSITIONS))}"
            )

    def _check_token_route(self) -> None:
        for name, least in (("first_layers", 1), ("last_layers", 0)):
            if not _is_int(getattr(self, name), least):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not an integer of at least {least}")
        _choice("resample", self.resample, RESAMPLES)
        if not isinstance(self.allow_compressed_recurrence, bool):
            raise ConfigError(f"allow_compressed_recurrence={self.allow_compressed_recurrence!r} is not a bool")
        if "token" not in self.routes:
            return
        rule = RULES[self.selection]
        if rule.weighting != "none":
            valid = [name for name in SELECTIONS if RULES[name].weighting == "none"]
            raise ConfigError(
                f"selection={self.selection!r} weighs the loss of what it selects, and a token that skips layers keeps "
                f"its loss; with route='token' valid selections: {', '.join(valid)}"
            )
        if self.resample == "layer" and not rule.needs_noise:
            raise ConfigError(
                f"resample='layer' with selection={self.selection!r} would select the same tokens for every layer; "
                "use resample='block', or selection='random' or 'trimmed'"
            )

    def _check_router_head(self) -> None:
        for name, least in (("frequent", 0), ("sampled", 1), ("rank", 1), ("refresh", 1)):
            given = getattr(self, f"router_head_{name}")
            if not _is_int(given, least):
                raise ConfigError(f"router_head_{name}={given!r} is not an integer of at least {least}")
        if self.router_head == "sampled" and self.scoring in ("margin", "combined"):
            raise ConfigError(
                f"router_head='sampled' cannot score by {self.scoring!r}: the two largest logits of a sample are not "
                "those of the vocabulary; use router_head='low_rank', 'fp8' or 'exact', or scoring='loss' or 'entropy'"
            )

    def _check_selection_options(self) -> None:
        given = self.selection_options
        if given is None:
            return
        if not isinstance(given, Mapping):
            raise ConfigError(f"selection_options={given!r} is neither None nor a mapping from names to numbers")
        known = options_of(self.selection) if self.selection in DRAWING else {}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"selection_options: {self.selection!r} has no option {name!r}{nearest(str(name), list(known))} "
                    f"valid options: {', '.join(known) or 'none'}"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"selection_options[{name!r}]={value!r} is not a number")

    def _check_kernels(self) -> None:
        names = sorted({name for providers in PROVIDERS.values() for name in providers})
        if isinstance(self.kernels, str):
            _choice("kernels", self.kernels, ("auto", *names))
            return
        if not isinstance(self.kernels, Mapping):
            raise ConfigError(f"kernels={self.kernels!r} is neither a string nor a mapping from operators to providers")
        for operator, provider in self.kernels.items():
            _choice("kernels: operator", operator, tuple(PROVIDERS))
            _choice(f"kernels[{operator!r}]", provider, tuple(PROVIDERS[operator]))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RoutingConfig:
        """Builds a config from keyword options.

        Raises:
            ConfigError: an option is unknown (the message lists the valid ones and the nearest) or has a bad value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ConfigError(
                    f"unknown option {name!r}{nearest(str(name), names)} valid options: {', '.join(names)}"
                )
        return cls(**options)

    def kept_fraction(self, step: int) -> float:
        """Fraction kept at optimiser step `step`: `ratio`, and on the ladder before the warm-up's end and on the way to
        `dense_after_steps`."""
        if step < self.warmup_steps:
            rung = math.floor(LADDER_RUNGS * step / self.warmup_steps)
        elif self.dense_after_steps is None:
            return self.ratio
        else:
            rising = self.dense_after_steps - self.warmup_steps
            rung = max(0, LADDER_RUNGS - math.floor(LADDER_RUNGS * (step - self.warmup_steps) / rising))
        return self.ratio if rung == LADDER_RUNGS else 1 - (1 - self.ratio) * rung / LADDER_RUNGS

    def kept_rows(self, rows: int, step: int) -> int:
        """k = max(1, ceil(fraction * rows)) of `rows` rows or tokens, exact for fractions such as 0.1 that floats
        cannot represent."""
        return max(1, math.ceil(round(self.kept_fraction(step) * rows, 9)))


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name}={value!r}{nearest(str(value), list(valid))} valid values: {', '.join(valid)}")
