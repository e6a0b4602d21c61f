"""`Diff`: a rewrite shown three times, in the model's terms, as operator counts, and line by line.

Lines are matched by their key, in which k reads B, so a node that only changed its number of rows is one line marked
`~` and what remains as `-` and `+` is what the passes really did.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

from torch import fx

from cggr_compile.inspection.graph_text import GraphText
from cggr_compile.inspection.page import render
from cggr_compile.inspection.report import Report, latest_plan
from cggr_compile.inspection.rows import LEGEND, Row, compare, count_lines, unified
from cggr_compile.inspection.wording import (
    WHAT,
    formula,
    layer_range,
    middle_text,
    others_text,
    schedule_text,
    score_text,
    tail_text,
)
from cggr_compile.ir.dataflow import descendants
from cggr_compile.ir.names import operator_counts
from cggr_compile.ir.program import value
from cggr_compile.kernels.reference.selection import rule_name
from cggr_compile.run.plan import Plan
from cggr_compile.run.runtime import Runtime


class Diff:
    """The rewrite of one plan: `summary()`, `op_counts()`, `rows()`; `str()`, `to_json()` and `to_html()` for all."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan = plan
        self.report = report

    @classmethod
    def of(cls, runtime: Runtime) -> Diff:
        """The diff of a runtime's latest plan.

        Raises:
            CannotOptimize: nothing was captured yet.
        """
        return cls(latest_plan(runtime), Report.of(runtime))

    @cached_property
    def _text(self) -> GraphText:
        return GraphText(self.plan)

    def rows(self) -> list[Row]:
        """Every line of the captured and of the rewritten graph."""
        return self._rows

    @cached_property
    def _rows(self) -> list[Row]:
        return compare(self._text.lines(self.plan.captured.graph), self._text.lines(self.plan.program.graph))

    def pass_rows(self) -> Iterator[tuple[str, list[Row]]]:
        """For each pass that rewrote the graph: its name and the lines before and after it."""
        snapshots = self.plan.program.snapshots
        before = self._text.lines(snapshots[0].graph)
        for last, snapshot in pairwise(snapshots):
            if snapshot.graph is not last.graph:
                after = self._text.lines(snapshot.graph)
                yield snapshot.name, compare(before, after)
                before = after

    def op_counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """For each pass, the operators whose number it changed: before and after."""
        counts: dict[str, dict[str, tuple[int, int]]] = {}
        snapshots = self.plan.program.snapshots
        for last, snapshot in pairwise(snapshots):
            before, after = operator_counts(last.graph), operator_counts(snapshot.graph)
            counts[snapshot.name] = {
                name: (before[name], after[name])
                for name in sorted(before.keys() | after.keys())
                if before[name] != after[name]
            }
        return counts

    def summary(self) -> str:
        """The rewrite in the model's terms, a line for each change."""
        report = self.report
        lines = [] if report.depth is None else [f"depth: {report.depth}"]
        lines += [] if report.routed else [f"routing: none, {report.unrouted}"]
        lines += [*self._added(), *self._changed()]
        dropped = self._dropped_outputs()
        if dropped:
            lines.append(f"- outputs dropped: {', '.join(dropped)}")
        return "\n".join(lines)

    def _added(self) -> Iterator[str]:
        config, program = self.plan.owner.in_force, self.plan.program
        routing = program.routing
        if routing.router_layers:
            analysed = self.plan.analysed
            assert self.report.router is not None
            path = f" ({analysed.stack.path})" if analysed.stack.path else ""
            yield (
                f"+ router: {layer_range(routing.router_layers)} of {len(analysed.stack)}{path}, "
                f"{tail_text(self.report.router.tail)}head; {self.report.router.body}; shared weights, no gradient"
            )
            yield f"+ score: {config.scoring}, {self.report.router.head}, fp32, {score_text(config.route)}"
        unsure = ", more while the router is unsure" if config.follows_confidence else ""
        for route in config.routes if self.plan.selects else ():
            schedule = schedule_text(config.warmup_steps, config.dense_after_steps) + unsure
            what = "" if route == "sequence" else f" {WHAT[route]}"
            yield f"+ select: {rule_name(config.selection)}, {formula(route, config.ratio)}{what}{schedule}"
        by_dim: defaultdict[int, list[str]] = defaultdict(list)
        for path, dim in routing.gathered:
            by_dim[dim].append(path)
        for dim, paths in by_dim.items():
            yield f"inputs gathered: {', '.join(paths)} (dim {dim}: {self._size} → k)"
        for entry in routing.shortened:
            yield f"S → k: {entry}"

    @property
    def _size(self) -> str:
        """What becomes k where inputs are gathered."""
        return "B" if self.plan.program.routing.rows is not None else "S"

    def _changed(self) -> Iterator[str]:
        lines = self._text.lines(self.plan.program.graph)
        config = self.plan.owner.config
        if self.plan.program.routing.gathered:
            resized = sum(line.text != line.key for line in lines if line.part == "main")
            yield f"~ main pass: {self._size} → k in {resized:,} nodes"
        if self.plan.program.routing.shortened:
            options, nodes = self.report.config, f"{len(self.plan.program.routing.shortened)} of cggr.grouped_mlp"
            if config.skip == "layers":
                nodes = f"{sum(line.text != line.key for line in lines if line.part == 'middle'):,} nodes"
            layers = middle_text(options, len(self.plan.analysed.stack))
            yield f"~ {layers}: S → k in {nodes}; {others_text(options)}"
        if self.report.float8 is not None:
            yield f"~ float8: {self.report.float8}"
        logits = "logits kept" if config.keep_logits else "no logits"
        rows = " on the kept tokens" if self.plan.program.routing.loss_rows is not None else ""
        operator = next(name for name, _ in self.plan.program.routing.providers if name.endswith("_loss"))
        yield f"~ loss: cross-entropy over logits → cggr.{operator}{rows} ({logits})"

    def _dropped_outputs(self) -> list[str]:
        """The model's outputs that the rewritten graph no longer returns: those of the logits by name, else by type."""
        of_head = descendants([self.plan.analysed.head.linear])
        dropped = [
            "logits" if old in of_head else self._text.shape(value(old))
            for old, new in zip(self.plan.analysed.outputs, self.plan.program.outputs, strict=False)
            if isinstance(old, fx.Node) and new is None
        ]
        return [name if count == 1 else f"{count} × {name}" for name, count in Counter(dropped).items()]

    def __str__(self) -> str:
        parts = [self.summary(), "", "operators"]
        for name, counts in self.op_counts().items():
            parts += [f"  {name}", *(f"    {line}" for line in count_lines(counts))] if counts else []
        parts += ["", f"graph ({LEGEND})", *unified(self.rows())]
        return "\n".join(parts)

    def to_json(self) -> str:
        """Summary lines, operator counts and diff lines as JSON."""
        return json.dumps(
            {
                "summary": self.summary().splitlines(),
                "op_counts": self.op_counts(),
                "legend": LEGEND,
                "graph": [str(row) for row in self.rows()],
            },
            indent=1,
            ensure_ascii=False,
        )

    def to_html(self) -> str:
        """One self-contained page: summary, figure, report, operator counts, diff by pass and in full."""
        return render(self)
