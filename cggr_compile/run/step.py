"""What happens at each step: how many rows are kept, which code runs, what is remembered for the user.

The number of rows comes from shapes, the curriculum from a Python counter; selections and scores stay on the device
until somebody asks. Two options read tensors back: the dynamic threshold one number of the step before (`confidence`),
and `selection="auto"` scores that were sent long before (`auto`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from cggr_compile.capture.collector import collected_at_the_end
from cggr_compile.errors import CannotOptimize, warn
from cggr_compile.ir.amounts import Amount, amounts_of, sizes_of
from cggr_compile.ir.program import StepOutputs
from cggr_compile.ir.roles import changes_of, ranks_of
from cggr_compile.passes.pipeline import keeps_less
from cggr_compile.run.given_scores import ScoresReady
from cggr_compile.run.growth import Copies
from cggr_compile.run.metrics import LastStep
from cggr_compile.run.not_computed import NOT_COMPUTED
from cggr_compile.run.notices import notice
from cggr_compile.run.plan import Plan, Unpadded
from cggr_compile.run.prepare import run_aside
from cggr_compile.run.recomputed import Given
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.together import Offer, form_of
from cggr_compile.schedule import kept_of
from cggr_compile.torch_internals import autograd


class Step:
    """A captured graph as Dynamo's frame calls it: a step of its plan."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self.plan = plan
        self.runtime = runtime
        self._selects_documents = False  # as far as a step has shown

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with self.runtime.lock:
            self.runtime.runs += 1
            again = self.runtime.recomputations.again(self.plan)
            if again is not None:
                return self._returned(self._outputs(again, self._held(inputs)))
            if self.runtime.given.wanted:
                config, generator = self.runtime.in_force, self.runtime.generator(self.plan.device)
                raise ScoresReady(self.plan.in_force.row_scores(self._held(inputs), config, generator)[0])
            self._warn_uncounted(inputs)
            self._grow(inputs)
            if self.runtime.stage is not None and not self.runtime.staged:
                self._begin_stages()
                self.runtime.staged = True
            inputs = self._held(inputs)
            self._compare(inputs)
            if not self._unprepared:
                return self._step(self.plan.in_force, inputs)
            with collected_at_the_end():
                self._prepare(inputs)
                return self._step(self.plan.in_force, inputs)

    def _held(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs that this rank has: of parameters that FSDP2 shards, the shards."""
        return inputs if self.runtime.sharded is None else self.runtime.sharded.shards(inputs)

    def _warn_uncounted(self, inputs: tuple[Any, ...]) -> None:
        """Where a schedule seems to stand still."""
        runtime = self.runtime
        if "uncounted" in runtime.said or not runtime.goes_by_steps:
            runtime.uncounted.stop()
            return
        message = runtime.uncounted.warning(runtime.steps, runtime.attached, lambda: self._trained(inputs))
        if message is not None:
            runtime.warn_once("uncounted", message)

    def _trained(self, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
        return [x for x in self._held(inputs) if isinstance(x, torch.Tensor) and x.is_leaf and x.requires_grad]

    def _grow(self, inputs: tuple[Any, ...]) -> None:
        """From now on more layers train, if it is time."""
        while self.runtime.grows_now:
            filled = ""
            if self.plan.copies:
                filled = f", filled by copies of the first {len(self.plan.in_force.analysed.stack)}"
                copies = self.plan.copies[self.runtime.growths]
                self._refuse_trained(copies)
                with torch.no_grad():  # what is written to is no view to autograd
                    copies.make(self.runtime.model, inputs, self._held)
            self.runtime.growths += 1
            self.runtime.grows = False
            trained = len(self.plan.in_force.analysed.stack)
            when = f"step {self.runtime.steps}: " if self.runtime.counted else ""
            notice(f"{when}the model has grown, {trained} layers train{filled}")

    def _refuse_trained(self, copies: Copies) -> None:
        """Raises `CannotOptimize` where layers that growing would overwrite have trained, as far as is known."""
        if self.runtime.fell_back:
            raise CannotOptimize(
                "steps without routing have trained layers that growing would overwrite",
                hint="mend what could not be routed, or train without route='depth'",
            )
        copies.refuse_trained(self.runtime.model, self.runtime.optimizer())

    def _begin_stages(self) -> None:
        """In the first step: says which layers train.

        Raises:
            CannotOptimize: layers that growing would overwrite have trained, or DistributedDataParallel waits for them.
        """
        for copies in self.plan.copies[self.runtime.growths :]:
            self._refuse_trained(copies)
        around = DistributedDataParallel._get_active_ddp_module()
        if around is not None and not around.find_unused_parameters:
            raise CannotOptimize(
                "DistributedDataParallel waits for gradients of layers that do not train yet",
                hint="give it find_unused_parameters=True (Trainer: ddp_find_unused_parameters=True)",
            )
        assert self.runtime.stage is not None
        first, layers = self.runtime.stage[0], len(self.plan.analysed.stack)
        notice(f"the first {first} of {layers} layers train until the model grows; model.cggr.in_use() evaluates them")

    def _compare(self, inputs: tuple[Any, ...]) -> None:
        """Where ranks may select together, finds out whether they can in this step."""
        runtime, plan = self.runtime, self.plan.in_force
        if ranks_of(runtime.config) is None or not keeps_less(runtime.config):
            return
        rows, length = plan.sizes(inputs)
        kept = kept_of(runtime.config.kept_fraction(runtime.steps), rows)
        form, unprepared = form_of(plan.captured, inputs), plan.routable and not self.plan.prepared
        given, options = runtime.given.waiting, runtime.together.options
        runtime.together.compare(Offer(rows, length, kept, form, given, unprepared, options))

    @property
    def _unprepared(self) -> bool:
        """Whether later steps of this capture may run programs that are not compiled yet."""
        plan = self.plan
        if plan.inner == "eager" or changes_of(plan.captured):
            return False
        return not plan.prepared or self._awaits_auto

    @property
    def _awaits_auto(self) -> bool:
        return self.runtime.auto is not None and self.runtime.counted and not self.plan.prepared_auto

    def _prepare(self, inputs: tuple[Any, ...]) -> None:
        """In the first step of a capture, compiles the programs that its later steps run; those of `"auto"` in the
        first step after which steps are counted."""
        plan, runtime = self.plan, self.runtime
        generator = torch.Generator(plan.device).manual_seed(0)  # draws of the steps themselves are the runtime's
        if self._awaits_auto:
            plan.prepared_auto = True
            for stage in plan.to_come:
                self._prepare_auto(stage, inputs, generator)
        if plan.prepared:
            return
        plan.prepared = True
        rows, length = plan.sizes(inputs)
        config = runtime.in_force
        for stage in plan.to_come:
            for fraction in config.fractions(self.runtime.steps, first=stage is plan.in_force):
                amounts = amounts_of(stage.program, config, fraction, rows, length)
                planned = amounts
                if config.follows_confidence:  # which leaves no router out
                    planned = amounts_of(stage.program, config, config.ratio, rows, length)
                given = self._given(stage, inputs, amounts, planned, generator, None)
                given.variant.settled = False  # until steps come to these sizes
                run_aside(given.variant, (*inputs, *given.added), stage.program.loss_output, plan.device)

    def _prepare_auto(self, plan: Plan, inputs: tuple[Any, ...], generator: torch.Generator) -> None:
        """Compiles the program that `"auto"` may select with."""
        _, selecting = self.runtime.choices
        if not plan.can_select(selecting):
            return
        route, sizes = plan.routed(selecting), plan.sizes(inputs)
        amounts = amounts_of(route.program, selecting, selecting.ratio, *sizes)
        added = route.added_inputs(sizes_of(route.program, *sizes, amounts), amounts, generator)
        route.variant.settled = False
        run_aside(route.variant, (*inputs, *added), route.program.loss_output, plan.device)

    def _step(self, plan: Plan, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """One training step: what it is given, its outputs, and what is remembered of it."""
        runtime = self.runtime
        auto = runtime.auto if runtime.counted else None
        if auto is not None and plan.can_select(auto.choices[1]):
            auto.decide(runtime.steps)
        runtime.router_time.before_step(plan, inputs, runtime.in_force)
        rows, length = plan.sizes(inputs)
        config, steps = runtime.in_force, runtime.steps
        confidence = runtime.confidence.last() if config.follows_confidence else None
        scheduled, fraction = config.kept_fraction(steps), config.kept_fraction(steps, confidence)
        amounts = amounts_of(plan.program, config, fraction, rows, length)
        # Where only the threshold keeps every row the router still runs: nothing else would lower k again.
        planned = amounts
        if scheduled != fraction:
            planned = amounts_of(plan.program, config, scheduled, rows, length)
        scores = runtime.given.take(rows, plan.device)
        given = self._given(plan, inputs, amounts, planned, runtime.generator(plan.device), scores)
        given.variant.settled = config.is_settled(steps)
        runtime.recomputations.remember(given)
        outputs = self._outputs(given, inputs)
        self._refuse_untrained(plan, inputs, outputs[plan.program.loss_output])
        runtime.given.after_forward(plan.device.type)
        found = StepOutputs(*outputs[-len(StepOutputs._fields) :])
        if found.confidence is not None:
            runtime.confidence.measured(found.confidence)
        if auto is not None:
            auto.see(found, runtime.steps)
        if found.documents_kept is not None and not self._selects_documents:
            self._warn_none_fits(found.documents_kept, amounts["segment"].kept)
        ranks = None if found.rows is None else ranks_of(config)
        if found.rows is None:
            found = found._replace(rows=torch.arange(rows, device=plan.device))
        if found.positions is None and ("token" in amounts or "segment" in amounts):
            found = found._replace(positions=torch.arange(length, device=plan.device).expand(rows, length))
        runtime.last = LastStep(
            total=rows if ranks is None else ranks.count * rows,
            length=length,
            kept=amounts["sequence"].kept if "sequence" in amounts else rows,
            ranks=ranks,
            fraction=fraction,
            found=found,
        )
        return self._returned(outputs)

    def _refuse_untrained(self, plan: Plan, inputs: tuple[Any, ...], loss: torch.Tensor) -> None:
        """Raises `CannotOptimize` where the first layers have no gradient to give, and the whole model has."""
        if plan is self.plan or loss.requires_grad or not torch.is_grad_enabled():
            return
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            layers = len(plan.analysed.stack)
            raise CannotOptimize(
                f"nothing trains of the first {layers} layers, the final norm and the head, which train alone at first",
                hint="choose depth_layers up to one that trains, or train without route='depth'",
            )

    def _warn_none_fits(self, figures: torch.Tensor, kept: int) -> None:
        """In the first step that selects documents; the host waits for it."""
        self._selects_documents = True
        total, selected, too_long, _ = figures.sum(0).tolist()
        if total and not selected:
            warn(
                f"none of the batch's {total} documents trains: {too_long} are longer than the {kept} tokens that a "
                "sequence keeps; raise ratio, or route tokens (route='token')"
            )

    def _given(
        self,
        plan: Plan,
        inputs: Sequence[Any],
        amounts: Mapping[str, Amount],
        planned: Mapping[str, Amount],
        generator: torch.Generator,
        scores: torch.Tensor | None,
    ) -> Given:
        """The code that runs a step that keeps `amounts`, and what it is given beside the batch; everything is kept
        where `planned` says so."""
        if not plan.selects or all(amount.kept >= amount.total for amount in planned.values()):
            return self._whole(plan, inputs)
        route = plan.route if scores is None else plan.with_scores(self.runtime.in_force)
        sizes = sizes_of(route.program, *plan.sizes(inputs), amounts)
        # Layers whose experts skip tokens run on whole sequences.
        whole = ("token",) if self.runtime.in_force.skip == "experts" else ()
        resized = {name: amount for name, amount in amounts.items() if name not in whole}
        plan.branches.refuse_other_side(route.program.layers, plan.symbols.of(inputs), resized)
        return Given(self.plan, route.variant, tuple(route.added_inputs(sizes, amounts, generator, scores)))

    def _whole(self, plan: Plan, inputs: Sequence[Any]) -> Given:
        """The code that runs a step on everything, or on all that some token sees."""
        unpadded = plan.unpadded
        added = unpadded.batch.added(inputs) if isinstance(unpadded, Unpadded) else None
        if added is None or not isinstance(unpadded, Unpadded):
            return Given(self.plan, plan.unrouted, ())
        return Given(self.plan, unpadded.route.variant, (added,))

    def _outputs(self, given: Given, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        with autograd.modes_kept(self.plan.device.type):
            return given.variant(*inputs, *given.added)

    def _returned(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The captured graph's outputs, of a step's: tensors that it does not compute say so."""
        pairs = zip(outputs, self.plan.tensors, strict=False)
        return tuple(NOT_COMPUTED if out is None and wanted else out for out, wanted in pairs)
