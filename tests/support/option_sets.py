"""Option sets drawn over the whole table, and the eager step that each must equal.

A set starts from the defaults and changes a few options, so that most are legal; of several candidates the one with the
most pairs of values that no set had before is taken. The eager side computes logits, on the selected rows and tokens,
and the loss from them by definition; it takes from the step what was selected, and confirms it with an eager router
where no other head estimates the scores.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from typing import Any

import fp8_oracle
import oracle
import plans
import token_oracle
import torch
import torch.nn.functional as F
import transformers as T
from architectures import GROUPED, Architecture, eager_of
from cggr_compile.kernels.reference.selection import rule_of
from small import small
from torch import Tensor, nn

import cggr_compile as cggr
from cggr_compile.ir.program import Program
from cggr_compile.run import plan as route
from cggr_compile.schedule import kept_of

LLAMA = Architecture("llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)), "model.layers")
WARM = 4


def hardest(scores: Tensor, valid: Tensor, k: int, noise: Tensor, *, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """A user's rule."""
    rows = (scores + spread * noise).where(valid, -torch.inf).argsort(descending=True)[:k].sort().values
    return rows, valid[rows].float()


TABLE: dict[str, tuple[Any, ...]] = {
    "route": ("sequence", "token", "loss", ("sequence", "loss"), ("token", "loss")),
    "ratio": (0.5, 0.25, 0.8, 1.0),
    "router_layers": ("auto", 1, 2),
    "scoring": ("loss", "entropy", "margin", "combined"),
    "router_body": ("exact", "fp8"),
    "router_head": ("exact", "sampled", "fp8"),
    "router_head_frequent": (1024, 3),
    "router_head_sampled": (1024, 8),
    "selection": ("topk", "fixed_quota", "random", "trimmed", "stratified", "importance", "auto", hardest),
    "selection_scope": ("local", "global"),
    "selection_options": (None, {"tau": 0.2}, {"num_strata": 2}, {"floor": 0.5}, {"spread": 0.3}),
    "warmup_steps": (0, WARM),
    "dynamic_threshold": (False, True),
    "threshold_sensitivity": (0.5, 1.0),
    "dense_after_steps": (None, WARM + 1, 20),
    "first_layers": (1, 2),
    "last_layers": (1, 0),
    "resample": ("block", "layer"),
    "matmul": ("exact", "fp8"),
    "inner": ("eager", "aot_eager"),
    "outline_layers": ("auto", True),
    "recompute_elementwise": (False, True),
    "kernels": ("auto", "reference"),
    "keep_logits": (False, True),
    "prediction_metrics": (False, True),
    "seed": (None, 3),
}
"""Every option that changes a step on the CPU, the default first."""


