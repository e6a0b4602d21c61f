"""Writes gradient mode, autocast and checkpointing back into the graph and returns a runnable module.

Each node carries the modes it runs under; a switch is emitted wherever two neighbours differ, and all are undone
before the outputs. A checkpointed region is a run of nodes with one `ac_graph_id`. Compilers that own a partitioner
(inductor, aot_eager) recompute by the nodes' tags; for a backend that runs the graph as it is, the region becomes a
submodule under `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from cggr_compile.passes.lower.outline_layers import is_size
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from cggr_compile.ir.amounts import concrete
from cggr_compile.ir.dataflow import recomputation
from cggr_compile.ir.program import PART, REGION, TRAINED_PARTS, Autocast, Program, Region, value
from cggr_compile.ir.size_nodes import emit_size

_enter_autocast = torch.amp.autocast_mode._enter_autocast
_exit_autocast = torch.amp.autocast_mode._exit_autocast


def lower_regions(program: Program, checkpoints: bool) -> fx.GraphModule:
    """The runnable module of a lowered program.

    Args:
        program: its cggr operators must be lowered already.
        checkpoints: whether checkpointed regions become calls of `torch.utils.checkpoint`.
    """
    root = nn.Module()
    for name, member in _attributes(program):
        _give(root, name, member)
    graph = fx.Graph(root)
    writer = _Writer(graph)
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    for place, (region, members) in enumerate(groupby(nodes, _checkpoint_id)):
        run = list(members)
        if region is None or not checkpoints:
            writer.write(run)
        else:  # a region in which a pass put nodes of none is several runs
            _outline(writer, root, f"checkpoint_{place}", run)
    writer.switch(Region())
    graph.output(fx.map_arg(program.output.args[0], lambda old: writer.env[old]))
    graph.lint()
    return fx.GraphModule(root, graph)


def lower_pieces(
    program: Program,
    pieces: Sequence[Sequence[fx.Node]],
    sizes: Mapping[Any, int],
    compiled: Callable[[Body], Callable[..., Any]],
    symbols: Sequence[Any] = (),
) -> fx.GraphModule:
    """The runnable module of a lowered program in pieces (`outline_layers`): it calls `compiled(body)` for the body of
    each.

    The program's symbols are numbers, by `sizes`, or else `symbols`: inputs of the module and of every body, in front
    of the others.
    """
    root = nn.Module()
    graph = fx.Graph(root)
    unknown = _Unknown(graph, symbols)
    env: dict[fx.Node, Any] = {}
    known: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
        if is_size(node):
            expression = program.expression(value(node))
            known[node] = expression if symbols else concrete(expression, sizes)
        if node.op == "get_attr":
            member = getattr(program.root, str(node.target))
            _give(root, str(node.target), member)
            if not isinstance(member, nn.Module):
                env[node] = graph.get_attr(str(node.target))
    for run in pieces:
        body = Body(program.root, run, known, symbols)
        call = graph.call_function(compiled(body), (*unknown.inputs, *(env[node] for node in body.taken)))
        for place, node in enumerate(body.given):
            env[node] = graph.call_function(_item, (call, place))
    graph.output(fx.map_arg(program.output.args[0], lambda old: unknown.size(known[old]) if old in known else env[old]))
    graph.lint()
    return fx.GraphModule(root, graph)


class _Unknown:
    """The symbols that are inputs of a graph, and sizes in terms of them."""

    def __init__(self, graph: fx.Graph, symbols: Sequence[Any]) -> None:
        self._graph = graph
        self.inputs = [graph.placeholder(f"size_{index}") for index in range(len(symbols))]
        self._sizes: dict[Any, fx.Node | int] = dict(zip(symbols, self.inputs, strict=True))

    def size(self, expression: Any) -> fx.Node | int:
        """A size as a node, or the number that it is."""
        if isinstance(expression, int):
            return expression
        if expression not in self._sizes:
            self._sizes[expression] = emit_size(self, expression, self._sizes)
        return self._sizes[expression]

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Adds a call to the graph."""
        return self._graph.call_function(target, args)


def _attributes(program: Program) -> list[tuple[str, Any]]:
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    return [(name, getattr(program.root, name)) for name in sorted(names)]


def _give(root: nn.Module, name: str, member: Any) -> None:
    """A module or a tensor under its name; a tensor as a buffer, which `fx.GraphModule` makes of it."""
    if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
        root.register_buffer(name, member)
    else:
        setattr(root, name, member)


