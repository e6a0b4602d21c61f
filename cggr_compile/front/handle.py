"""`model.cggr`: what the user reads and calls on an optimised model, and the patched `forward` behind it."""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from cggr_compile.capture.arguments import check_call, check_entries, named_arguments
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, NotCompiled
from cggr_compile.front.backend import Backend
from cggr_compile.front.call import Optimized, call_compiled, compiled_forward, refuse_nested
from cggr_compile.front.score_ahead import scored_ahead
from cggr_compile.inspection.explanation import Diff, Report
from cggr_compile.inspection.report import latest_plan
from cggr_compile.ir.roles import ranks_of
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.run.given_scores import ScoresReady, check_scores
from cggr_compile.run.metrics import metrics_of, selected, token_metrics
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.sharded import Sharded, sharded_parameters
from cggr_compile.torch_internals import dynamo, transformers
from cggr_compile.torch_internals.autograd import transforms_are_active
from cggr_compile.torch_internals.fsdp import is_root, is_sharded


class Handle(Optimized):
    """State and inspection of one optimised model; `cggr.optimize` puts it at `model.cggr`.

    Copying or pickling the model copies configuration, step and generator; the copy compiles anew at its first step.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, undo: dict[str, Any] | None = None) -> None:
        self.model = model
        self.runtime = runtime
        runtime.belongs_to(model)
        self.undo = undo or {}
        self.calls = 0
        self._in_use = False
        self._thread = threading.local()
        self._follow(self.original())

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "runtime": self.runtime, "undo": self.undo, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["runtime"], state["undo"])  # type: ignore[misc]
        self.calls = state["calls"]

    @property
    def config(self) -> RoutingConfig:
        """The options in force."""
        return self.runtime.config

    @property
    def selected(self) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """What the last training step kept, on the device; None before the first, and where it was not routed.

        Sequence route: sorted row indices [k], int64; where fewer than k rows were selectable, the rest repeats a
        selected row and counts for nothing. Where ranks selected together, the rows that this one trained, numbered
        over all: row i of rank r is r · B + i. Segment route: sorted positions [B, k], int64, of the kept documents, -1
        behind the last. Token route: sorted positions [B, k], int64, or [layers, B, k] with `resample="layer"`. Loss
        route: bool [B, S], the positions whose logits entered the loss. Two routes: a tuple.
        """
        return selected(self.config.routes, self.runtime.last)

    @property
    def captures(self) -> int:
        """How many graphs were captured for training so far."""
        return len(self.runtime.plans)

    def step(self) -> None:
        """Counts one optimiser step, for `warmup_steps` and `selection="auto"`; call it after `optimizer.step()`, and
        before `zero_grad()` for the metric `parameters_without_gradient`."""
        self.runtime.steps += 1
        self.runtime.gradients.count(self.model, self.captures)

    def grow(self) -> None:
        """Lets the layers of the next stage train from the next training step on, which fills those that have not, as
        `grow` says; for the depth route with `depth_until=None`, or ahead of its time. A second call before that step
        changes nothing, and neither does one when all layers train.

        Raises:
            ValueError: the model is not on the depth route.
        """
        if not self.config.deepens:
            raise ValueError(f"route={self.config.route!r} trains all layers; choose route='depth'")
        self.runtime.grows = self.runtime.stage is not None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model that trains now, for evaluation: before it has grown, its first layers alone are in their list.
        `eval()` and `train()` within reach the others when it is left.

        Raises:
            CannotOptimize: no step has been captured yet, or the layers are in no list of modules.
        """
        stage = self.runtime.stage
        if stage is None or self._in_use:
            yield
            return
        if not self.runtime.plans:
            raise CannotOptimize(
                "no step has been captured yet, so it is not known which modules the layers are",
                hint="run one training step with labels first",
            )
        plan = latest_plan(self.runtime)
        path = plan.analysed.stack.path
        owner, _, name = path.rpartition(".")
        container = dict(self.model.named_modules()).get(path) if path else None
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            raise CannotOptimize(
                "the layers are in no nn.ModuleList, from which the others could be taken for a while",
                hint="evaluate the whole model",
            )
        parent = self.model.get_submodule(owner)
        short = container[: stage[0]]
        short.training = container.training
        setattr(parent, name, short)
        self._in_use = True
        try:
            yield
        finally:
            setattr(parent, name, container)
            self._in_use = False
            if short.training is not container.training:
                container.train(short.training)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model's own `state_dict`: step, generators, the confidence that the dynamic
        threshold goes by, whether the model has grown, the findings of `selection="auto"`.

        Numbers, strings and bytes only, so `torch.save` and `torch.load(weights_only=True)` take it.
        """
        return self.runtime.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; options stay those in force.

        Raises:
            ValueError: `state` lacks an entry, has one too many, or one of another kind; nothing is taken of it.
        """
        self.runtime.load_state_dict(state)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Figures of the last training step by name (`cggr.METRICS` says what each is), as 0-d
        tensors on the device: computed by this call, read back by nobody; empty before the first, and
        where it was not routed."""
        last = self.runtime.last
        if last is None:
            return {}
        without_gradient = self.runtime.gradients.read(self.model, self.captures)
        found = metrics_of(last, without_gradient, self.runtime.router_time.seconds)
        found.update(token_metrics(self.config.routes, last))
        if ranks_of(self.config) is not None:
            found["steps_selected_locally"] = torch.full_like(found["rows_total"], self.runtime.together.local_steps)
        if self.runtime.auto is not None:
            found.update(self.runtime.auto.metrics(found["rows_total"].device))
        return found

    def time_router(self) -> None:
        """Lets the next training step run the router by itself too; `metrics()` has `router_seconds` from then on.

        Raises:
            ValueError: the selection in force runs no router.
        """
        config = self.runtime.in_force
        if config.ratio == 1 or not config.routes:
            raise ValueError("every row is kept, so no router runs; choose a ratio below 1 to time one")
        if not (rule := rule_of(config.selection)).needs_scores:
            raise ValueError(f"selection={rule.name!r} runs no router; choose a selection by scores to time one")
        self.runtime.router_time.ask()

    def score(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The router's scores [B] fp32 of a batch (the forward's arguments, labels included) by the weights as they
        are, for `use_scores`. Nothing trains, and nothing is read back. Call it under the autocast of the steps.

        Raises:
            ValueError: the model is not in training mode, or no step of this configuration takes scores from outside.
            CannotOptimize: the model or the batch cannot be routed.
        """
        self._check_scores_from_outside()
        if not self.model.training:
            raise ValueError("score: the model is in eval mode, and only training steps are routed; call train() first")
        arguments = named_arguments(self.original(), (), dict(batch))
        given = self.runtime.given
        with self.runtime.lock:  # another thread's step would end as this call does
            given.wanted = True
            try:
                with torch.enable_grad():  # what a step is captured under
                    self._routed(arguments)
            except ScoresReady as ready:
                return ready.scores
            finally:
                given.wanted = False
        reason = f"the step has no rows to score: {self.runtime.passive[-1]}"
        raise CannotOptimize(reason, hint="pass labels, to a model that computes its loss from them")

    def use_scores(self, scores: torch.Tensor) -> None:
        """Lets the next training step select by these scores [B] instead of running the router: scores of `score`, or
        the user's own, say of an earlier pass over the data. Where that step keeps every row they are not used.

        Raises:
            ValueError: no step of this configuration takes scores from outside, or one is NaN, which on CUDA fails an
                assertion on the device instead. (The step itself raises it where the number of rows is another.)
            TypeError: they are no tensor.
        """
        self._check_scores_from_outside()
        check_scores(scores)
        self.runtime.given.give(scores)

    def score_ahead(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The batches again, to be trained on one by one, each scored while the one before it trains: on CUDA by a
        stream of its own, under the autocast of the step before. The scores are those of the weights before that
        step's update. The first two batches of a model are scored in their steps.

        Raises:
            ValueError: no step of this configuration takes scores from outside.
        """
        self._check_scores_from_outside()
        return scored_ahead(self, batches)

    def _check_scores_from_outside(self) -> None:
        config, rule = self.config, rule_of(self.runtime.choices[-1].selection)
        problem = ""
        if not config.routes:
            problem = "route='depth' selects nothing"
        elif config.routes != ("sequence",):
            problem = f"route={config.route!r} selects by the scores of tokens"
        elif not rule.needs_scores:
            problem = f"selection={rule.name!r} reads no scores"
        elif config.follows_confidence:
            problem = "dynamic_threshold=True needs the router's confidence in every step"
        if problem:
            raise ValueError(f"scores of rows cannot come from outside: {problem}")

    def report(self) -> Report:
        """What was found, inserted and chosen, and the predicted cost, for the latest capture."""
        return Report.of(self.runtime)

    def diff(self) -> Diff:
        """The rewrite of the latest capture: in model terms, operator counts, full graph."""
        return Diff.of(self.runtime)

    def __repr__(self) -> str:
        return f"<cggr handle of {type(self.model).__name__}: {self.config}, {self.captures} captures>"

    def original(self) -> Callable[..., Any]:
        """The forward that `optimize` found, bound to the model."""
        return self.undo.get("forward") or types.MethodType(type(self.model).forward, self.model)

    def _follow(self, forward: Callable[..., Any]) -> None:
        """Routes calls of this forward from now on."""
        self._forward = forward
        self._compiled: Callable[..., Any] | None = None
        parameters = list(inspect.signature(forward).parameters)
        self._place_of_labels = parameters.index("labels") if "labels" in parameters else len(parameters)

    def labels_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The labels of a call, given by name or by position."""
        return args[self._place_of_labels] if len(args) > self._place_of_labels else kwargs.get("labels")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The patched forward: routed in a training step with labels, the original otherwise.

        A `torch.compile` around the model traces the original; to it, a routed step is a call like any other that it
        does not look into.
        """
        if not self._trains(args, kwargs):
            if not torch.compiler.is_compiling():
                self._warn_of_eval_mode(args, kwargs)
            forward = self.undo.get("forward")  # not `original`: Dynamo and torch.export cannot trace how it binds
            return forward(*args, **kwargs) if forward else type(self.model).forward(self.model, *args, **kwargs)
        return self._train(args, kwargs)

    def _trains(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return self.model.training and torch.is_grad_enabled() and self.labels_of(args, kwargs) is not None

    def _warn_of_eval_mode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Where a model that has never trained is called as if to train it: `from_pretrained` leaves models in eval
        mode."""
        if self.calls or self.model.training or not torch.is_grad_enabled():
            return
        if self.labels_of(args, kwargs) is not None:
            self.runtime.warn_once(
                "eval mode",
                f"{type(self.model).__name__} is in eval mode, so this call with labels is not routed; call train() "
                "before training, or evaluate under torch.no_grad()",
            )

    @torch.compiler.disable(reason="a step routed by cggr is compiled by cggr; compile around it with fullgraph=False")
    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        self._thread.reached = True
        original = self.original()
        try:
            with self.runtime.lock, self.runtime.given.for_one_step():
                return self._step(named_arguments(original, args, kwargs))
        except CannotOptimize as error:
            self.refuse(error)
            if self.runtime.sharded is not None:
                return self.runtime.sharded.root.plainly(original, args, kwargs)
            return original(*args, **kwargs)

    def _step(self, arguments: dict[str, Any]) -> Any:
        """One step; raises `CannotOptimize` where it ends without a plan having run."""
        before = self.runtime.runs
        output = self._routed(arguments)
        if self.runtime.runs == before:
            raise CannotOptimize(
                f"no routed step was part of the forward: {(self.runtime.passive or ['it computes nothing'])[-1]}",
                hint="pass labels to a model that computes its loss from them, or call it under torch.no_grad()",
            )
        return output

    def refuse(self, error: CannotOptimize) -> None:
        """Raises `error`, or, with `fallback="eager"`, warns once and records it as the reason for not routing."""
        self.runtime.refuse(error)

    def reached(self) -> bool:
        """Whether a training call with labels came here, in this thread, since this was asked last."""
        reached = getattr(self._thread, "reached", False)
        self._thread.reached = False
        return reached

    def _routed(self, arguments: dict[str, Any]) -> Any:
        if self._in_use:
            raise CannotOptimize("a training step inside of in_use()", hint="leave it first; it is for evaluation")
        check_call(arguments, self.model)
        if "sequence" in self.config.routes and (self.config.ratio < 1 or self.config.selection == "auto"):
            check_entries(arguments)
        if transforms_are_active():
            raise CannotOptimize(
                "a transform of torch.func (grad, vmap, jvp) runs the step, and sees no compiled code",
                hint="call loss.backward() or torch.autograd.grad, which are exact, or cggr.restore(model) first",
            )
        first = next(self.model.parameters(), arguments["input_ids"])
        if first.is_meta and not arguments["input_ids"].is_meta:
            raise CannotOptimize(
                "the batch has data and the model's parameters are on the meta device: offloaded, or never loaded",
                hint="load the whole model onto the batch's device",
            )
        if arguments["input_ids"].is_meta or first.is_meta:
            raise CannotOptimize(
                "a step on the meta device computes nothing, and no rows can be selected",
                hint="cggr.explain captures a model on the meta device without running it",
            )
        if transformers.asks_for_outputs(arguments) and not self.undo["recording"]:
            self.undo["recording"] = transformers.install_output_hooks(self.model, arguments)
        with self.runtime.lock:
            sharded = self._sharded()
            if self._forward != (forward := self.original()):  # the model's class, or its class's forward, has changed
                self._follow(forward)
            if self._compiled is None:
                refuse_nested(self.model)
                self._compiled = compiled_forward(forward, Backend(self.runtime))
            step = partial(call_compiled, self._compiled, model=self.model)
            try:
                return step(arguments) if sharded is None else sharded.call(step, arguments)
            except CannotOptimize as error:
                refuse_nested(self.model)  # where a part was optimized since the first step, that is the reason
                if isinstance(error.__cause__, NotCompiled) and dynamo.stance() == "default":
                    self._compiled = None  # Dynamo never looks again at code that it has passed over
                raise

    def _sharded(self) -> Sharded | None:
        """The parameters that FSDP2 shards, seen at the first step, and anew where their policies have changed."""
        found = self.runtime.sharded
        if found is not None and found.is_current:
            return found
        if found is not None:
            found.root.release()
            self.runtime.sharded = self._compiled = None
        found = None
        if is_root(self.model) or (self._compiled is None and is_sharded(self.model)):
            found = self.runtime.sharded = sharded_parameters(self.model, self.config, self._trains)
        if found is not None:
            found.root.begun()
        return found
