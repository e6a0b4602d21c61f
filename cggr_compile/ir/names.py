"""What people call a node: its operator and its module; and how many there are of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from operator import getitem

import torch
from torch import fx

from cggr_compile.ir.program import PART, PROVIDER
from cggr_compile.torch_internals.dynamo import module_path


def operator_of(node: fx.Node) -> str:
    """`aten.add`, `cggr.score`, after lowering `cggr.score[reference]`; `input` and `output` for the graph's ends."""
    if PROVIDER in node.meta:
        name, _, provider = node.meta[PROVIDER].partition(": ")
        return f"{name}[{provider}]"
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return str(getattr(node.target, "__name__", node.target))


def operator_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operator is called."""
    return Counter(operator_of(node) for node in graph.nodes if node.op not in ("placeholder", "output"))


def module_of(node: fx.Node) -> str:
    """Path of the innermost module the node was traced in, `model.layers.3.mlp`, or an empty string."""
    return (modules_of(node) or [""])[-1]


def modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules the node was traced in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [module_path(path) for path, *_ in stack.values()]


def gathered_of(node: fx.Node) -> fx.Node | None:
    """The input whose whole a node is, where `unshard_parameters` gathered it."""
    if node.meta.get(PART) != "shards" or node.target is not getitem:
        return None
    finish, place = node.args
    return finish.args[1][place]


def part_sizes(graph: fx.Graph) -> dict[str, int]:
    """Nodes in each part, in order of appearance, placeholders and output left out."""
    return dict(Counter(node.meta[PART] for node in _calls(graph)))


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op not in ("placeholder", "output"))
