"""How much trains at which optimiser step: warm-up, the way back to everything, the dynamic threshold, and depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cggr_compile.values import ConfigError, choice, is_int

if TYPE_CHECKING:
    from cggr_compile.kernels.reference.selection import RuleFunction

# Warm-up and dynamic threshold move the kept fraction on this many equal rungs between 1 and `ratio`, so that CUDA
# graphs are recorded for at most LADDER_RUNGS + 1 sizes of each batch shape.
LADDER_RUNGS = 8
GROWTHS = ("copy", "random")
SCOPES = ("local", "global")


class Schedule:
    """The part of `RoutingConfig` that says how much of the batch and of the model a step trains, selected by whom."""

    route: str | tuple[str, ...]
    ratio: float
    selection: str | RuleFunction
    warmup_steps: int
    dense_after_steps: int | None
    dynamic_threshold: bool
    threshold_sensitivity: float
    depth_layers: int | tuple[int, ...] | None
    depth_until: float | tuple[float, ...] | None
    grow: str
    selection_scope: str
    cuda_graphs: bool
    fallback: str

    @property
    def _routes(self) -> tuple[str, ...]:
        return (self.route,) if isinstance(self.route, str) else self.route

    @property
    def routes(self) -> tuple[str, ...]:
        """The routes that select something, in order."""
        return tuple(route for route in self._routes if route != "depth")

    @property
    def deepens(self) -> bool:
        """Whether the first layers train alone at first."""
        return "depth" in self._routes

    @property
    def stages(self) -> tuple[tuple[int, float | None], ...]:
        """Of each time before all layers train: how many of the first do, and until when."""
        layers = _tuple(self.depth_layers) if self.deepens else ()
        until = (None,) * len(layers) if self.depth_until is None else _tuple(self.depth_until)
        return tuple(zip(layers, until, strict=True))

    def is_over(self, step: int) -> bool:
        """Whether the kept fraction goes by the number of optimiser steps no longer."""
        return step >= self._end

    @property
    def follows_confidence(self) -> bool:
        """Whether the dynamic threshold moves k, so that the router has to tell its confidence."""
        return self.dynamic_threshold and self.selection != "fixed_quota"

    def kept_fraction(self, step: int, confidence: float | None = None) -> float:
        """Fraction kept at optimiser step `step`: `ratio`, and on the ladder before the warm-up's end and on the way to
        `dense_after_steps`; higher on the ladder where the dynamic threshold is on and `confidence`, the router's mean
        in [0, 1], is known."""
        rung = self._rung(step)
        return self._on_rung(rung if confidence is None else self._raised(rung, confidence))

    def is_settled(self, step: int) -> bool:
        """Whether every step from this one on keeps the same fraction."""
        return self.is_over(step) and not self.follows_confidence

    def fractions(self, step: int, first: bool) -> list[float]:
        """All fractions that are kept from this step on: that of the last step, the lowest, one on the way, then the
        others. Of the `first` layers or program to train, none where nothing changes."""
        if first and self.is_settled(step):
            return []
        stops = [step, self._end]
        for begin, end in ((0, self.warmup_steps), (self.warmup_steps, self._end)):
            stops += [begin + math.ceil((end - begin) * rung / LADDER_RUNGS) for rung in range(LADDER_RUNGS)]
        lowest = {self._rung(stop) for stop in stops if stop >= step}
        reached = {rung for each in lowest for rung in range(self._raised(each, 0.0), each + 1)}
        in_order = (self._rung(self._end), LADDER_RUNGS, LADDER_RUNGS // 2, *range(LADDER_RUNGS))
        return list(dict.fromkeys(self._on_rung(rung) for rung in in_order if rung in reached))

    def check_stages(self) -> None:
        """Raises `ConfigError` where the options of the depth route are no stages."""
        choice("grow", self.grow, GROWTHS)
        if not self.deepens:
            if self.depth_layers is not None or self.depth_until is not None or self.grow != "copy":
                raise ConfigError("depth_layers, depth_until and grow are for route='depth'")
            return
        layers, until = _tuple(self.depth_layers), _tuple(self.depth_until)
        if not layers or not all(is_int(each, 1) for each in layers) or list(layers) != sorted({*layers}):
            raise ConfigError(
                f"route={self.route!r} with depth_layers={self.depth_layers!r}; give a positive integer, or several "
                "that rise"
            )
        if self.depth_until is None:
            return
        shares = all(isinstance(each, float) and 0 < each < 1 for each in until)
        if not shares and not all(is_int(each, 1) for each in until):
            raise ConfigError(
                f"depth_until={self.depth_until!r} is none of: a number of steps, a share of them in (0, 1), a tuple "
                "of steps, a tuple of shares, None"
            )
        if len(until) != len(layers) or list(until) != sorted({*until}):
            raise ConfigError(
                f"depth_until={self.depth_until!r} with depth_layers={self.depth_layers!r}; give one for each stage, "
                "rising"
            )

    def check_scope(self) -> None:
        """Raises `ConfigError` where the ranks of a distributed run cannot select together."""
        choice("selection_scope", self.selection_scope, SCOPES)
        if self.selection_scope == "local":
            return
        conflicts = {
            f"route={self.route!r}": (self.routes != ("sequence",), "only whole rows travel; use route='sequence'"),
            "selection='auto'": (self.selection == "auto", "each rank decides by its own rows; name a rule"),
            "dynamic_threshold=True": (self.follows_confidence, "k would differ between the ranks; leave it out"),
            "cuda_graphs=True": (self.cuda_graphs, "a step's collectives are not recorded; leave it out"),
            "fallback='eager'": (self.fallback == "eager", "an unrouted rank would leave the others waiting"),
        }
        for option, (given, why) in conflicts.items():
            if given:
                raise ConfigError(f"selection_scope='global' with {option}: {why}, or use selection_scope='local'")

    @property
    def _end(self) -> int:
        return max(self.warmup_steps, self.dense_after_steps or 0)

    def _rung(self, step: int) -> int:
        """The rung of a step before the router's confidence counts: 0 keeps everything, LADDER_RUNGS keeps `ratio`."""
        if step < self.warmup_steps:
            return LADDER_RUNGS * step // self.warmup_steps
        if self.dense_after_steps is None:
            return LADDER_RUNGS
        rising = self.dense_after_steps - self.warmup_steps
        return max(0, LADDER_RUNGS - LADDER_RUNGS * (step - self.warmup_steps) // rising)

    def _raised(self, rung: int, confidence: float) -> int:
        """The rung of a step whose schedule is on `rung`, by the dynamic threshold, where it is on."""
        if not self.follows_confidence or self.ratio == 1:
            return rung
        raised = self._on_rung(rung) * (1 + (1 - confidence) * self.threshold_sensitivity)
        # The lowest rung that is not below; what rounding adds to a fraction on a rung is no step up.
        reached = math.floor(LADDER_RUNGS * (1 - raised) / (1 - self.ratio) + 1e-9)
        return max(0, min(rung, reached))

    def _on_rung(self, rung: int) -> float:
        return self.ratio if rung == LADDER_RUNGS else 1 - (1 - self.ratio) * rung / LADDER_RUNGS


def kept_of(fraction: float, total: int) -> int:
    """k = max(1, ceil(fraction * total)), exact for fractions such as 0.1 that floats cannot represent."""
    return max(1, math.ceil(round(fraction * total, 9)))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