def option_sets(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """That many option sets, legal or not."""
    draw, seen = random.Random(seed), set()
    for _ in range(number):
        candidates = [_drawn(draw) for _ in range(40)]
        if draw.random() < 0.85:
            candidates = [options for options in candidates if legal(options)]
        best = max(candidates, key=lambda options: len(_pairs(options) - seen))
        seen |= _pairs(best)
        yield best


def _drawn(draw: random.Random) -> dict[str, Any]:
    changed = draw.sample(sorted(TABLE), draw.randint(2, 8))
    options = {name: draw.choice(TABLE[name]) for name in sorted({"route", "selection", *changed})}
    owner = {"tau": "trimmed", "num_strata": "stratified", "floor": "importance", "spread": hardest}
    for name in options.get("selection_options") or ():  # mostly the options of the rule that is drawn
        if draw.random() < 0.9:
            options["selection"] = owner[name]
    if options["selection"] in ("stratified", "importance") and "loss" in options["route"]:
        # The tokens' weights are confirmed by an eager router, which no other body or head is.
        options = {name: value for name, value in options.items() if name not in ("router_body", "router_head")}
    return options


def _pairs(options: Mapping[str, Any]) -> set[Any]:
    return set(combinations(sorted((name, str(value)) for name, value in options.items()), 2))


def batches(words: int) -> list[dict[str, Tensor]]:
    """All labels, completions only, and rows without any; the last two padded."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for kind in ("all", "completion", "some rows"):
        ids = torch.randint(3, words, (7, 10), generator=generator)
        labels, place = ids.clone(), torch.arange(10).expand(7, 10)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if kind != "all":
            padding = place >= 10 - torch.randint(1, 4, (7, 1), generator=generator)
            batch["attention_mask"][padding] = 0
            labels[padding] = -100
        if kind == "completion":
            labels[place < torch.randint(3, 10, (7, 1), generator=generator)] = -100
        if kind == "some rows":
            labels[torch.tensor([0, 2, 3, 6])] = -100
        found.append(batch)
    return found


@dataclasses.dataclass(frozen=True)
class Family:
    """A model with its capture; `router(model, n, inputs)` are the logits of its first n layers,
    `shortened(model, kept)` is the model with layers on the positions `kept`, by their number."""

    model: nn.Module
    program: Program
    layers: int
    router: Callable[[nn.Module, int, dict[str, Tensor]], Tensor]
    shortened: Callable[[nn.Module, Mapping[int, Tensor]], nn.Module]


class _Kept(nn.Module):
    """A `Small` whose layers run on the given positions."""

    def __init__(self, model: nn.Module, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.model, self.kept = model, kept

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs, kept=self.kept)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters(*args, **kwargs)


def _llama_shortened(model: nn.Module, kept: Mapping[int, Tensor]) -> nn.Module:
    for layer, positions in kept.items():
        model = token_oracle.shortened(model, LLAMA, range(layer, layer + 1), positions)
    return model


@cache
def little() -> Family:
    """A small model of four layers."""
    model = small(layers=4)

    def router(model: nn.Module, layers: int, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, stop=layers).logits

    return Family(model, plans.captured(model, batches(31)[1]), 4, router, _Kept)


@cache
def llama() -> Family:
    """A Llama of three layers."""
    model = eager_of(LLAMA)

    def router(model: nn.Module, layers: int, inputs: dict[str, Tensor]) -> Tensor:
        return oracle.truncated(model, LLAMA, layers)(**inputs).logits

    return Family(model, plans.captured(model, batches(97)[1]), 3, router, _llama_shortened)


FAMILIES: dict[str, Callable[[], Family]] = {"small": little, "llama": llama}


def check(family: Family, options: Mapping[str, Any]) -> str:
    """Steps of one option set against eager: "equal", or the first line of the error that refused it.

    Raises AssertionError where a step differs, and whatever else a step raises.
    """
    try:
        routed = plans.Routed(copy.deepcopy(family.model), family.program, **options)
    except (cggr.ConfigError, cggr.CannotOptimize) as error:
        line = str(error).splitlines()[0]
        assert len(line) > 30, f"an error without a reason: {line}"
        return f"{type(error).__name__}: {line}"
    with _noise_seen() as noise:
        for steps in (0, WARM + 8):
            routed.runtime.steps = steps
            for batch in batches(routed.model.config.vocab_size):
                noise.clear()
                _check_step(family, routed, batch, noise)
    return "equal"


@contextmanager
def _noise_seen() -> Iterator[list[Tensor]]:
    """What a step draws, in order."""
    seen: list[Tensor] = []
    original = route.uniform_noise

    def drawn(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    route.uniform_noise = drawn
    try:
        yield seen
    finally:
        route.uniform_noise = original


def _check_step(family: Family, routed: plans.Routed, batch: dict[str, Tensor], noise: list[Tensor]) -> None:
    config = routed.runtime.in_force
    loss, gradients = routed.step(batch)
    gradients = {name: None if g is None else g.clone() for name, g in gradients.items()}
    found = routed.selected if isinstance(routed.selected, tuple) else (routed.selected,)
    kept = dict(zip(config.routes, found, strict=True))
    weighed = routed.runtime.last.found.weights
    if isinstance(weighed, Tensor):  # a row of weight 0 only fills up
        valid = int((_targets(batch) != -100).any(1).sum())
        assert int((weighed > 0).sum()) == min(len(weighed), valid)
        kept["sequence"] = kept["sequence"][weighed > 0]
    eager = copy.deepcopy(routed.model)
    _confirm(family, config, eager, batch, kept)
    rows = kept["sequence"] if "sequence" in kept else torch.arange(len(batch["input_ids"]))
    weights = _weights(family, routed, eager, batch, kept, noise)
    positions = _by_layer(family, config, kept, batch["input_ids"].shape[1])
    if positions:
        eager = family.shortened(eager, positions)
    if config.matmul == "fp8":
        eager = fp8_oracle.in_float8(eager)
    eager.zero_grad(set_to_none=True)
    logits = eager(**{name: tensor[rows] for name, tensor in batch.items() if name != "labels"}).logits
    expected = _loss(logits, _targets(batch), rows, kept, weights, config)
    expected.backward()
    found = loss, gradients, expected.detach(), token_oracle.renamed(oracle.gradients(eager))
    if config.matmul == "fp8":  # sums of another order tip over roundings, each by half a step
        oracle.assert_step_within(2**-4, *found)
    else:
        oracle.assert_same_step(*found, rtol=2e-4, atol=2e-6)


def _by_layer(family: Family, config: cggr.RoutingConfig, kept: Mapping[str, Tensor], length: int) -> dict[int, Tensor]:
    """The positions of the middle layers, by layer; empty where all are kept."""
    if "token" not in kept or kept["token"].shape[-1] == length:
        return {}
    middle = range(config.first_layers, family.layers - config.last_layers)
    each = kept["token"] if kept["token"].dim() == 3 else [kept["token"]] * len(middle)
    return dict(zip(middle, each, strict=True))


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    return F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]


def _loss(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    kept: Mapping[str, Tensor],
    weights: Tensor | None,
    config: cggr.RoutingConfig,
) -> Tensor:
    """The loss by definition: the kept tokens' mean, or the estimate of the batch's that the rule's weights make."""
    counted = targets != -100
    losses = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="none").view(len(rows), -1)
    if weights is None:
        mask = kept.get("loss", counted)[rows]
        return (losses * mask).sum() / mask.sum().clamp(min=1)
    weights = weights[rows]
    if config.selection == "importance":
        return (losses * weights).sum() / counted.sum().clamp(min=1)
    return (losses * weights).sum() / (weights.sum() if weights.any() else 1)


