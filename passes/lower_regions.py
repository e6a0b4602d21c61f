"""Writes gradient mode, autocast and checkpointing back into the graph and returns a runnable module.

Each node carries the modes it runs under; a switch is emitted wherever two neighbours differ, and all are undone
before the outputs. A checkpointed region is a run of nodes with one `ac_graph_id`. Compilers that own a partitioner
(inductor, aot_eager) recompute by the nodes' tags; for a backend that runs the graph as it is, the region becomes a
submodule under `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from cggr_compile.program import PART, REGION, TRAINED_PARTS, Autocast, Program, Region

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
        setattr(root, name, member)
    graph = fx.Graph(root)
    writer = _Writer(graph)
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    for region, members in groupby(nodes, _checkpoint_id):
        run = list(members)
        if region is None or not checkpoints:
            writer.write(run)
        else:
            _outline(writer, root, f"checkpoint_{region}", run)
    writer.switch(Region())
    graph.output(fx.map_arg(program.output.args[0], lambda old: writer.env[old]))
    graph.lint()
    return fx.GraphModule(root, graph)


def _attributes(program: Program) -> list[tuple[str, Any]]:
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    return [(name, getattr(program.root, name)) for name in sorted(names)]


def _checkpoint_id(node: fx.Node) -> int | None:
    """The checkpointed region of a node; the router keeps no activations, so its copies are in none."""
    return node.meta.get("ac_graph_id") if node.meta[PART] in TRAINED_PARTS else None


class _Writer:
    """Copies nodes into a graph, emitting mode switches between them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.env: dict[fx.Node, fx.Node] = {}
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


def _outline(writer: _Writer, root: nn.Module, name: str, run: list[fx.Node]) -> None:
    """Moves a run of nodes into a submodule that is called through `torch.utils.checkpoint`."""
    inside = set(run)
    taken = list(dict.fromkeys(s for node in run for s in node.all_input_nodes if s not in inside))
    given = [node for node in run if any(user not in inside for user in node.users)]
    body = fx.Graph(root)
    inner = _Writer(body)
    for node in taken:
        inner.env[node] = body.placeholder(node.name)
    inner.write(run)
    inner.switch(Region())
    body.output(tuple(inner.env[node] for node in given))
    setattr(root, name, fx.GraphModule(root, body))
    writer.switch(Region())
    module = writer.graph.get_attr(name)
    outputs = writer.graph.call_function(_checkpointed, (module, *(writer.env[node] for node in taken)))
    for index, node in enumerate(given):
        writer.env[node] = writer.graph.call_function(_item, (outputs, index))


def _checkpointed(body: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(body, *inputs, use_reentrant=False)


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
