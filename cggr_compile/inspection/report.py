"""`Report`: what the compiler found in a model, inserted, chose, and expects it to cost, as plain data.

Everything is read off the latest plan of a runtime when a report is asked for; nothing is collected while training.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from cggr_compile.errors import CannotOptimize
from cggr_compile.inspection.facts import (
    HeadFacts,
    Router,
    Sizes,
    Stack,
    compilations_of,
    cuda_graphs_of,
    head_of,
    outlined_of,
    router_of,
    stack_of,
    unpadded_of,
)
from cggr_compile.inspection.memory import Memory
from cggr_compile.inspection.wording import (
    depth_text,
    kept_text,
    layer_range,
    middle_text,
    others_text,
    schedule_text,
    score_text,
    tail_text,
)
from cggr_compile.ir import cost
from cggr_compile.ir.amounts import Amount, amounts_of
from cggr_compile.ir.cost import Cost
from cggr_compile.ir.names import operator_counts, part_sizes
from cggr_compile.ir.program import Shortened, hint
from cggr_compile.ir.roles import ranks_of
from cggr_compile.kernels.reference.selection import rule_name
from cggr_compile.run.plan import Plan
from cggr_compile.run.runtime import Runtime

aten = torch.ops.aten

WIDTH = 100
Section = tuple[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Report:
    """Facts of the latest capture; `str()` for people, `to_dict()` and `to_json()` for programs.

    Attributes:
        config: the options; a selection that is a function of the user's is its name.
        follows_confidence: whether the dynamic threshold moves k.
        routed: whether anything is selected; where every row trains, `unrouted` is why.
        depth: on the depth route, which layers train until when; `stage_share` the FLOPs of a step of those that train
            now, of one of all layers.
        schedule: where options follow optimiser steps and none is counted, that; None else.
        selection: the rule in force; `"auto"` while that keeps every row.
        auto: for `"auto"`, what trains and why.
        scope: of how many ranks' rows is selected, and how many steps selected locally; None where every step does.
        stack: None where no stack was found, which only a selection without scores allows.
        router: None where the selection needs no scores.
        float8: with `matmul="fp8"`, how many products of what trains are made in float8; None without.
        inserted: operators of the rewritten graph that the captured one lacks, and how many.
        parts: nodes of each part of the rewritten graph.
        amounts: for each route, what it keeps of the captured batch once warm-up is over: kept, of how many.
        gathered: inputs reduced to the kept rows or documents, with the dimension.
        shortened: what the token route's middle layers, or their experts, read for the kept tokens, and how.
        providers: implementation chosen for each operator, or several for the places where it is called.
        passed_over: for operators left to the reference, the other providers and why they cannot run.
        passes: in order of execution.
        captures: training graphs captured so far.
        causal_attentions: attentions whose mask was proved causal and dropped.
        unpadded: with `unpad`, what the last step left out of a padded batch, or why nothing is; None without.
        outlined: "off", or into how many pieces steps were divided, how many of them were compiled, and why others
            could not be divided.
        cuda_graphs: "off", or how many steps were recorded, whether their gradients are copied out, and why others
            could not be recorded.
        compilations: how often the inner backend compiled each program of the latest capture.
        passive: why calls were not routed, with the number of graphs.
        memory: of `cggr.explain`, the memory that a step is predicted to take, or why that cannot be said.
    """

    config: dict[str, Any]
    follows_confidence: bool
    routed: bool
    unrouted: str | None
    depth: str | None
    stage_share: float | None
    schedule: str | None
    sizes: Sizes
    selection: str
    auto: str | None
    scope: str | None
    stack: Stack | None
    router: Router | None
    float8: str | None
    head: HeadFacts
    inserted: dict[str, int]
    parts: dict[str, int]
    amounts: dict[str, Amount]
    gathered: tuple[tuple[str, int], ...]
    shortened: tuple[Shortened, ...]
    providers: dict[str, str]
    passed_over: dict[str, str]
    inner: str
    passes: tuple[str, ...]
    captures: int
    causal_attentions: int
    unpadded: str | None
    outlined: str
    cuda_graphs: str
    compilations: dict[str, int]
    passive: dict[str, int]
    cost: Cost
    memory: Memory | str | None = None

    @classmethod
    def of(cls, runtime: Runtime) -> Report:
        """Reads the latest plan of a runtime.

        Raises:
            CannotOptimize: nothing was captured yet.
        """
        plan = latest_plan(runtime)
        program, config = plan.program, runtime.in_force
        analysed = plan.analysed
        before, after = operator_counts(plan.captured.graph), operator_counts(program.graph)
        ratio = config.ratio if plan.selects else 1.0
        predicted = cost.predict(analysed, program.routing.router_layers, ratio, config)
        batch, length = hint(program.batch), hint(program.sequence)
        routes = amounts_of(program, config, config.ratio, batch, length) if plan.selects else {}
        return cls(
            config=runtime.config.to_dict(),
            follows_confidence=config.follows_confidence,
            routed=plan.selects,
            unrouted=None if plan.selects else plan.unrouted_because,
            depth=_depth(runtime),
            stage_share=_stage_share(runtime, predicted),
            schedule=_schedule(runtime),
            sizes=Sizes(batch, length, routes["sequence"].kept if "sequence" in routes else batch),
            selection=rule_name(runtime.in_force.selection),
            auto=_auto(runtime, plan),
            scope=_scope(runtime),
            stack=stack_of(plan, analysed),
            router=router_of(plan, analysed, predicted),
            float8=None if program.routing.quantized is None else str(program.routing.quantized),
            head=head_of(analysed),
            inserted={name: count for name, count in sorted((after - before).items()) if name not in before},
            parts=part_sizes(program.graph),
            amounts=routes,
            gathered=program.routing.gathered,
            shortened=program.routing.shortened,
            providers=dict(program.routing.providers),
            passed_over=dict(program.routing.passed_over),
            inner=plan.inner,
            passes=tuple(snapshot.name for snapshot in program.snapshots[1:]),
            captures=len(runtime.plans),
            causal_attentions=program.routing.causal_attentions,
            unpadded=unpadded_of(plan),
            outlined=outlined_of(plan),
            cuda_graphs=cuda_graphs_of(plan, runtime.pool),
            compilations=compilations_of(plan),
            passive=dict(Counter(runtime.passive)),
            cost=predicted,
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts as dicts, lists, numbers and strings."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The facts as JSON, indented by two."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    def sections(self) -> list[Section]:
        """Titled (label, text) pairs, as `str()` and the HTML page show them."""
        return [("model", self._model()), ("rewrite", self._rewrite()), ("predicted cost", self._cost())]

    def __str__(self) -> str:
        lines: list[str] = []
        for title, pairs in self.sections():
            lines += [title, *(_row(label, text) for label, text in pairs), ""]
        return "\n".join(lines).rstrip()

    def _model(self) -> list[tuple[str, str]]:
        head = self.head
        stack = self.stack
        extras = [f"scale {head.scale:g}"] * (head.scale != 1) + [f"divisor {head.divisor:g}"] * (head.divisor != 1)
        extras += [f"soft-cap {head.softcap:g}"] * (head.softcap > 0)
        shift = "position t predicts label t + 1" if head.label_shift == 1 else "position t predicts label t"
        return [
            (
                "stack",
                f"{stack.path or '(unnamed)'}: {stack.layers} layers, found by {stack.proof}"
                if stack
                else "none found (not needed: this selection runs no router)",
            ),
            *([("residual", stack.residual)] if stack else []),
            ("objective", f"{head.objective}: {shift}; {head.reduction} over labels other than {head.ignore_index}"),
            (
                "head",
                ", ".join(
                    [
                        f"{head.weight} {list(head.weight_shape)}",
                        "tied to the embedding" if head.tied else "not tied",
                        "bias" if head.bias else "no bias",
                        *extras,
                    ]
                ),
            ),
            ("captured batch", f"B = {self.sizes.batch} rows of S = {self.sizes.sequence} tokens"),
        ]

    def _rewrite(self) -> list[tuple[str, str]]:
        pairs = [("depth", self.depth)] if self.depth is not None else []
        pairs += [("schedule", self.schedule)] if self.schedule is not None else []
        pairs += [] if self.routed else [("routing", f"none: {self.unrouted}")]
        pairs += self._router_lines()
        if self.routed:
            pairs.append(("selection", f"{self.selection}, {self._kept()}"))
        pairs += [("scope", self.scope)] if self.scope is not None else []
        pairs += [("auto", self.auto)] if self.auto is not None else []
        if "sequence" in self.amounts or "segment" in self.amounts:
            size = "B" if "sequence" in self.amounts else "S"
            inputs = ", ".join(f"{path} (dim {dim})" for path, dim in self.gathered) or "none"
            pairs.append((f"inputs {size} → k", inputs))
        if "token" in self.amounts:
            pairs.append(("short layers", self._middle()))
            pairs += [("read S → k", str(entry)) for entry in self.shortened]
        pairs += [
            ("causal masks", self._causal_masks()),
            *([("left out", self.unpadded)] if self.unpadded is not None else []),
            *([("float8", self.float8)] if self.float8 is not None else []),
            ("inserted", self._inserted()),
            ("nodes", ", ".join(f"{part} {count}" for part, count in self.parts.items())),
            ("providers", ", ".join(f"{name}: {provider}" for name, provider in self.providers.items()) or "none"),
            *(("passed over", f"for {names}: {reason}") for reason, names in self._passed_over()),
            ("inner backend", self.inner),
            ("outlined layers", self.outlined),
            ("CUDA graphs", self.cuda_graphs),
            ("passes", " → ".join(self.passes)),
            ("captures", f"{self.captures}; {self._compiled()}"),
        ]
        if self.passive:
            pairs.append(("not routed", "; ".join(f"{why} (×{count})" for why, count in self.passive.items())))
        return pairs

    def _compiled(self) -> str:
        if not any(self.compilations.values()):
            return f"nothing compiled by {self.inner}: {', '.join(self.compilations)}"
        return f"compiled: {_listing(self.compilations)}"

    def _causal_masks(self) -> str:
        if not self.causal_attentions:
            return "none dropped: none was proved to be key <= query for the captured lengths"
        padding = any(name.startswith("cggr.checked_padding") for name in self.inserted)
        besides = ", and otherwise to hide padding on the right" if padding else ""
        return f"{self.causal_attentions} dropped: proved to be key <= query for the captured lengths{besides}"

    def _inserted(self) -> str:
        own = {name: count for name, count in self.inserted.items() if name.startswith("cggr.")}
        around = {name: count for name, count in own.items() if not name.startswith("cggr.fp8_linear")}
        helpers = sum(self.parts.get(part, 0) for part in ("score", "select", "gather", "loss")) - sum(around.values())
        names = ", ".join(f"{name.partition('[')[0]} ×{count}" for name, count in own.items())
        return f"{names}, and {helpers} small nodes around them"

    def _router_lines(self) -> list[tuple[str, str]]:
        if self.router is None:
            return [("router", f"none: {self.selection!r} needs no scores")] if self.routed else []
        router = self.router
        assert self.stack is not None
        return [
            ("cut", f"after layer {router.layers - 1}, at %{router.cut}: {router.cut_type}"),
            (
                "router",
                f"{layer_range(router.layers)} of {self.stack.layers}, {tail_text(router.tail)}head; {router.body}; "
                f"{router.parameters:,} parameters, all shared; {router.flops_share:.1%} of a forward's FLOPs",
            ),
            ("score", f"{self.config['scoring']}, {router.head}, fp32, {score_text(self.config['route'])}"),
        ]

    def _passed_over(self) -> list[tuple[str, str]]:
        """Each reason with the operators that it holds for."""
        names: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            names.setdefault(reason, []).append(name)
        return [(reason, ", ".join(operators)) for reason, operators in names.items()]

    def _kept(self) -> str:
        ratio = self.config["ratio"]
        text = "; ".join(kept_text(route, ratio, amount) for route, amount in self.amounts.items())
        text += schedule_text(self.config["warmup_steps"], self.config["dense_after_steps"])
        return f"{text}; more while the router is unsure" if self.follows_confidence else text

    def _middle(self) -> str:
        assert self.stack is not None
        each = ", each with a selection of its own" if self.config["resample"] == "layer" else ""
        return f"{middle_text(self.config, self.stack.layers)}{each}; {others_text(self.config)}"

    def _cost(self) -> list[tuple[str, str]]:
        c = self.cost
        pairs = [
            (
                "forward",
                f"{_flops(c.forward_flops)} on the captured batch: layers {_share(sum(c.layer_flops), c)}, "
                f"head {_share(c.head_flops, c)}, rest {_share(c.rest_flops, c)}",
            )
        ]
        pairs += [] if self.stage_share is None else [("these layers", f"{self.stage_share:.1%} of a step of all")]
        pairs += self._routed_cost() if self.routed else []
        pairs += [] if self.memory is None else [("peak memory", str(self.memory))]
        if c.uncounted:
            pairs.append(("not counted", ", ".join(f"{name} ×{count}" for name, count in c.uncounted)))
        return pairs

    def _routed_cost(self) -> list[tuple[str, str]]:
        c = self.cost
        return [
            (
                "router",
                f"φ = n/L = {c.phi:.3f}, η = head/body = {c.eta:.3f}, κ = {c.kappa:.3g}, c = φ + κη = {c.c:.3f}"
                if self.router
                else "no router runs, so c = 0",
            ),
            (
                "routed step",
                f"{c.step_ratio:.1%} of a plain step ({c.random_ratio:.4g} for what is kept"
                + (f" + {c.router_share / (1 + cost.BACKWARD):.3f} for the router)" if self.router else ")"),
            ),
            (
                "measured",
                f"steps took {cost.MEASURED[0]:.2f} to {cost.MEASURED[1]:.2f} times this share under CUDA graphs, "
                "and more where the GPU waits for the host (docs/performance.md)",
            ),
            ("break-even", f"ω = 1 + c / (3 m (1 + η)) = {c.break_even:.3f}, m the fraction kept"),
            ("", self.break_even_in_words()),
        ]

    def break_even_in_words(self) -> str:
        """What ω asks of the selected rows, in a sentence."""
        if self.router is None:
            return "Without a router a step costs what a smaller batch costs; nothing has to be earned back."
        what = {"sequence": "rows", "segment": "documents"}.get("+".join(self.amounts), "tokens")
        return (
            f"Scoring pays if a step on the selected {what} is worth more than {self.cost.break_even:.2f} steps "
            f"on equally many random {what}."
        )


def latest_plan(runtime: Runtime) -> Plan:
    """The plan of the last capture, and of the layers that train now.

    Raises:
        CannotOptimize: there is none.
    """
    if not runtime.plans:
        why = f" ({runtime.passive[-1]})" if runtime.passive else ""
        raise CannotOptimize(
            f"nothing captured yet{why}", hint="run one training step with labels or call cggr.explain"
        )
    return runtime.plans[-1].in_force


def _auto(runtime: Runtime, plan: Plan) -> str | None:
    if runtime.auto is None:
        return None
    if not runtime.counted:
        return "every row trains; nothing is decided until steps are counted (cggr.attach, CGGRCallback)"
    if not plan.routable:
        return "every row trains; a batch of one row leaves none to choose from"
    if plan.unscorable is not None:
        return f"every row trains; there are no scores: {plan.unscorable.reason}"
    return str(runtime.auto)


def _scope(runtime: Runtime) -> str | None:
    ranks, local = ranks_of(runtime.config), runtime.together.local_steps
    if ranks is None:
        return None
    apart = f"; in {local} steps each of its own, where their batches differed" if local else ""
    return f"{ranks.count} ranks select of the rows of all{apart}"


def _depth(runtime: Runtime) -> str | None:
    if not runtime.config.stages:
        return None
    stages = runtime.config.stages[runtime.growths :]
    return depth_text(stages, len(runtime.plans[-1].analysed.stack), runtime.config.grow)


def _stage_share(runtime: Runtime, stage: Cost) -> float | None:
    """The FLOPs of a step of the layers that train, of one of all; None where all do."""
    if runtime.stage is None:
        return None
    whole = cost.predict(runtime.plans[-1].analysed, 0, 1.0, runtime.in_force)
    return stage.forward_flops / max(whole.forward_flops, 1)


def _schedule(runtime: Runtime) -> str | None:
    if runtime.counted or runtime.auto is not None or not runtime.goes_by_steps:
        return None
    return "stands still until optimizer steps are counted (cggr.attach, CGGRCallback)"


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _row(label: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {label:<15} ", subsequent_indent=" " * 18)


def _flops(count: int) -> str:
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} FLOP"


def _share(flops: int, predicted: Cost) -> str:
    return f"{flops / max(predicted.forward_flops, 1):.1%}"
