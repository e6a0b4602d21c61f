"""Changes of a tensor that nobody else knows, told as new tensors.

A graph with a call that changes a tensor in place is functionalised as a whole, and then every call of it is traced.
That is not needed where the tensor was computed in the graph and no other value of it lies in the same memory: the
call gives the changed tensor as a new one, and what reads the tensor afterwards reads that one. Mixtures of experts
undo a sort so, and add biases. What else changes anything stays as it is.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from cggr_compile.capture.copies import Mutation
from cggr_compile.capture.memory import Memory, memory_of
from cggr_compile.torch_internals.fake_tensors import FakeTensor


def _with_entries(x: torch.Tensor, index: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    masks = index.dtype in (torch.bool, torch.uint8)
    if entries.dim() > x.dim() + (1 - index.dim() if masks else index.dim() - 1):
        raise Mutation  # an assignment leaves out leading dimensions of 1
    return x.index_put((index,), entries)


def _new(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def changed(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = function(x, *args, **kwargs)
        if (result.dtype, result.shape) != (x.dtype, x.shape) or (x.requires_grad and not torch.is_grad_enabled()):
            raise Mutation
        return result

    return changed


_INSTEAD = {
    operator.setitem: _new(_with_entries),
    operator.iadd: _new(operator.add),
    operator.imul: _new(operator.mul),
    operator.itruediv: _new(operator.truediv),
    "add_": _new(torch.add),
    "masked_fill_": _new(torch.masked_fill),
    "scatter_add_": _new(torch.scatter_add),
}


def out_of_place(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph with such changes as calls that give new tensors; itself where it has none.

    Raises, as it runs:
        Mutation: a call would give what does not fit the tensor: of another dtype or shape, without its gradients.
    """
    changes = _changes_of_own(gm.graph)
    if not changes:
        return gm
    graph = fx.Graph(gm)
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda old: env[old])
        if node in changes:
            new = env[node]
            new.op, new.target = "call_function", _INSTEAD[node.target]
            env.update(dict.fromkeys(changes[node], new))
    return fx.GraphModule(gm, graph)


def _changes_of_own(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The calls that change a tensor of the graph's own, each with the nodes that name the tensor."""
    lying: dict[Memory, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        known = node.args[0] if _is_change(node) else node  # what is assigned to gives nothing
        parts = known.meta.get("example_value") if isinstance(known, fx.Node) else None
        opaque = _may_give_its_arguments(node)
        if isinstance(parts, tuple) and not opaque and all(user.target is operator.getitem for user in node.users):
            continue  # its parts are nodes of their own
        tensors = [x for x in pytree.tree_leaves(parts) if isinstance(x, torch.Tensor)]
        under_vmap = not all(isinstance(x, FakeTensor) for x in tensors)
        if opaque or under_vmap:
            tensors += [source.meta.get("example_value") for source in node.all_input_nodes]
        for memory in {memory_of(x) for x in tensors if isinstance(x, FakeTensor)} - {None}:
            lying[memory].append(node)
    changes = {}
    for made, *others in lying.values():
        places = [place for place, other in enumerate(others, 1) if _is_change(other)]
        names = [made, *others][: places[-1] + 1] if places else []  # what reads it afterwards may be a view
        if made.op.startswith("call") and not _may_give_its_arguments(made) and len(names) == len(places) + 1:
            changes.update(dict.fromkeys(names[1:], names))
    return changes


def _is_change(node: fx.Node) -> bool:
    """Whether a call has a form that gives a new tensor; what is assigned to slices, for one, has none."""
    if node.target is not operator.setitem:
        return node.target in _INSTEAD
    given = [arg.meta.get("example_value") if isinstance(arg, fx.Node) else None for arg in node.args[1:]]
    return all(isinstance(x, torch.Tensor) for x in given)


def _may_give_its_arguments(node: fx.Node) -> bool:
    """Whether a result may be an argument itself though it is not on fake tensors: of a dropout that drops nothing, or
    of a checkpointed region, which may end with one."""
    made = node.args[0] if node.target is operator.getitem else node
    target = made.target if isinstance(made, fx.Node) else None
    return "dropout" in getattr(target, "__name__", "") or isinstance(target, torch._ops.HigherOrderOperator)
