"""The arms of the quality benchmark: what their names mean, and the forward and backward of one step of each.

An arm is `NAME[@RATIO][xBATCH][/RATE][+depth=N:SHARE[,N:SHARE …][:GROW]][+matmul]`: what is kept, the rows a step
draws, the peak learning rate, how deep the model is at first, and whether its layers multiply in float8. Names:

* `compile`: torch.compile. `all`: every row. `small=N`: every row of a model that has N layers from first to last.
  `default`: `cggr.optimize` without options. None of them takes a ratio.
* A selection rule: `random`, `topk`, `trimmed`, `stratified`, `importance`, `auto`; `easiest` (the lowest scores);
  `shuffled` (the router is paid, its scores are shuffled); `excess` (hardest first by the router's loss less that of a
  reference model, which was trained on clean rows and costs nothing: the clock stands still); `remembered` (trimmed by
  the router's scores, which every second pass takes from the one before); `oracle` (trimmed by the whole model's own
  losses of the
  rows, which cost nothing: the clock stands still).
* `token-RULE`, `loss-RULE`: the other routes. `token-falling`, `token-level`, `token-rising`: a sketch for Llama alone,
  in plain eager, on a GPU under torch.compile: each layer but the first and the last runs on tokens of its own, fewer
  or more from layer to layer.
* `loader`: every row of what `FilteredLoader` lets through, the hardest by a `NanoRouter` that was fitted to the losses
  of a reference model as that of `excess`; both cost nothing, the router's scores in the loop do.

`+depth=3:0.5:copy` trains the first 3 layers for half of the seconds, then the whole model, grown by "copy" (which is
the default), by "random" or, a sketch for Llama alone, by "zero": new layers are identities at first. It goes with
`all` and with rules, but not with `shuffled` and `oracle`. `+matmul` is `matmul="fp8"`, and goes with all but
`compile`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

import cggr_compile as cggr

RATIO, BATCH, RATE = 0.5, 32, 1.5e-3
"""Of an arm that does not say."""
SCORED_AT_ONCE = 16
"""Rows whose logits the oracle holds at a time."""

FILTERED = "loader"

_NUMBER = r"\d*\.?\d+(?:e-?\d+)?"
_FORM = re.compile(
    rf"(?P<name>[a-z-]+)(?:=(?P<layers>\d+))?(?:@(?P<ratio>{_NUMBER}))?(?:x(?P<batch>\d+))?(?:/(?P<rate>{_NUMBER}))?"
    rf"(?:\+depth=(?P<stages>\d+:{_NUMBER}(?:,\d+:{_NUMBER})*)(?::(?P<grow>copy|random|zero))?)?(?P<matmul>\+matmul)?"
)


def easiest(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The k lowest scores."""
    rows = scores.masked_fill(~valid, torch.inf).argsort()[:k].sort().values
    return rows, valid[rows].float()


PROFILES = {"falling": -1, "level": 0, "rising": 1}
"""Rules of the token route alone, and how the share of tokens goes through the layers."""
WHOLE = ("compile", "all", "small", "default")
SCORED_OUTSIDE = {"shuffled": "topk", "excess": "topk", "remembered": "trimmed", "oracle": "trimmed"}
"""Arms whose scores are given by `use_scores`, and the rule that selects by them."""
RULES: dict[str, Any] = {
    **{name: name for name in ("random", "topk", "trimmed", "stratified", "importance", "auto")},
    "easiest": easiest,
    **SCORED_OUTSIDE,
}


@dataclass(frozen=True)
class Depth:
    """Of each of the `stages`, how many of the first layers train, and until which share of the seconds is spent; new
    ones then start from what `grow` says."""

    stages: tuple[tuple[int, float], ...]
    grow: str


