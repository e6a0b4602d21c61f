"""Private corners of `make_fx`: calls written into the graph under way, values that stand for their results, what
functionalises, and the nodes that enter and leave vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import predispatch
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    disable_functional_mode,
    dispatch_functionalize,
)
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_slot, make_fx, set_proxy_slot
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

__all__ = [
    "FunctionalTensor",
    "changes_of",
    "disable_functional_mode",
    "enable_python_dispatcher",
    "enters_vmap",
    "functional_graph",
    "is_changed",
    "leaves_vmap",
    "memories_of",
    "trace_call",
    "traced_node",
    "track",
    "unobserved",
]


def unobserved() -> Any:
    """Keeps a trace's function modes from what is done within: they would see every attribute that is read."""
    return torch._C.DisableTorchFunction()


def traced_node(tracer: Any, value: Any) -> fx.Node | None:
    """The node that stands for a tensor or a symbolic number in the trace under way, made where a number is waiting to
    be used; None for a tensor that is not traced, or is a constant."""
    slot = get_proxy_slot(value, tracer, None)
    if not isinstance(value, torch.Tensor):
        return slot if slot is None else slot.force().node
    return None if slot is None or slot.constant is not None else slot.proxy.node


def trace_call(tracer: Any, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
    """Adds a call to the trace under way without running it, named as the tracer names those that run. What the tracer
    keeps of the arguments' values for some operators (`eager_input_vals`) it does not look for."""
    packet = getattr(target, "overloadpacket", target)
    name = tracer.graph._target_to_str(packet.__name__)
    return fx.Tracer.create_node(tracer, "call_function", target, args, kwargs, name)


def track(tracer: Any, tensor: torch.Tensor, node: fx.Node) -> None:
    """Makes a node stand for a tensor in the trace under way. Its sizes are not tracked: they are another's."""
    set_proxy_slot(tensor, tracer, _ProxyTensor(tracer.proxy(node), None))


def is_changed(value: Any) -> bool:
    """Whether what runs under functionalisation has changed this argument of it in place."""
    if not isinstance(value, FunctionalTensor):
        return False
    torch._sync(value)
    return bool(torch._functionalize_has_data_mutation(value.elem))


def changes_of(value: Any) -> list[int]:
    """How often the memory of each tensor among the leaves of a value was changed, under functionalisation."""
    return [torch._functionalize_mutation_counter(x.elem) for x in _functional(value)]


def memories_of(value: Any) -> list[StorageWeakRef]:
    """What functionalisation takes for the memory of each tensor among the leaves of a value."""
    return [StorageWeakRef(x.elem.untyped_storage()) for x in _functional(value)]


def _functional(value: Any) -> list[FunctionalTensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, FunctionalTensor) and x.elem.layout == torch.strided]


def functional_graph(
    function: Callable[..., Any], args: Sequence[Any], decompositions: dict[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """The functional ATen graph of a function that changes tensors in place, in front of autograd."""
    with enable_python_dispatcher():
        functionalized = dispatch_functionalize(function, FunctionalTensorMode(pre_dispatch=True, export=True))
        return make_fx(functionalized, decompositions, pre_dispatch=True, tracing_mode="real")(*args)


def enters_vmap(node: fx.Node) -> bool:
    """Whether what follows a node of Dynamo's graph runs under one more vmap."""
    return node.target is predispatch._vmap_increment_nesting


def leaves_vmap(node: fx.Node) -> bool:
    """Whether what follows a node of Dynamo's graph runs under one vmap less."""
    return node.target is predispatch._vmap_decrement_nesting
