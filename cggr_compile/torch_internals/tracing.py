"""Private corners of `make_fx`: calls written into the graph under way, and values that stand for their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_slot, set_proxy_slot


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
    """Adds a call to the trace under way without running it, named as the tracer names those that run."""
    packet = getattr(target, "overloadpacket", target)
    name = tracer.graph._target_to_str(packet.__name__)
    return tracer.create_node("call_function", target, args, kwargs, name)


def track(tracer: Any, tensor: torch.Tensor, node: fx.Node) -> None:
    """Makes a node stand for a tensor in the trace under way. Its sizes are not tracked: they are another's."""
    set_proxy_slot(tensor, tracer, _ProxyTensor(tracer.proxy(node), None))


def is_changed(value: Any) -> bool:
    """Whether what runs under functionalisation has changed this argument of it in place."""
    if not isinstance(value, FunctionalTensor):
        return False
    torch._sync(value)
    return bool(torch._functionalize_has_data_mutation(value.elem))