@dataclass(frozen=True)
class Arm:
    """An arm's parts: `layers` is that of a model which is small throughout, `rate` the peak learning rate."""

    name: str
    layers: int | None
    ratio: float
    batch: int
    rate: float
    depth: Depth | None
    matmul: bool = False

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The parts of an arm's name. Raises `typer.BadParameter`, which says what is wrong with it."""
        found = _FORM.fullmatch(text)
        if found is None:
            form = "NAME[@RATIO][xBATCH][/RATE][+depth=N:SHARE[,N:SHARE …][:GROW]][+matmul]"
            raise typer.BadParameter(f"arm: got {text!r}, expected {form}")
        part = found.groupdict()
        layers = int(part["layers"]) if part["layers"] else None
        depth = Depth(_stages(part["stages"]), part["grow"] or "copy") if part["stages"] else None
        ratio, rate = float(part["ratio"] or RATIO), float(part["rate"] or RATE)
        arm = cls(part["name"], layers, ratio, int(part["batch"] or BATCH), rate, depth, bool(part["matmul"]))
        if problem := arm._problem(ratio_given=part["ratio"] is not None):
            raise typer.BadParameter(f"arm: got {text!r}; {problem}")
        return arm

    @property
    def route_and_rule(self) -> tuple[str, str]:
        """What is routed, "" for rows, and the name of the rule."""
        route, _, rule = self.name.rpartition("-")
        return route, rule

    def _problem(self, ratio_given: bool) -> str | None:
        route, rule = self.route_and_rule
        rules = {"": RULES, "token": {**RULES, **PROFILES}, "loss": RULES}
        if self.name not in (*WHOLE, FILTERED) and rule not in rules.get(route, ()):
            return f"{self.name!r} is none of {', '.join((*WHOLE, FILTERED, *RULES))}, token-RULE, loss-RULE"
        if route and rule in SCORED_OUTSIDE:
            return f"{rule!r} gives scores of rows, and the {route} route selects tokens"
        if (self.name == "small") != (self.layers is not None) or self.layers == 0:
            return "a number of layers, at least 1, goes with 'small' and with nothing else: small=N"
        if ratio_given and self.name in WHOLE:
            return f"{self.name!r} takes no ratio"
        if not 0 < self.ratio <= 1 or self.batch < 1 or self.rate <= 0:
            return "the ratio is in (0, 1], the batch at least 1, the rate above 0"
        if rule in PROFILES and (self.depth or self.matmul):
            return "a sketch takes no +depth and no +matmul"
        if self.matmul and self.name == "compile":
            return "'compile' takes no +matmul, which is an option of this package"
        return self._problem_of_depth() if self.depth else None

    def _problem_of_depth(self) -> str | None:
        assert self.depth is not None
        if self.name in (*SCORED_OUTSIDE, FILTERED) or (self.name in WHOLE and self.name != "all"):
            return f"{self.name!r} takes no +depth; 'all' and the rules that score for themselves do"
        layers, shares = ([stage[part] for stage in self.depth.stages] for part in (0, 1))
        if layers[0] < 1 or not all(0 < share < 1 for share in shares):
            return "+depth=N:SHARE takes at least 1 layer and a share in (0, 1)"
        if layers != sorted({*layers}) or shares != sorted({*shares}):
            return "layers and shares of +depth=N:SHARE,N:SHARE rise"
        return None

    def options(self, on_gpu: bool) -> dict[str, Any]:
        """What `cggr.optimize` is given beside `cuda_graphs`."""
        return {**self._routing(on_gpu), **({"matmul": "fp8"} if self.matmul else {})}

    def _routing(self, on_gpu: bool) -> dict[str, Any]:
        if self.name == "default":
            return {}
        if self.name in (*WHOLE, FILTERED):
            return self._deep(()) or {"ratio": 1.0}
        route, rule = self.route_and_rule
        options = {"ratio": self.ratio, "selection": RULES[rule], "route": route or "sequence"}
        if rule not in ("random", "easiest") and on_gpu:
            options["router_head"] = "sampled"
        return {**options, **self._deep((options["route"],))}

    def _deep(self, routes: tuple[str, ...]) -> dict[str, Any]:
        if self.depth is None:
            return {}
        route = ("depth", *routes) if routes else "depth"
        layers = tuple(count for count, _ in self.depth.stages)
        return {
            "route": route,
            "depth_layers": layers,
            "depth_until": None,
            "grow": "copy" if self.depth.grow == "copy" else "random",
        }


