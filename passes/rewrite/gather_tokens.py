"""Runs the middle layers on the selected tokens of each sequence; the others pass on the residual.

What enters the layers is found by dataflow. `find_layers` proved that the residual is the only activation that crosses
a cut; whatever else a middle layer reads (masks, rotary tables, position biases, sizes) is loop-invariant and is given
to it *for the kept tokens*, by the symbols in its shape:

* a value with no dimension of the sequence's size S is the same for every subset and is read as it is;
* a size is recomputed with k in place of S, from its symbolic expression;
* a value with dimensions of size S is gathered along each of them, sequence by sequence. Its first dimension must be
  the batch; where it has none, broadcasting with the activations says where the batch belongs;
* a value that is the same at every token (zeros, an expanded parameter), or whose shape is derived from S (flattened
  tokens, heads folded into the batch), is computed again from what it is made of, down to values that can be gathered.

Anything else is refused. Positions are thus those of the whole sequence: rotary angles, windows and document
boundaries of the kept tokens do not change. What middle layers give out beside the residual (a mixture-of-experts'
statistics) continues on k tokens until no dimension depends on the sequence.

Before::

    main    %add_14 = … layers 1–28 of %add_4    # [B, S, D]

After::

    middle  %short = cggr.gather_tokens(%add_4, %positions, [1])    # [B, k, D]
    middle  %add_14 = … layers 1–28 of %short
    main    %whole = cggr.scatter_tokens(%add_4, %add_14, %positions)    # [B, S, D]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from cggr_compile.passes.rewrite.token_sizes import TokenSizes
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder, map_nodes
from cggr_compile.ir.dataflow import ancestors, carries_activations, carries_data, descendants
from cggr_compile.ir.program import ORIGIN, PART, Analysed, Layers, Region, Shortened, is_tensor, value
from cggr_compile.ir.roles import middle_layers, token_ids
from cggr_compile.ir.sequence_order import counts_tokens, indices_of, is_unrolled, order_dependence, packet_of
from cggr_compile.ir.token_shapes import COUNTERS, TokenShapes
from cggr_compile.torch_internals import symbols

aten = torch.ops.aten

_CHECKPOINT_TAGS = ("recompute", "ac_graph_id")


@dataclass
class Span:
    """Consecutive layers on one selection: the residual that enters and the one that leaves them, the nodes between,
    and, once the entry is copied, the positions [B, k]."""

    entry: fx.Node
    exit: fx.Node
    layers: range
    members: frozenset[fx.Node]
    positions: fx.Node | None = None
    forms: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What is computed on the kept tokens: captured node to copy."""
    read: dict[tuple[fx.Node, bool], fx.Node] = field(default_factory=dict)
    """What is read from elsewhere, in its form for the kept tokens; statistics read another one."""
    aligned: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    """What is gathered, by the dimensions that broadcasting adds in front."""


def gather_tokens(program: Analysed, config: RoutingConfig) -> Analysed:
    """Copies the middle layers onto the kept tokens and scatters their result back; sets `routing.shortened`.

    Raises:
        CannotOptimize: a value that enters the layers cannot be gathered without ambiguity, or a layer depends on the
            places of tokens and `allow_compressed_recurrence` is off.
    """
    return _Rewrite(program, config).run()


