"""What happens at each step: how many rows are kept, which code runs, what is remembered for the user.

The number of rows comes from shapes, the curriculum from a Python counter; selections and scores stay on the device
until somebody asks. Two options read tensors back: the dynamic threshold one number of the step before (`confidence`),
and `selection="auto"` what its probes measure, in the steps that probe (`auto`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cggr_compile.ir.amounts import Amount, amounts_of, sizes_of
from cggr_compile.ir.program import StepOutputs
from cggr_compile.run.given_scores import ScoresReady
from cggr_compile.run.metrics import LastStep
from cggr_compile.run.not_computed import NOT_COMPUTED
from cggr_compile.run.plan import Plan
from cggr_compile.run.recomputed import Given
from cggr_compile.run.runtime import Runtime
from cggr_compile.torch_internals import autograd
from cggr_compile.torch_internals.autograd import beside_checkpoints


class Step:
    """A captured graph as Dynamo's frame calls it: a step of its plan."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self.plan = plan
        self.runtime = runtime

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with self.runtime.lock:
            self.runtime.runs += 1
            again = self.runtime.recomputations.again(self.plan)
            if again is not None:
                return self._returned(self._outputs(again, inputs))
            if self.runtime.given.wanted:
                config, generator = self.runtime.in_force, self.runtime.generator(self.plan.device)
                raise ScoresReady(self.plan.row_scores(inputs, config, generator)[0])
            return self._step(inputs)

    def _step(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """One training step: what it is given, its outputs, and what is remembered of it."""
        plan, runtime = self.plan, self.runtime
        if runtime.probe is not None:
            with beside_checkpoints():
                runtime.probe.before_step(plan, inputs, runtime.steps, runtime.generator(plan.device))
        runtime.router_time.before_step(plan, inputs, runtime.in_force)
        rows, length = plan.sizes(inputs)
        config, steps = runtime.config, runtime.steps
        confidence = runtime.confidence.last() if config.follows_confidence else None
        amounts = amounts_of(plan.program, config, steps, rows, length, confidence)
        given = self._given(inputs, amounts, confidence)
        runtime.recomputations.remember(given)
        outputs = self._outputs(given, inputs)
        runtime.given.after_forward(plan.device.type)
        found = StepOutputs(*outputs[-len(StepOutputs._fields) :])
        if found.confidence is not None:
            runtime.confidence.measured(found.confidence)
        if found.rows is None:
            found = found._replace(rows=torch.arange(rows, device=plan.device))
        if found.positions is None and "token" in amounts:
            found = found._replace(positions=torch.arange(length, device=plan.device).expand(rows, length))
        runtime.last = LastStep(
            total=rows,
            length=length,
            kept=amounts["sequence"].kept if "sequence" in amounts else rows,
            fraction=config.kept_fraction(steps, confidence),
            found=found,
        )
        return self._returned(outputs)

    def _given(self, inputs: Sequence[Any], amounts: Mapping[str, Amount], confidence: float | None) -> Given:
        """The code that a step runs and what it is given beside the batch."""
        rows, length = self.plan.sizes(inputs)
        scores = self.runtime.given.take(rows, self.plan.device)
        config, steps = self.runtime.config, self.runtime.steps
        # Where only the threshold keeps every row the router still runs: nothing else would lower k again.
        planned = amounts if confidence is None else amounts_of(self.plan.program, config, steps, rows, length)
        if not self.plan.routable or all(amount.kept >= amount.total for amount in planned.values()):
            return Given(self.plan, self.plan.unrouted, ())
        route = self.plan.route if scores is None else self.plan.with_scores(self.runtime.in_force)
        sizes = sizes_of(route.program, rows, length, amounts)
        self.plan.branches.refuse_other_side(route.program.layers, self.plan.symbols.of(inputs), amounts)
        generator = self.runtime.generator(self.plan.device)
        added = route.added_inputs(sizes, amounts, generator, scores)
        return Given(self.plan, route.variant, tuple(added))

    def _outputs(self, given: Given, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        with autograd.modes_kept(self.plan.device.type):
            return given.variant(*inputs, *given.added)

    def _returned(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The captured graph's outputs, of a step's: tensors that it does not compute say so."""
        pairs = zip(outputs, self.plan.tensors, strict=False)
        return tuple(NOT_COMPUTED if out is None and wanted else out for out, wanted in pairs)
