"""The state of one optimised model, from step to step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import nn

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, warn
from cggr_compile.passes.pipeline import keeps_less
from cggr_compile.run.agreement import of_all_ranks
from cggr_compile.run.auto import Auto
from cggr_compile.run.confidence import Confidence
from cggr_compile.run.given_scores import GivenScores
from cggr_compile.run.graph_memory import Pool
from cggr_compile.run.metrics import Gradients, LastStep
from cggr_compile.run.plan import Plan
from cggr_compile.run.recomputed import Recomputations
from cggr_compile.run.router_time import RouterTime
from cggr_compile.run.sharded import Sharded
from cggr_compile.run.together import Together
from cggr_compile.run.uncounted import Uncounted


class Runtime:
    """State of one optimised model: configuration, optimiser steps done, what the last step left, plans so far."""

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self.seed = config.seed if config.seed is not None else torch.initial_seed() % 2**63
        self.steps = 0
        self.total_steps: int | None = None
        self.attached = False  # whether somebody said that steps will be counted
        self.uncounted = Uncounted()
        self.growths = 0
        self.grows = False  # at the next step
        self.runs = 0  # of plans, recomputations too
        self.plans: list[Plan] = []
        self.passive: list[str] = []
        self.fell_back = False  # a step that could not be routed trained the whole model
        self.staged = False  # steps have trained the first layers alone
        self.last: LastStep | None = None
        self.confidence = Confidence()
        self.gradients = Gradients()
        self.router_time = RouterTime()
        self.given = GivenScores()
        self.pool: Pool | None = None
        self.sharded: Sharded | None = None
        self.auto = Auto(config) if config.selection == "auto" else None
        self.together = Together(config)
        self.recomputations = Recomputations()
        self._model: Callable[[], nn.Module | None] = _unknown  # weakly: the model's handle holds this
        # Two threads on one model take turns; what a step draws and leaves belongs together.
        self.lock = threading.RLock()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._generator_states: dict[str, bytes] = {}
        self.said: set[str] = set()  # what has been warned of
        self.optimizer: Callable[[], torch.optim.Optimizer | None] = _unknown  # weakly: that is attached

    @property
    def counted(self) -> bool:
        """Whether optimiser steps are counted."""
        return self.attached or self.steps > 0

    @property
    def goes_by_steps(self) -> bool:
        """Whether what trains still changes with the number of optimiser steps."""
        until = None if self.stage is None else self.stage[1]
        return self.auto is not None or until is not None or not self.config.is_over(self.steps)

    @property
    def model(self) -> nn.Module | None:
        """The model, None where a function was compiled that calls one."""
        return self._model()

    def belongs_to(self, model: nn.Module) -> None:
        """Says whose state this is."""
        self._model = weakref.ref(model)

    def follow(self, before: Runtime) -> None:
        """Takes the place of another configuration's runtime: what was said of the steps to come holds."""
        self.attached, self.optimizer = before.attached, before.optimizer
        if before.total_steps is not None:
            self.tell_total(before.total_steps)
        if self.auto is not None and self.attached:
            self.auto.agreement = before.auto.agreement if before.auto is not None else of_all_ranks()

    def tell_total(self, steps: int) -> None:
        """How many steps there will be; warns where the schedule is longer."""
        self.total_steps = steps
        stages = self.config.stages[self.growths + self.grows :]
        late = [
            until for _, until in stages if until is not None and (until if until >= 1 else until * steps) > steps - 1
        ]
        if late:
            warn(
                f"depth_until={late[0]} is not reached in {steps} steps, so not all layers will train; give a share of "
                "them, e.g. depth_until=0.5"
            )
        if self.may_select and self.config.warmup_steps > steps:
            warn(f"warmup_steps={self.config.warmup_steps} is not over in {steps} steps, so more than ratio is kept")

    def attach(self) -> None:
        """Steps will be counted. Of a distributed run, all ranks say so, and decide together from then on."""
        self.attached = True
        if self.auto is not None and self.auto.agreement is None:
            self.auto.agreement = of_all_ranks()

    @property
    def in_force(self) -> RoutingConfig:
        """The configuration that steps run under: `config`, with what `"auto"` stands for, and the step's scope."""
        return self.together.in_force(self.config) if self.auto is None else self.auto.in_force

    @property
    def choices(self) -> tuple[RoutingConfig, ...]:
        """The configurations that steps may run under."""
        return (self.config,) if self.auto is None else self.auto.choices

    @property
    def may_select(self) -> bool:
        """Whether steps select, at once or later."""
        return any(map(keeps_less, self.choices))

    @property
    def stage(self) -> tuple[int, float | None] | None:
        """How many of the first layers train, and until when; None where all do."""
        return next(iter(self.config.stages[self.growths :]), None)

    @property
    def grows_now(self) -> bool:
        """Whether the model grows before the step that comes.

        Raises:
            CannotOptimize: it grows at a share of all steps, and nobody told how many these are.
        """
        if self.stage is None or self.grows:
            return self.stage is not None
        _, until = self.stage
        if until is None:
            return False
        if until >= 1:
            return self.steps >= until
        if self.total_steps is None:
            raise CannotOptimize(
                f"depth_until={until} is a share of all steps, and their number is not known",
                hint="pass it to cggr.attach(model, optimizer, total_steps=…), or give depth_until as a number of "
                "steps; with a Trainer use cggr.route and set max_steps or num_train_epochs",
            )
        return self.steps >= until * self.total_steps

    def refuse(self, error: CannotOptimize) -> None:
        """Raises `error`, or, with `fallback="eager"`, warns once and records it as the reason for not routing.
        A backward that runs a routed step again cannot fall back, nor can a model that will copy layers."""
        if self.config.fallback == "raise" or self.recomputations.may_be_routed():
            raise error
        if self.staged and self.stage is not None and self.config.grow == "copy":
            raise CannotOptimize(
                f"fallback='eager' would train layers that growing overwrites; {error.reason}",
                source=error.source,
                hint="leave such calls out until the model has grown, or give grow='random'",
            ) from error
        self.fell_back = True
        self.last = None
        if str(error) not in self.passive:
            self.passive.append(str(error))
            warn(f"training without routing: {error}")

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
            elif device.type != "meta":  # where nothing runs
                self.warn_once("device", f"running without CUDA graphs: the model is on {device.type}")
        return self.pool

    def warn_once(self, about: str, message: str) -> None:
        """Warns, but for the first time only where it is `about` the same."""
        if about not in self.said:
            self.said.add(about)
            warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Steps, seed, generators, confidence, growth and what `"auto"` found: numbers, strings and bytes only. (A
        generator's state is bytes: a tensor that is made for a pickle does not live until a spawned process opens
        it.)"""
        states = {str(device): _bytes_of(generator.get_state()) for device, generator in self._generators.items()}
        return {
            "steps": self.steps,
            "seed": self.seed,
            "generators": {**self._generator_states, **states},
            "confidence": self.confidence.last(),
            **({} if self.auto is None else {"auto": self.auto.state_dict()}),
            **({name: getattr(self, name) for name in _DEPTH} if self.config.deepens else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; ValueError, and nothing is taken, for other entries."""
        if not isinstance(state, Mapping):
            raise ValueError(f"{state!r} is no state; give what state_dict() returned")
        for name, kind in _KINDS.items():
            if name in state and not isinstance(state[name], kind):
                raise ValueError(f"the state's {name} is {state[name]!r}; give what state_dict() returned")
        expected = {"steps", "seed", "generators", "confidence"}
        expected |= {"auto"} if self.auto is not None else set()
        expected |= set(_DEPTH) if self.config.deepens else set()
        if set(state) != expected or (self.auto is not None and set(state["auto"]) != set(self.auto.state_dict())):
            raise ValueError(
                f"the state of a model with these options has entries {sorted(expected)}, got {sorted(state)}; give "
                "optimize the options that the state was saved under (selection='auto' and route='depth' save more) "
                "and load it with the version that saved it"
            )
        for device, given in state["generators"].items():
            if not isinstance(given, bytes):
                raise ValueError(f"the state's generator of {device} is {given!r}; give what state_dict() returned")
        auto = self._auto_anew()
        if auto is not None:
            auto.load_state_dict(state["auto"])
        self.auto = auto
        self.steps, self.seed = state["steps"], state["seed"]
        self._generators = {}
        self._generator_states = dict(state["generators"])
        self.confidence = Confidence(state["confidence"])
        if self.config.deepens:
            self.growths, self.grows = state["growths"], state["grows"]
            self.total_steps = self.total_steps or state["total_steps"]  # what was told since holds

    def start_over(self) -> None:
        """Begins the schedule anew: warm-up and `"auto"`. The confidence, which goes by the weights, stays, a model
        that has grown does not shrink, and the generator draws on."""
        self.steps = 0
        self.auto = self._auto_anew()

    def _auto_anew(self) -> Auto | None:
        """What `"auto"` knows at first, with the ranks' agreement that is in force; None of other selections."""
        if self.auto is None:
            return None
        auto = Auto(self.config)
        auto.agreement = self.auto.agreement
        return auto

    def __getstate__(self) -> dict[str, Any]:
        """Configuration and state; compiled plans are rebuilt by the first step of the copy."""
        return {"config": self.config, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self.load_state_dict(state["state"])


def _unknown() -> None:
    return None


_DEPTH = ("growths", "grows", "total_steps")
_KINDS: dict[str, Any] = {
    **{"steps": int, "seed": int, "generators": Mapping, "confidence": (float, int, NoneType)},
    **{"auto": Mapping, "growths": int, "grows": bool, "total_steps": (int, NoneType)},
}
"""Of what kind the entries of a state are."""


def _bytes_of(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor_of(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