class _Rewrite:
    def __init__(self, program: Analysed, config: RoutingConfig) -> None:
        assert program.routing.positions is not None
        assert program.routing.kept_tokens is not None
        self.program = program
        self.config = config
        self.shapes = TokenShapes(program)
        self.builder = Builder(program)
        self.builder.renaming.put(value(program.routing.kept_tokens), program.sequence)
        self.spans = _spans(program, config)
        self.span_of = {node: span for span in self.spans for node in span.members}
        self.entries = {span.entry: span for span in self.spans}
        self.exits = {span.exit: span for span in self.spans}
        self.statistics = self._find_statistics()
        self.shortened: list[Shortened] = []
        self.sizes = TokenSizes(self.builder)

    def run(self) -> Analysed:
        builder = self.builder
        builder.copy_inputs()
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "output") or node in builder.env:
                continue
            if (span := self._span(node)) is None:
                self._copy_full(node)
            else:
                self._copy_short(node, span)
            if node in self.exits:
                self._leave(self.exits[node])
            if node in self.entries:
                self._enter(self.entries[node])
        builder.output(fx.map_arg(self.program.output.args[0], self._output))
        routing = builder.routing(shortened=tuple(self.shortened))
        return builder.finish("gather_tokens", routing=routing, layers=self._layers())

    # -- whole sequences -------------------------------------------------------------------------------------------

    def _span(self, node: fx.Node) -> Span | None:
        """The span on whose kept tokens a node is computed, or None for what is computed for the whole sequence."""
        return self.span_of.get(node) or self.statistics.get(node)

    def _find_statistics(self) -> dict[fx.Node, Span]:
        """What the middle layers give out beside the residual and all that is computed from it, up to where the loss
        joins: a mixture-of-experts' statistics. They are those of the kept tokens, in every layer that adds to them."""
        joined = descendants([self.program.head.loss])
        found: dict[fx.Node, Span] = {}
        for span in self.spans:
            given = span.members - {span.exit}
            readers = {user for node in given for user in node.users if user not in span.members}
            roots = [user for user in readers if user.op != "output" and carries_activations(user)]
            for node in descendants(roots, lambda user: user not in joined and user.op != "output"):
                if found.setdefault(node, span) is not span:
                    raise CannotOptimize(
                        "statistics of layers that run on different tokens come together",
                        node=node,
                        hint="use resample='block', or switch the auxiliary loss off (output_router_logits=False)",
                    )
        return found

    def _copy_full(self, node: fx.Node) -> None:
        """Copies a node, after what it needs that stands later in the graph."""
        builder, val = self.builder, value(node)
        ahead = any(source not in builder.env for source in node.all_input_nodes)
        if ahead and isinstance(val, torch.SymInt) and not symbols.data_symbols(val):
            builder.env[node] = self.sizes.write(val, short=False)
            return
        for source in node.all_input_nodes:
            self._ensure_full(source)
        builder.copy(node)

    def _ensure_full(self, node: fx.Node) -> None:
        """Copies a node ahead of its turn; it is in no checkpointed region then."""
        if self._span(node) is not None and node not in self.builder.env:
            raise CannotOptimize(
                f"a value of shape {self.shapes.text(node)}, which only the kept tokens have, is read for every token",
                node=node,
                hint="use route='sequence', or report it with this line",
            )
        if node not in self.builder.env:
            self._copy_full(node)
            _untag(self.builder.env[node])

    def _layers(self) -> Layers:
        """The stack, with the residuals of middle layers as the kept tokens have them."""
        return map_nodes(self.program.layers, self._output)

    def _output(self, node: fx.Node) -> fx.Node:
        """An output in the whole sequence's form, or, where only the kept tokens have it, in theirs."""
        span = self._span(node)
        return span.forms[node] if span is not None and node not in self.builder.env else self.builder.env[node]

    # -- into and out of the layers --------------------------------------------------------------------------------

    def _enter(self, span: Span) -> None:
        """Gathers everything that the span reads, ahead of its nodes, so that its layers stay in one piece."""
        assert self.program.routing.positions is not None
        builder = self.builder
        builder.part, builder.region = "middle", Region()
        span.positions = builder.env[self.program.routing.positions]
        if self.config.resample == "layer":
            index = self.spans.index(span)
            span.positions = builder.call(aten.select.int, span.positions, 0, index)
        span.forms[span.entry] = self._gathered(span.entry, span, 0)
        for node in self.program.graph.nodes:
            if node in span.members:
                for source in node.all_input_nodes:
                    if source not in span.members and source is not span.entry:
                        self._form(source, node, span, False)

    def _leave(self, span: Span) -> None:
        builder = self.builder
        builder.part, builder.region = "main", Region()
        full = builder.env[span.entry]
        target = torch.ops.cggr.scatter_tokens.default
        builder.env[span.exit] = builder.call(target, full, span.forms[span.exit], span.positions)

    def _copy_short(self, node: fx.Node, span: Span) -> None:
        if is_unrolled(self.program, node):
            raise CannotOptimize(
                f"{_layers(span.layers)} read every n-th token, as a scan does that is unrolled for the whole sequence",
                node=node,
                hint="keep such layers dense (first_layers, last_layers), or use route='sequence'",
            )
        refusal = order_dependence(self.program, node, span.members)
        if refusal is not None and not self.config.allow_compressed_recurrence:
            raise CannotOptimize(
                f"{_layers(span.layers)} mix tokens by their places: {refusal.reason}",
                node=node,
                hint="on the kept tokens it would meet other neighbours; allow_compressed_recurrence=True means that, "
                "or keep such layers dense (first_layers, last_layers), or use route='sequence'",
            )
        span.forms[node] = self._copied(node, self._sources(node, span, node in self.statistics))
        if not self.shapes.mentions_sequence(node):
            self.builder.env[node] = span.forms[node]

    def _copied(self, node: fx.Node, sources: dict[fx.Node, fx.Node]) -> fx.Node:
        self.builder.part, self.builder.region = "middle", Region()
        copy = self.builder.copy_call(node, sources)
        copy.meta[PART] = "middle"
        return copy

    # -- one value for the kept tokens -----------------------------------------------------------------------------

    def _sources(self, node: fx.Node, span: Span, counted: bool) -> dict[fx.Node, fx.Node]:
        return {source: self._form(source, node, span, counted) for source in node.all_input_nodes}

    def _form(self, node: fx.Node, reader: fx.Node, span: Span, counted: bool) -> fx.Node:
        """What `reader` reads in place of `node` on the kept tokens of a span; `counted` for statistics over tokens."""
        if node in span.forms:
            return span.forms[node]
        if (node, counted) in span.read:
            return span.read[node, counted]
        val = value(node)
        form: Any
        if not self._differs(node, counted):
            self._refuse_other_sizes(node)
            self._ensure_full(node)
            form = self.builder.env[node]
        elif isinstance(val, torch.SymInt):
            form = self.sizes.write(val, short=True)
        else:
            lead = self.shapes.lead(node, reader) if self.shapes.holds_tokens(node) else None
            if lead is not None:
                self._refuse_places(node, reader)
                return self._gathered(node, span, lead)
            form = self._recomputed(node, span, counted)
            if reader in span.members:
                self._record(node, (), "computed again for k tokens")
        span.read[node, counted] = form
        return form

    def _gathered(self, node: fx.Node, span: Span, lead: int) -> fx.Node:
        if (node, lead) not in span.aligned:
            self._ensure_full(node)
            builder = self.builder
            builder.part, builder.region = "middle", Region()
            dims = tuple(dim for dim, size in enumerate(value(node).shape) if self.shapes.is_sequence(size))
            target = torch.ops.cggr.gather_tokens.default
            span.aligned[node, lead] = builder.call(target, builder.env[node], span.positions, list(dims), lead)
            why = "the residual that enters" if node is span.entry else "read by"
            self._record(node, dims, f"{why} {_layers(span.layers)}")
        return span.aligned[node, lead]

    def _recomputed(self, node: fx.Node, span: Span, counted: bool) -> fx.Node:
        """The node again, on its sources' forms for the kept tokens."""
        counts = packet_of(node) in COUNTERS and not self.shapes.counts_flattened(node)
        makes_positions = counts or self.shapes.finds_places(node)
        by_place = order_dependence(self.program, node, span.members) is not None
        if node.op != "call_function" or makes_positions or by_place:
            raise CannotOptimize(
                f"cannot tell which tokens a value of shape {self.shapes.text(node)} is about, and "
                f"{_layers(span.layers)} depend on it",
                node=node,
                hint="values with tokens must be [batch, …] with dimensions of the sequence's length; "
                "use route='sequence', or report it with this line",
            )
        gathered = self._flattened(node, span) or self._repeated(node, span)
        if gathered is not None:
            return gathered
        form = self._copied(node, self._sources(node, span, counted))
        _untag(form)
        return form

    def _flattened(self, node: fx.Node, span: Span) -> fx.Node | None:
        """The form of a value [B · S, …] whose rows are the tokens of the batch in order."""
        if not (self.shapes.has_positions(node) and self.shapes.is_flattened(node)):
            return None
        self._ensure_full(node)
        builder = self.builder
        builder.part, builder.region = "main", Region()
        ids = builder.env[token_ids(self.program)]
        sizes = [builder.call(aten.sym_size.int, ids, dim) for dim in (0, 1)]
        rest = list(value(node).shape[1:])
        by_sequence = builder.call(aten.view.default, builder.env[node], [*sizes, *rest])
        builder.part = "middle"
        target = torch.ops.cggr.gather_tokens.default
        gathered = builder.call(target, by_sequence, span.positions, [1], 0)
        self._record(node, (0,), f"tokens of the batch, read by {_layers(span.layers)}")
        return builder.call(aten.flatten.using_ints, gathered, 0, 1)

    def _repeated(self, node: fx.Node, span: Span) -> fx.Node | None:
        """The form of a value without a batch that is repeated for every sequence, [c, …] to [B · c, …]: each
        sequence's repetition holds its own tokens."""
        if node.target != aten.repeat.default:
            return None
        source, times = node.args
        assert isinstance(source, fx.Node) and isinstance(times, (list, tuple))  # noqa: PT018
        factors = [value(factor) for factor in times]
        once = len(factors) == value(source).dim() and all(factor == 1 for factor in factors[1:])
        if not (once and self.shapes.is_batch(factors[0]) and self.shapes.holds_tokens(source)):
            return None
        if self.shapes.is_sequence(value(source).shape[0]):
            return None
        gathered = self._gathered(source, span, 1)
        self.builder.part, self.builder.region = "middle", Region()
        return self.builder.call(aten.flatten.using_ints, gathered, 0, 1)

    def _refuse_places(self, node: fx.Node, reader: fx.Node) -> None:
        """A gathered value holds the tokens' places in the whole sequence; as an index into the kept ones it is
        wrong."""
        if counts_tokens(self.program, reader) and node in indices_of(reader):
            raise CannotOptimize(
                f"{packet_of(reader)} reads the sequence at places given by a value of shape {self.shapes.text(node)}, "
                "which count in the whole sequence",
                node=reader,
                hint="the token route cannot translate places; use route='sequence'",
            )

    def _differs(self, node: fx.Node, counted: bool) -> bool:
        """Whether a value is another one for the kept tokens: one with a size that depends on S and, among what is
        counted over tokens, everything that is computed from tokens."""
        return self.shapes.mentions_sequence(node) or (
            counted and carries_activations(node) and self.shapes.has_positions(node)
        )

    def _refuse_other_sizes(self, node: fx.Node) -> None:
        """Refuses a tensor with a dimension of a dynamic size that is neither the batch's nor the sequence's."""
        for size in value(node).shape if is_tensor(node) else ():
            if isinstance(size, torch.SymInt) and not self.program.mentions(size, self.program.batch):
                raise CannotOptimize(
                    f"a value of shape {self.shapes.text(node)} has a dynamic size that is neither the batch's nor the "
                    "sequence's, so its tokens cannot be told",
                    node=node,
                    hint="use route='sequence'",
                )

    def _record(self, node: fx.Node, dims: tuple[int, ...], why: str) -> None:
        name = self.program.path(node) if node.op == "placeholder" else node.meta.get(ORIGIN, node.name)
        self.shortened.append(Shortened(name, self.shapes.text(node), dims, why))


def _spans(program: Analysed, config: RoutingConfig) -> list[Span]:
    middle = middle_layers(program, config)
    blocks = [middle] if config.resample == "block" else [range(layer, layer + 1) for layer in middle]
    residuals = program.stack.residuals
    spans = []
    for layers in blocks:
        first, last = residuals[layers[0] - 1], residuals[layers[-1]]
        inside, after = descendants([first], carries_data) - {first}, descendants([last], carries_data)
        checks = _effects_of(inside - after) - _effects_of(after)
        between = ancestors([last, *checks], stop=[first]) & (inside | checks)
        spans.append(Span(first, last, layers, frozenset(between)))
    return spans


def _effects_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The calls that read some of the nodes and give nothing on: assertions."""
    return {user for node in nodes for user in node.users if not user.users and user.op != "output"}


def _layers(layers: range) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"


def _untag(node: fx.Node) -> None:
    for tag in _CHECKPOINT_TAGS:
        node.meta.pop(tag, None)
