"""What happens at each step: how many rows are kept, which compiled variant runs, what is remembered for the user.

The number of rows comes from shapes, the curriculum from a Python counter; selections and scores stay on the device
until somebody asks. Two options read tensors back: the dynamic threshold one number of the step before (`confidence`),
and `selection="auto"` what its probes measure, in the steps that probe (`probe`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from cggr_compile.capture.branches import Branches
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.amounts import KEPT, Amount, Symbols, amounts_of, concrete, sizes_of
from cggr_compile.ir.program import Program, callers_region, is_tensor, value
from cggr_compile.ir.router_head import Basis
from cggr_compile.kernels.reference.selection import rule_name
from cggr_compile.passes.pipeline import Pass, passes_for, passes_scores, passes_unrouted, routable, run
from cggr_compile.passes.rewrite.score_rows import token_ids
from cggr_compile.passes.rewrite.take_scores import GIVEN_SCORES
from cggr_compile.run.auto import Probe, break_even
from cggr_compile.run.confidence import Confidence
from cggr_compile.run.given_scores import GivenScores, ScoresReady
from cggr_compile.run.graph_memory import Pool
from cggr_compile.run.inner import resolve_inner
from cggr_compile.run.metrics import Gradients
from cggr_compile.run.not_computed import NOT_COMPUTED
from cggr_compile.run.recomputed import Given, Recomputations, beside_checkpoints
from cggr_compile.run.router_time import RouterTime
from cggr_compile.run.variant import Variant
from cggr_compile.torch_internals import autograd

EXTRA_OUTPUTS = ("rows", "weights", "scores", "counts", "basis_image", "confidence", "positions", "loss_mask")


class Runtime:
    """State of one optimised model: configuration, optimiser steps done, last selection and confidence, router head,
    plans so far."""

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self.seed = config.seed if config.seed is not None else torch.initial_seed() % 2**63
        self.steps = 0
        self.runs = 0  # of plans, recomputations too
        self.plans: list[Plan] = []
        self.passive: list[str] = []
        self.last: dict[str, torch.Tensor | float | None] = {}
        self.confidence = Confidence()
        self.gradients = Gradients()
        self.router_time = RouterTime()
        self.given = GivenScores()
        self.basis = Basis(config.router_head_refresh)
        self.pool: Pool | None = None
        self.probe = Probe(config) if config.selection == "auto" else None
        self.recomputations = Recomputations()
        # Two threads on one model take turns; what a step draws and leaves belongs together.
        self.lock = threading.RLock()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._generator_states: dict[str, bytes] = {}
        self._warned = False

    @property
    def in_force(self) -> RoutingConfig:
        """The configuration that steps run under: `config`, with the selection that `"auto"` stands for."""
        return self.config if self.probe is None else self.probe.in_force

    def refuse(self, error: CannotOptimize) -> None:
        """Raises `error`, or, with `fallback="eager"`, warns once and records it as the reason for not routing.
        A backward that runs a routed step again cannot fall back."""
        if self.config.fallback == "raise" or self.recomputations.may_be_routed():
            raise error
        if not self._warned:
            warnings.warn(f"training without routing: {error}", RuntimeWarning, stacklevel=5)
            self._warned = True
        if str(error) not in self.passive:
            self.passive.append(str(error))

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of selections and router heads, seeded by `config.seed` or by torch's seed when the model was
        optimised."""
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(self.seed)
            if str(device) in self._generator_states:
                generator.set_state(_tensor_of(self._generator_states[str(device)]))
            self._generators[device] = generator
        return self._generators[device]

    def graphs_on(self, device: torch.device) -> Pool | None:
        """The memory that this model's CUDA graphs share, or None where they are off or there is no CUDA."""
        if self.config.cuda_graphs and self.pool is None:
            if device.type == "cuda":
                self.pool = Pool()
            else:
                warnings.warn(
                    f"running without CUDA graphs: the model is on {device.type}", RuntimeWarning, stacklevel=2
                )
        return self.pool

    def state_dict(self) -> dict[str, Any]:
        """Steps, seed, generators, basis, confidence and the probe's findings: tensors, numbers, strings and bytes
        only. (A generator's state is bytes: a tensor that is made for a pickle does not live until a spawned process
        opens it.)"""
        states = {str(device): _bytes_of(generator.get_state()) for device, generator in self._generators.items()}
        return {
            "steps": self.steps,
            "seed": self.seed,
            "generators": {**self._generator_states, **states},
            "basis": self.basis.state_dict(),
            "confidence": self.confidence.last(),
            **({} if self.probe is None else {"probe": self.probe.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; ValueError for other entries."""
        expected = {"steps", "seed", "generators", "basis", "confidence"}
        expected |= {"probe"} if self.probe is not None else set()
        if set(state) != expected:
            raise ValueError(f"the state of a routed model has entries {sorted(expected)}, got {sorted(state)}")
        self.steps, self.seed = state["steps"], state["seed"]
        self._generators = {}
        self._generator_states = dict(state["generators"])
        self.basis.load_state_dict(state["basis"])
        self.confidence = Confidence(state["confidence"])
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])

    def start_over(self) -> None:
        """Begins the schedule anew: warm-up and probes. What goes by the weights stays (basis, confidence), and the
        generator draws on."""
        self.steps = 0
        if self.probe is not None:
            self.probe = Probe(self.config)

    def __getstate__(self) -> dict[str, Any]:
        """Configuration and state; compiled plans are rebuilt by the first step of the copy."""
        return {"config": self.config, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self.load_state_dict(state["state"])


def _bytes_of(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor_of(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


class Plan:
    """One capture: its routed programs, the unrouted one, and the code that runs them. Called by Dynamo's frame."""

    def __init__(self, captured: Program, runtime: Runtime) -> None:
        self.captured = captured
        self.runtime = runtime
        guards = len(captured.shape_env.guards)
        self.routable = routable(captured, runtime.config)
        self.routes: dict[str, Route] = {}
        if runtime.probe is not None:
            # Both now: what cannot be routed by scores is refused at once, and passes read the caller's autocast.
            for config in runtime.probe.choices:
                self.routed(config)
        self.device, self.inner = self.route.device, self.route.variant.inner
        # What passes went by beside the capture, and whether they made its guards stricter: no other capture has these.
        self.autocast = callers_region(self.device.type)
        self.guarded = len(captured.shape_env.guards) > guards
        self._unrouted: Variant | None = None if self.routable else self.route.variant
        self._ids = captured.placeholders.index(token_ids(captured))
        self._symbols = Symbols(captured)
        self.branches = Branches(captured)
        self._tensors = [is_tensor(out) for out in captured.outputs]
        if not self.routable and runtime.config.ratio < 1:
            warnings.warn(
                "a batch of one row leaves no rows to choose from, and trains as it is; raise the batch size, or route "
                "tokens (route='token')",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def route(self) -> Route:
        """The routed program in force."""
        return self.routed(self.runtime.in_force)

    @property
    def program(self) -> Program:
        """The rewritten program in force."""
        return self.route.program

    def routed(self, config: RoutingConfig) -> Route:
        """The program that trains under a configuration; it is the unrouted one where the batch has one row."""
        passes = passes_for(config) if self.routable else passes_unrouted(config)
        return self._derived(rule_name(config.selection), config, passes, trains=True)

    def with_scores(self, config: RoutingConfig) -> Route:
        """The program that trains under a configuration on rows whose scores are an input."""
        name = f"{rule_name(config.selection)}, scores given"
        return self._derived(name, config, passes_for(config, scores_given=True), trains=True)

    def scoring(self, name: str, config: RoutingConfig) -> Route:
        """The program of the rows' scores alone, under a configuration."""
        return self._derived(name, config, passes_scores(config), trains=False)

    def row_scores(
        self, inputs: Sequence[Any], config: RoutingConfig, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's score and the counted labels of every row of a call, both [B].

        A low-rank router head is scored with after its basis has been refreshed once, not with the random one it starts
        with.
        """
        basis = self.runtime.basis
        route = self.scoring("router scores", config)
        while True:
            scores, counts, image = route.variant(*inputs, *route.added_inputs({}, {}, basis, generator))
            fresh = basis.updates == 0
            if image is not None:
                basis.update(image)
            if image is None or not fresh:
                return scores, counts

    def _derived(self, name: str, config: RoutingConfig, passes: Sequence[Pass], trains: bool) -> Route:
        """What the passes make of this capture, built when `name` is first asked for."""
        if name not in self.routes:
            self.routes[name] = Route(run(self.captured, config, passes), self.runtime, trains)
        return self.routes[name]

    @property
    def unrouted(self) -> Variant:
        """The program without router and selection, built when a step first keeps every row."""
        if self._unrouted is None:
            config = self.runtime.in_force
            plain = run(self.captured, config, passes_unrouted(config))
            graphs = self.runtime.graphs_on(self.device)
            self._unrouted = Variant(plain, self.inner, graphs, config.outlines, config.recompute_elementwise)
        return self._unrouted

    @cached_property
    def break_even(self) -> float:
        """ω: what a step on rows chosen by score must be worth, in steps on equally many random rows."""
        return break_even(self)

    def sizes(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Batch size and sequence length of a call."""
        rows, length = inputs[self._ids].shape
        return rows, length

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with self.runtime.lock:
            self.runtime.runs += 1
            again = self.runtime.recomputations.again(self)
            if again is not None:
                return self._returned(self._outputs(again, inputs))
            if self.runtime.given.wanted:
                config, generator = self.runtime.in_force, self.runtime.generator(self.device)
                raise ScoresReady(self.row_scores(inputs, config, generator)[0])
            return self._step(inputs)

    def _step(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """One training step: what it is given, its outputs, and what is remembered of it."""
        if self.runtime.probe is not None:
            with beside_checkpoints():
                self.runtime.probe.before_step(self, inputs)
        self.runtime.router_time.before_step(self, inputs, self.runtime.in_force)
        rows, length = self.sizes(inputs)
        config, steps = self.runtime.config, self.runtime.steps
        confidence = self.runtime.confidence.last() if config.follows_confidence else None
        amounts = amounts_of(self.program, config, steps, rows, length, confidence)
        given = self._given(inputs, amounts, confidence)
        self.runtime.recomputations.remember(given)
        outputs = self._outputs(given, inputs)
        self.runtime.given.after_forward(self.device.type)
        extra = outputs[-len(EXTRA_OUTPUTS) :]
        self.runtime.last = {
            "total": rows,
            "length": length,
            "kept": amounts["sequence"].kept if "sequence" in amounts else rows,
            "fraction": config.kept_fraction(steps, confidence),
            **dict(zip(EXTRA_OUTPUTS, extra, strict=True)),
        }
        image, measured = self.runtime.last.pop("basis_image"), self.runtime.last["confidence"]
        if isinstance(image, torch.Tensor):
            self.runtime.basis.update(image)
        if isinstance(measured, torch.Tensor):
            self.runtime.confidence.measured(measured)
        if self.runtime.last["rows"] is None:
            self.runtime.last["rows"] = torch.arange(rows, device=self.device)
        if self.runtime.last["positions"] is None and "token" in amounts:
            self.runtime.last["positions"] = torch.arange(length, device=self.device).expand(rows, length)
        return self._returned(outputs)

    def _given(self, inputs: Sequence[Any], amounts: Mapping[str, Amount], confidence: float | None) -> Given:
        """The code that a step runs and what it is given beside the batch."""
        rows, length = self.sizes(inputs)
        scores = self.runtime.given.take(rows, self.device)
        config, steps = self.runtime.config, self.runtime.steps
        # Where only the threshold keeps every row the router still runs: nothing else would lower k again.
        planned = amounts if confidence is None else amounts_of(self.program, config, steps, rows, length)
        if not self.routable or all(amount.kept >= amount.total for amount in planned.values()):
            return Given(self, self.unrouted, ())
        route = self.route if scores is None else self.with_scores(self.runtime.in_force)
        sizes = sizes_of(route.program, rows, length, amounts)
        self.branches.refuse_other_side(route.program.layers, self._symbols.of(inputs), amounts)
        generator = self.runtime.generator(self.device)
        added = route.added_inputs(sizes, amounts, self.runtime.basis, generator, scores)
        return Given(self, route.variant, tuple(added))

    def _outputs(self, given: Given, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        with autograd.modes_kept(self.device.type):
            return given.variant(*inputs, *given.added)

    def _returned(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The captured graph's outputs, of a step's: tensors that it does not compute say so."""
        pairs = zip(outputs, self._tensors, strict=False)
        return tuple(NOT_COMPUTED if out is None and wanted else out for out, wanted in pairs)


class Route:
    """One program made of a capture, and the code that runs it."""

    def __init__(self, program: Program, runtime: Runtime, trains: bool) -> None:
        assert program.head is not None
        self.program = program
        self.device = value(program.head.weight).device
        inner = resolve_inner(runtime.config.inner, self.device)
        # What has no backward runs rarely, and a CUDA graph records a backward.
        graphs = runtime.graphs_on(self.device) if trains else None
        outlined, recompute = trains and runtime.config.outlines, runtime.config.recompute_elementwise
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
        basis: Basis,
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
            elif name == "basis":
                width, rank = shape
                yield basis.on(width, rank, generator)
            elif name == GIVEN_SCORES:
                yield scores
            else:
                yield uniform_noise([concrete(size, sizes) for size in shape], self.device, generator)


def uniform_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """fp32 noise in [0, 1) for selections and router heads."""
    return torch.rand(shape, dtype=torch.float32, device=device, generator=generator)
