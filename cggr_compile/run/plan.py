"""One capture: the programs that passes make of it, and the code that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from cggr_compile.capture.branches import Branches
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, Refusal, warn
from cggr_compile.ir import cost
from cggr_compile.ir.amounts import KEPT, Amount, Symbols, concrete
from cggr_compile.ir.documents import POSITIONS
from cggr_compile.ir.program import Analysed, Program, callers_region, is_tensor, value
from cggr_compile.ir.roles import PADDING, ranks_of, router_layers, token_ids
from cggr_compile.kernels.reference.selection import rule_name
from cggr_compile.passes.pipeline import (
    Pass,
    analyse,
    keeps_less,
    passes_for,
    passes_scores,
    passes_unpadded,
    passes_unrouted,
    routable,
    run,
    truncated,
)
from cggr_compile.passes.rewrite.take_scores import GIVEN_SCORES
from cggr_compile.passes.rewrite.varlen import VARLEN
from cggr_compile.run.graph_memory import Pool
from cggr_compile.run.growth import Copies
from cggr_compile.run.inner import resolve_inner
from cggr_compile.run.notices import notice
from cggr_compile.run.packing import Packing
from cggr_compile.run.unpadding import MOST, Unpadding
from cggr_compile.run.variant import Variant


class Owner(Protocol):
    """What a plan asks of the runtime that it belongs to."""

    config: RoutingConfig

    @property
    def model(self) -> nn.Module | None:
        """The model, where it is known."""

    @property
    def in_force(self) -> RoutingConfig:
        """The configuration that steps run under now."""

    @property
    def choices(self) -> tuple[RoutingConfig, ...]:
        """Every configuration that steps may run under."""

    @property
    def growths(self) -> int:
        """How often the model has grown."""

    def graphs_on(self, device: torch.device) -> Pool | None:
        """The memory of CUDA graphs, where they are wanted."""


class Plan:
    """One capture: what was found in it once, its routed programs, the unrouted one, and the code that runs them.

    `stages` are the plans of the same capture's first layers, where these train alone at first; `copies[i]` is what the
    growth after the i-th copies, if anything.
    """

    def __init__(self, captured: Program, owner: Owner, analysed: Analysed | None = None) -> None:
        self.captured = captured
        self.owner = owner
        guards = len(captured.shape_env.guards)
        self.routable = routable(captured, owner.config)
        self.analysed = analyse(captured, owner.config) if analysed is None else analysed
        self.routes: dict[str, Route] = {}
        self.unscorable: CannotOptimize | None = None
        # Now: what cannot be routed is refused at once, and passes read the caller's autocast.
        self.device, self.inner = self.route.device, self.route.variant.inner
        # What passes went by beside the capture, and whether they made its guards stricter: no other capture has these.
        self.autocast = callers_region(self.device.type)
        self.guarded = len(captured.shape_env.guards) > guards
        self.symbols = Symbols(captured)
        self.branches = Branches(captured)
        self.tensors = [is_tensor(out) for out in captured.outputs]
        self._ids = captured.placeholders.index(token_ids(captured))
        self.prepared = self.prepared_auto = False
        counts = [count for count, _ in owner.config.stages] if analysed is None else []
        self.stages = [Plan(captured, owner, truncated(self.analysed, owner.config, count)) for count in counts]
        self.copies: list[Copies] = []
        if owner.config.grow == "copy":
            grown = [*self.stages, self][1:]
            pairs = zip(grown, counts, strict=True)
            self.copies = [Copies(plan.analysed, count, owner.model) for plan, count in pairs]
        if self.stages:
            return
        if not self.routable and keeps_less(owner.in_force):
            warn(
                "a batch of one row leaves no rows to choose from, and trains as it is; raise the batch size, or route "
                "tokens (route='token')"
            )

    @property
    def in_force(self) -> Plan:
        """The plan of the layers that train now."""
        return self.to_come[0]

    @property
    def to_come(self) -> list[Plan]:
        """The plan in force and those that follow when the model grows."""
        return [*self.stages[self.owner.growths :], self]

    def can_select(self, config: RoutingConfig) -> bool:
        """Whether steps could select rows under a configuration of `"auto"`; makes the program if it is the first to
        ask."""
        if self.routable:
            self.routed(config)
        return self.routable and self.unscorable is None

    @property
    def selects(self) -> bool:
        """Whether steps select anything under the configuration in force."""
        return self.routable and self.unscorable is None and keeps_less(self.owner.in_force)

    @property
    def unrouted_because(self) -> str:
        """Why steps select nothing."""
        one_row = not self.routable and keeps_less(self.owner.in_force)
        return "the captured batch has one row" if one_row else "everything is kept"

    @property
    def route(self) -> Route:
        """The routed program in force."""
        return self.routed(self.owner.in_force)

    @property
    def program(self) -> Analysed:
        """The rewritten program in force."""
        return self.route.program

    def routed(self, config: RoutingConfig) -> Route:
        """The program that trains under a configuration; it is the unrouted one where nothing is selected.

        Where `"auto"` could not select, it goes on keeping every row, and `unscorable` says why.
        """
        if self.routable and self.unscorable is None and keeps_less(config):
            try:
                return self._derived(_name(config), config, passes_for(config), trains=True)
            except CannotOptimize as error:
                if len(self.owner.choices) == 1:
                    raise
                self.unscorable = error
                notice(f"every row goes on training: {error}", alike=False)
        return self.whole

    @property
    def whole(self) -> Route:
        """The program without router and selection; of `"auto"`, the one that puts out the rows' losses."""
        config = self.owner.choices[0]
        return self._derived("unrouted", config, passes_unrouted(config), trains=True)

    def with_scores(self, config: RoutingConfig) -> Route:
        """The program that trains under a configuration on rows whose scores are an input."""
        name = f"{_name(config)}, scores given"
        return self._derived(name, config, passes_for(config, scores_given=True), trains=True)

    def scoring(self, name: str, config: RoutingConfig) -> Route:
        """The program of the rows' scores alone, under a configuration."""
        return self._derived(name, config, passes_scores(config), trains=False)

    def row_scores(
        self, inputs: Sequence[Any], config: RoutingConfig, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's score and the counted labels of every row of a call, both [B]."""
        route = self.scoring("router scores", config)
        scores, counts = route.variant(*inputs, *route.added_inputs({}, {}, generator))
        return scores, counts

    def _derived(self, name: str, config: RoutingConfig, passes: Sequence[Pass], trains: bool) -> Route:
        """What the passes make of this capture, built when `name` is first asked for."""
        if name not in self.routes:
            self.routes[name] = Route(run(self.analysed, config, passes), self.owner, trains)
        return self.routes[name]

    @property
    def unrouted(self) -> Variant:
        """The program without router and selection, built when a step first keeps every row."""
        return self.whole.variant

    @cached_property
    def unpadded(self) -> Unpadded | Refusal:
        """The program that leaves out what no token sees: padding, or attention between documents; or why there is
        none."""
        config = self.owner.config
        if not config.unpad:
            return Refusal("off")
        if keeps_less(config) or len(self.owner.choices) > 1 or "loss" in config.routes:
            return Refusal("for steps on every row and every token only")
        paths = {entry.path for entry in self.captured.inputs}
        padded = PADDING in paths
        if not padded and POSITIONS not in paths:
            return Refusal("there is no attention_mask, and no position_ids")
        if padded and not isinstance(self.captured.batch, torch.SymInt):
            return Refusal("the captured batch has one row")
        if config.unpad == "auto" and self.device.type != "cuda":
            return Refusal("attention of variable lengths needs CUDA")
        try:
            route = self._derived("unpadded", config, passes_unpadded(config, padded), trains=True)
        except CannotOptimize as error:
            if config.unpad is True and padded:
                raise
            return Refusal(error.reason)
        varlen = len(route.program.graph.find_nodes(op="call_function", target=VARLEN))
        if not padded:
            return Unpadded(route, Packing(self.analysed), varlen)
        if config.unpad == "auto" and not varlen:
            return Refusal("no attention of variable lengths: it needs bfloat16 or float16")
        most = MOST if config.unpad == "auto" else 1.0
        return Unpadded(route, Unpadding(self.analysed, most, behind=config.padding == "right"), varlen)

    @property
    def variants(self) -> dict[str, Variant]:
        """Everything that was lowered so far, by the name of its selection; `unrouted` where nothing is selected."""
        return {name: route.variant for name, route in self.routes.items()}

    @cached_property
    def break_even(self) -> float:
        """ω: what a step on rows chosen by score must be worth, in steps on equally many random rows."""
        config = self.owner.config
        layers = router_layers(config, len(self.analysed.stack))
        return cost.predict(self.analysed, layers, config.ratio, config).break_even

    def sizes(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Batch size and sequence length of a call."""
        rows, length = inputs[self._ids].shape
        return rows, length


def _name(config: RoutingConfig) -> str:
    """What the programs of a configuration are told apart by: the selection, and of which ranks' rows."""
    ranks = ranks_of(config)
    return rule_name(config.selection) + ("" if ranks is None else f" of {ranks}")


class Unpadded(NamedTuple):
    """The program that leaves out what no token sees, what it is given of a batch, and how many attentions are of
    variable lengths."""

    route: Route
    batch: Unpadding | Packing
    varlen: int


class Route:
    """One program made of a capture, and the code that runs it."""

    def __init__(self, program: Analysed, owner: Owner, trains: bool) -> None:
        self.program = program
        self.device = value(program.head.weight).device
        inner = resolve_inner(owner.config.inner, self.device)
        # What has no backward runs rarely, and a CUDA graph records a backward.
        graphs = owner.graphs_on(self.device) if trains else None
        outlined, recompute = trains and owner.config.outlines, owner.config.recompute_elementwise
        self.variant = Variant(program, inner, graphs, outlined, recompute)
        inputs = zip(program.placeholders, program.inputs, strict=True)
        self._added = [
            (entry.name, [program.expression(size) for size in getattr(value(node), "shape", ())])
            for node, entry in inputs
            if entry.kind == "added"
        ]

    def added_inputs(
        self,
        sizes: Mapping[Any, int],
        amounts: Mapping[str, Amount],
        generator: torch.Generator,
        scores: torch.Tensor | None = None,
    ) -> Iterator[Any]:
        """What the passes' own inputs get in one step, in their order; noise is uniform fp32 from the generator.

        `sizes` are those of the program's symbols (`sizes_of`), `amounts` what each route keeps, `scores` those of the
        rows where they are given.
        """
        kept = {KEPT[route]: amount.kept for route, amount in amounts.items()}
        for name, shape in self._added:
            if name in kept:
                yield kept[name]
            elif name == GIVEN_SCORES:
                yield scores
            else:
                numbers = [concrete(size, sizes) for size in shape]
                yield (
                    self._of_rows(numbers, generator)
                    if name == "noise"
                    else uniform_noise(numbers, self.device, generator)
                )

    def _of_rows(self, shape: list[int], generator: torch.Generator) -> torch.Tensor:
        """The rows' noise. Ranks that select together may have one seed: each draws for all, and takes its part."""
        ranks = self.program.routing.ranks
        if ranks is None:
            return uniform_noise(shape, self.device, generator)
        return uniform_noise([ranks.count, *shape], self.device, generator)[ranks.rank]


def uniform_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """fp32 noise in [0, 1) for selections and router heads."""
    return torch.rand(shape, dtype=torch.float32, device=device, generator=generator)