@torch.no_grad()
def _weights(
    family: Family,
    routed: plans.Routed,
    eager: nn.Module,
    batch: dict[str, Tensor],
    kept: Mapping[str, Tensor],
    noise: list[Tensor],
) -> Tensor | None:
    """The weight of every token [B, S], 0 where it does not count; None where all that count do so alike.

    Rows' weights are those of the step; tokens' come from the rule itself, run on an eager router's scores and the
    noise of the step.
    """
    config = routed.runtime.in_force
    if rule_of(config.selection).weighting == "none" or not noise:
        return None
    counted = (_targets(batch) != -100).float()
    found = counted.clone()
    rows = torch.arange(len(counted))
    if "sequence" in kept:
        last = routed.runtime.last.found
        rows = last.rows
        of_rows = torch.ones(len(rows)) if last.weights is None else last.weights  # None where a warm-up keeps all
        found *= torch.zeros(len(counted)).scatter_reduce(0, rows, of_rows, "amax").unsqueeze(1)
    if "loss" in kept:
        scores = _token_scores(family, config, eager, batch)[rows]
        valid = counted[rows].bool()
        if "sequence" in kept:  # a row that only fills up has no token
            valid &= (of_rows > 0).unsqueeze(1)
        k = kept_of(config.kept_fraction(routed.runtime.steps), valid.numel())
        rule, options = rule_of(config.selection), config.selection_options or {}
        index, weight = rule.function(scores.flatten(), valid.flatten(), k, noise[-1], **options)
        own = torch.zeros(valid.numel()).scatter_reduce(0, index, weight, "amax").view(valid.shape)
        if config.selection == "importance":
            own *= valid.sum()
        found *= torch.zeros_like(found).index_add(0, rows, own)
    return found


def _token_scores(family: Family, config: cggr.RoutingConfig, eager: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    layers = max(2, family.layers // 8) if config.router_layers == "auto" else config.router_layers
    with torch.no_grad():
        logits = family.router(eager, layers, inputs)
    return oracle.token_scores(logits, batch["labels"], config.scoring, causal=True)


def _confirm(
    family: Family,
    config: cggr.RoutingConfig,
    eager: nn.Module,
    batch: dict[str, Tensor],
    kept: Mapping[str, Tensor],
) -> None:
    """What was selected counts; with topk and exact scores, it is the hardest."""
    counted = _targets(batch) != -100
    exact = config.selection in ("topk", "fixed_quota") and config.router_head == config.router_body == "exact"
    if "sequence" in kept and len(kept["sequence"]) < len(counted):
        rows = kept["sequence"]
        assert len(rows.unique()) == len(rows)
        assert counted[rows].any(1).all()
        if exact:
            scores = _token_scores(family, config, eager, batch).sum(1) / counted.sum(1).clamp(min=1)
            assert rows.tolist() == _best(scores, counted.any(1), len(rows))
    if "loss" in kept:
        assert not (kept["loss"] & ~counted).any()
    if kept.keys() == {"loss"} and exact:
        scores = _token_scores(family, config, eager, batch)
        chosen = kept["loss"].flatten().nonzero().flatten().tolist()
        assert chosen == _best(scores.flatten(), counted.flatten(), len(chosen))
    for positions in kept["token"].flatten(0, -2) if "token" in kept else ():
        assert len(positions.unique()) == len(positions)


def _best(scores: Tensor, of: Tensor, number: int) -> list[int]:
    places = of.nonzero().flatten().tolist()
    return sorted(sorted(places, key=lambda place: (-scores[place].item(), place))[:number])


def legal(options: Mapping[str, Any]) -> bool:
    """Whether the configuration itself takes the options."""
    try:
        cggr.RoutingConfig(**options)
    except cggr.ConfigError:
        return False
    return True