def _checkpoint_id(node: fx.Node) -> int | None:
    """The checkpointed region of a node; the router keeps no activations, so its copies are in none."""
    return node.meta.get("ac_graph_id") if node.meta[PART] in TRAINED_PARTS else None


class _Writer:
    """Copies nodes into a graph, emitting mode switches between them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.env: dict[fx.Node, Any] = {}
        self.current = Region()
        self.entered: list[fx.Node] = []

    def write(self, nodes: Sequence[fx.Node]) -> None:
        """Copies the nodes, each under its region."""
        for node in nodes:
            if node.op not in ("placeholder", "get_attr"):
                self.switch(node.meta[REGION])
            self.env[node] = self.graph.node_copy(node, lambda old: self.env[old])

    def switch(self, region: Region) -> None:
        """Leaves the autocasts that do not hold any more, enters the others, sets the gradient mode."""
        kept = _common_prefix(self.current.autocasts, region.autocasts)
        while len(self.entered) > kept:
            self.graph.call_function(_exit_autocast, (self.entered.pop(),))
        for cast in region.autocasts[kept:]:
            self.entered.append(self.graph.call_function(_enter_autocast, tuple(cast)))
        if (self.current.grad is False) != (region.grad is False):
            self.graph.call_function(torch._C._set_grad_enabled, (region.grad is not False,))
        self.current = region


def _common_prefix(left: tuple[Autocast, ...], right: tuple[Autocast, ...]) -> int:
    pairs = zip(left, right, strict=False)
    return next(
        (index for index, (a, b) in enumerate(pairs) if a != b),
        min(len(left), len(right)),
    )


class Body:
    """A run of nodes as a module of its own: `taken` are the values that it reads, `given` those that others read.

    Sizes that are `known`, as numbers or by `symbols`, which are inputs in front of the others, are written as that;
    submodules go where they are called.
    """

    def __init__(
        self, root: nn.Module, run: Sequence[fx.Node], known: Mapping[fx.Node, Any], symbols: Sequence[Any] = ()
    ) -> None:
        inside = set(run)
        outside = dict.fromkeys(s for node in run for s in node.all_input_nodes if s not in inside and s not in known)
        modules = [n for n in outside if n.op == "get_attr" and isinstance(getattr(root, str(n.target)), nn.Module)]
        self.taken = [node for node in outside if node not in modules]
        self.given = [node for node in run if any(user not in inside for user in node.users)]
        self._owner = nn.Module()
        self.graph = fx.Graph(self._owner)
        inner = _Writer(self.graph)
        unknown = _Unknown(self.graph, symbols)
        for node in self.taken:
            inner.env[node] = self.graph.placeholder(node.name)
        for node in (*modules, *(each for each in run if each.op == "get_attr")):
            _give(self._owner, str(node.target), getattr(root, str(node.target)))
        for node in modules:
            inner.env[node] = self.graph.get_attr(str(node.target))
        for size in dict.fromkeys(source for node in run for source in node.all_input_nodes if source in known):
            inner.env[size] = unknown.size(known[size])
        inner.write(run)
        inner.switch(Region())
        self.graph.output(tuple(inner.env[node] for node in self.given))

    @cached_property
    def module(self) -> fx.GraphModule:
        """The body, runnable."""
        return fx.GraphModule(self._owner, self.graph)

    def text(self) -> str:
        """The body without names: equal texts compute the same."""
        nodes = list(self.graph.nodes)
        names = {node: f"%{index}" for index, node in enumerate(nodes)}
        lines = []
        for node, checkpointed in zip(nodes, recomputation(nodes), strict=True):
            target = "" if node.op == "placeholder" else str(node.target)
            given = fx.map_arg((node.args, node.kwargs), lambda old: _Name(names[old]))
            lines.append(f"{node.op} {target} {given} {checkpointed}")
        return "\n".join(lines)


class _Name(str):
    """A node's name among arguments: not a string that the node is given."""

    def __repr__(self) -> str:
        return str(self)


def _outline(writer: _Writer, root: nn.Module, name: str, run: list[fx.Node]) -> None:
    """Moves a run of nodes into a submodule that is called through `torch.utils.checkpoint`."""
    body = Body(root, run, {})
    setattr(root, name, body.module)
    writer.switch(Region())
    module = writer.graph.get_attr(name)
    outputs = writer.graph.call_function(_checkpointed, (module, *(writer.env[node] for node in body.taken)))
    for index, node in enumerate(body.given):
        writer.env[node] = writer.graph.call_function(_item, (outputs, index))


def _checkpointed(body: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(body, *inputs, use_reentrant=False)


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