def _stages(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (stage.split(":") for stage in text.split(","))
    return tuple((int(layers), float(share)) for layers, share in pairs)


class Batch(NamedTuple):
    """Rows int64 [B, S], their places [B] among those that train, and how many whole passes came before."""

    rows: Tensor
    places: Tensor
    passes: int


class Step:
    """Forward and backward of one step of an arm; `known` are losses [N] of the rows that train, by place."""

    def __init__(self, arm: Arm, model: nn.Module, device: torch.device, known: Tensor) -> None:
        self.model, self.name, self.device, self.known = model, arm.name, device, known
        self.forward: Callable[..., Any] = model
        if arm.name == "compile":
            self.forward = torch.compile(model)
        elif arm.route_and_rule[1] in PROFILES:
            draw_tokens_by_layer(model, arm.ratio, PROFILES[arm.route_and_rule[1]])
            if device.type == "cuda":
                self.forward = torch.compile(model)
        else:
            if arm.depth is not None and arm.depth.grow == "zero":
                for layer in model.model.layers[arm.depth.stages[0][0] :]:
                    nn.init.zeros_(layer.self_attn.o_proj.weight)
                    nn.init.zeros_(layer.mlp.down_proj.weight)
            cggr.optimize(model, cuda_graphs=device.type == "cuda", **arm.options(device.type == "cuda"))

    @property
    def has_free_scores(self) -> bool:
        """Whether `score_for_free` is to run before each step, with the clock stopped."""
        return self.name == "oracle"

    def score_for_free(self, rows: Tensor) -> None:
        """Lets the next step select by the losses of its rows under the whole model."""
        self.model.cggr.use_scores(row_losses(self.model, rows))

    def __call__(self, batch: Batch) -> None:
        rows = batch.rows
        if self.name in SCORED_OUTSIDE and not self.has_free_scores:
            self.model.cggr.use_scores(self._scores(batch))
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.forward(input_ids=rows, labels=rows).loss
        loss.backward()

    def _scores(self, batch: Batch) -> Tensor:
        if self.name == "remembered" and batch.passes % 2:
            return self.known[batch.places]
        with self._autocast():
            scores = self.model.cggr.score({"input_ids": batch.rows, "labels": batch.rows})
        if self.name == "shuffled":
            return scores[torch.randperm(len(scores), device=self.device)]
        if self.name == "excess":
            return scores - self.known[batch.places]
        self.known[batch.places] = scores
        return scores

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def draw_tokens_by_layer(model: nn.Module, ratio: float, slope: int) -> None:
    """Lets each layer of a Llama but the first and the last train on a share of the tokens of its own, drawn in each
    call: `ratio` on the mean; as `slope` says, the first have half as many more or less than that."""
    middle = model.model.layers[1:-1]
    reach = slope * min(ratio, 1 - ratio) / 2
    for place, layer in enumerate(middle):
        share = ratio + reach * (2 * place / (len(middle) - 1) - 1)
        layer.forward = partial(_on_drawn_tokens, layer.forward, share)


def _on_drawn_tokens(
    forward: Callable[..., Tensor], share: float, hidden: Tensor, position_embeddings: Any, **options: Any
) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(hidden, position_embeddings=position_embeddings, **options)
    length = hidden.shape[1]
    at = torch.randperm(length, device=hidden.device)[: round(share * length)].sort().values
    options |= {"attention_mask": None}  # causal among the drawn ones
    some = forward(hidden[:, at], position_embeddings=tuple(x[:, at] for x in position_embeddings), **options)
    return hidden.index_copy(1, at, some)


@torch.no_grad()
def row_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token loss fp32 [B] of rows int64 [B, S] under the whole model, by its plain forward."""
    losses = []
    for some in rows.split(SCORED_AT_ONCE):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=rows.device.type == "cuda"):
            logits = model(input_ids=some).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(some), -1).mean(1))
    return torch.cat(losses)
