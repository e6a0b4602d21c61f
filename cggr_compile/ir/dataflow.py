"""Dataflow primitives: what depends on what, which values are on every path, and copying with substitution."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx

from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import TRAINED_PARTS, is_tensor, value
from cggr_compile.torch_internals import symbols

aten = torch.ops.aten


def ancestors(
    roots: Iterable[fx.Node],
    stop: Collection[fx.Node] = (),
    through: Callable[[fx.Node], bool] = lambda node: True,
) -> set[fx.Node]:
    """The roots and everything they are computed from through nodes that satisfy `through`; the search does not go past
    `stop` (which is left out)."""
    found: set[fx.Node] = set()
    stack = [root for root in roots if root not in stop]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [source for source in node.all_input_nodes if source not in stop and through(source)]
    return found


def descendants(roots: Iterable[fx.Node], through: Callable[[fx.Node], bool] = lambda node: True) -> set[fx.Node]:
    """The roots and everything computed from them through nodes that satisfy `through`."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [user for user in node.users if through(user)]
    return found


def recomputation(nodes: Iterable[fx.Node]) -> list[str]:
    """What checkpoints ask of each node: its policy and the number of its region, counted in order of appearance; empty
    outside. A partitioner goes by it, and no text of a graph holds it."""
    regions: dict[Any, int] = {}
    return [
        f"{node.meta['recompute']} {regions.setdefault(node.meta.get('ac_graph_id'), len(regions))}"
        if "recompute" in node.meta
        else ""
        for node in nodes
    ]


def cut_vertices(source: fx.Node | Collection[fx.Node], target: fx.Node) -> list[fx.Node]:
    """The tensors through which *every* path of activations from `source` to `target` passes, in execution order.

    Of several sources, those that run before a tensor are meant: all their paths pass through it.

    In execution order a node lies on every path exactly if no edge of the paths jumps over it: if an edge did, the
    path through that edge would avoid the node; if none does, every path must step on it. One sweep that remembers
    the farthest edge so far therefore finds them all. Edges through sizes carry no activation and do not count.
    """
    upstream = ancestors([target])
    downstream = descendants([source] if isinstance(source, fx.Node) else source, carries_activations)
    paths = [node for node in target.graph.nodes if node in upstream and node in downstream]
    position = {node: index for index, node in enumerate(paths)}
    cuts, farthest = [], 0
    for index, node in enumerate(paths):
        if farthest <= index and is_tensor(node):
            cuts.append(node)
        farthest = max([farthest, *(position[user] for user in node.users if user in position)])
    return cuts


def carries_activations(node: fx.Node) -> bool:
    """Whether a node passes activations on: tensors do, and lists of them (`split`, `topk`); sizes do not."""
    return is_tensor(node) or isinstance(value(node), (tuple, list))


def carries_data(node: fx.Node) -> bool:
    """Whether a node passes on what is computed of activations: also a number that was read from them."""
    return carries_activations(node) or bool(symbols.data_symbols(value(node)))


def clone(
    builder: Builder,
    roots: Iterable[fx.Node],
    substitution: dict[fx.Node, fx.Node],
    rewrite: Callable[[Builder, fx.Node, dict[fx.Node, fx.Node]], fx.Node | None] | None = None,
) -> dict[fx.Node, fx.Node]:
    """Copies into `builder` what the roots need, replacing some values; returns old node -> new node.

    Args:
        builder: receives the copies under its current region and part; placeholders and values already copied there
            are reused only through `substitution`.
        roots: nodes of the old graph to make available.
        substitution: old node -> new node; these are not copied, nor is what only they need.
        rewrite: may return another new node for an old one instead of the plain copy.

    Copies run under the gradient mode and autocasts of the original where the builder's region does not say more. A
    parameter that the forward changes is changed in a part that trains; others only read what it becomes.
    """
    env = dict(substitution)
    needed = ancestors(roots, stop=env)
    for node in next(iter(needed)).graph.nodes if needed else ():
        if node not in needed:
            continue
        if node.target is aten.copy_.default and builder.part not in TRAINED_PARTS:
            env[node] = env[node.args[1]]
            continue
        replacement = rewrite(builder, node, env) if rewrite is not None else None
        env[node] = replacement if replacement is not None else builder.copy_call(node, env)
    return env


def drop_unused(graph: fx.Graph) -> None:
    """Erases what nobody reads and what acts by no side effect; not in the bodies of calls, as torch's own does, which
    takes a call that changes something in place for one without effect."""
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)
