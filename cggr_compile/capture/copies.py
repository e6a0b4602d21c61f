"""Calls that are alike, traced once: the layers of a stack repeat the operators of the first.

Tracing a call runs its operators on fake tensors; where sizes are symbols, that is most of what a trace costs. What a
call records depends on its target, its constants, the modes in force and what a fake run sees of its tensors and
numbers. A call that equals an earlier one in all of these gets a copy of the nodes that the earlier one recorded, which
reads its own arguments. The tracer makes the copies under the Dynamo node at hand, so their place in the model (module
stack, stack trace, checkpointed region) is their own; the tensors that they give are fresh, and tracked as computed
ones are, so the trace goes on from them as usual.

Replayed are calls of torch's own functions that record functional operators and give nothing but tensors. All others
are traced: higher-order operators, calls that give numbers, sizes that are read from data, tensor constants. A mutation
ends the trace (`Mutation`): a view that was replayed does not share its base's gradient history, and a graph that
mutates is traced otherwise anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from cggr_compile.capture.alike import described, is_torchs, modes_of, pattern_of, values_of
from cggr_compile.torch_internals import fake_tensors, symbols, tracing
from cggr_compile.torch_internals.fake_tensors import FakeTensor

# What of a node's meta comes from running it; the rest says where it stands, which the tracer writes.
_RESULTS = ("val", "tensor_meta", "original_aten", "eager_input_vals", "low_precision_pointwise_barrier")


class Mutation(Exception):
    """The trace recorded an operator that mutates."""


def mutates(node: fx.Node) -> bool:
    """Whether the node calls an operator that mutates an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class Replayer(fx.Interpreter):
    """Runs a graph for tracing; with `calls`, those of its calls that are alike are traced once."""

    def __init__(self, gm: fx.GraphModule, calls: Calls | None = None) -> None:
        super().__init__(gm)
        self.calls = calls

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.calls is None or not is_torchs(target):
            return super().call_function(target, args, kwargs)
        return self.calls.run(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.calls is None:
            return super().call_method(target, args, kwargs)
        return self.calls.run(super().call_method, target, args, kwargs)


@dataclass(frozen=True)
class _Output:
    """An output that a call computed: its node, a copy of its value and whether it requires grad."""

    node: fx.Node
    value: torch.Tensor
    requires_grad: bool


@dataclass(frozen=True)
class _Recorded:
    """What a call recorded: `nodes`, where `inputs` are the nodes of its tensors and symbolic numbers.

    `rebound` has, by the place of an input, the node that stands for it afterwards (some operators return their
    input); `outputs` has for each output the place of the input that it is, or how it was computed.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rebound: dict[int, fx.Node]
    outputs: tuple[int | _Output, ...]
    structure: pytree.TreeSpec


class Calls:
    """The calls of one trace; `replayed` counts those that were not traced."""

    def __init__(self) -> None:
        self.replayed = 0
        self._recorded: dict[Any, _Recorded | None] = {}

    def run(self, call: Callable[..., Any], target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`call(target, args, kwargs)`, traced or replayed.

        Raises:
            Mutation: the call mutates a tensor.
        """
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        with tracing.unobserved():
            key, values, nodes = _compared(tracer, target, args, kwargs)
            recorded = self._recorded.get(key)
            if recorded is not None:
                self.replayed += 1
                return _replay(recorded, tracer, values, nodes)
        last = next(iter(reversed(tracer.graph.nodes)))
        result = call(target, args, kwargs)
        created = tuple(_after(last))
        if any(map(mutates, created)):
            raise Mutation
        if key is not None and key not in self._recorded:
            with tracing.unobserved():
                unchanged = key[-1] == described((args, kwargs))
                self._recorded[key] = _record(tracer, created, values, nodes, result) if unchanged else None
        return result


def _compared(
    tracer: Any, target: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, list[Any], tuple[fx.Node, ...]]:
    """What alike calls have in common (None: the call is like no other), the tensors and symbolic numbers of this one,
    and their nodes."""
    values = values_of((args, kwargs))
    if values is None or any(map(_is_constant, values)):
        return None, [], ()
    nodes = tuple(tracing.traced_node(tracer, value) for value in values)
    if None in nodes:
        return None, [], ()
    key = (target, modes_of(values), pattern_of(nodes), pattern_of(map(id, values)), described((args, kwargs)))
    return key, values, nodes


def _is_constant(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and bool(value.node.expr.is_number)


def _after(last: fx.Node) -> Iterator[fx.Node]:
    node = last.next
    while node.op != "root":
        yield node
        node = node.next


def _record(
    tracer: Any, nodes: tuple[fx.Node, ...], values: list[Any], inputs: tuple[fx.Node, ...], result: Any
) -> _Recorded | None:
    """What the call recorded; None where it cannot be replayed."""
    nodes = tuple(_live(nodes))
    known = {*nodes, *inputs}
    if not all(_is_plain(node) for node in nodes):
        return None
    if not all(node in known or node.op == "placeholder" for made in nodes for node in made.all_input_nodes):
        return None
    after = [tracing.traced_node(tracer, value) for value in values]
    rebound = {place: node for place, node in enumerate(after) if node is not inputs[place]}
    leaves, structure = pytree.tree_flatten(result)
    found = [_output(tracer, leaf, values) for leaf in leaves]
    outputs = tuple(output for output in found if output is not None)
    computed = [output.node for output in outputs if isinstance(output, _Output)]
    if (
        not outputs
        or None in found
        or len(set(computed)) < len(computed)
        or not {*computed, *rebound.values()} <= set(nodes)
    ):
        return None
    if symbols.data_symbols((values, leaves, [node.meta["val"] for node in nodes])):
        return None
    return _Recorded(nodes, inputs, rebound, outputs, structure)


def _live(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The nodes without those for sizes that were looked up in vain, which the tracer drops in the end; numbers that
    are read from data stay."""
    live: list[fx.Node] = []
    read: set[fx.Node] = set()
    for node in reversed(nodes):
        val = node.meta.get("val")
        is_size = isinstance(val, (torch.SymInt, torch.SymBool)) and not symbols.data_symbols(val)
        if node in read or not is_size:
            live.append(node)
            read.update(node.all_input_nodes)
    return live[::-1]


def _is_plain(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return False
    return all(isinstance(part, FakeTensor) for part in pytree.tree_leaves(node.meta.get("val")))


def _output(tracer: Any, leaf: Any, values: list[Any]) -> int | _Output | None:
    place = next((place for place, value in enumerate(values) if value is leaf), None)
    if place is not None or type(leaf) is not FakeTensor:
        return place
    node = tracing.traced_node(tracer, leaf)
    if leaf.requires_grad and not torch.is_grad_enabled():
        return None
    return None if node is None else _Output(node, fake_tensors.copy_of_fake(leaf, False), leaf.requires_grad)


def _replay(recorded: _Recorded, tracer: Any, values: list[Any], inputs: tuple[fx.Node, ...]) -> Any:
    copies = dict(zip(recorded.inputs, inputs, strict=True))
    for node in recorded.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda old: copies.get(old, old))
        copies[node] = tracing.trace_call(tracer, node.target, args, kwargs)
        copies[node].meta.update({name: node.meta[name] for name in _RESULTS if name in node.meta})
    for place, node in recorded.rebound.items():
        tracing.track(tracer, values[place], copies[node])
    leaves = []
    for output in recorded.outputs:
        if isinstance(output, _Output):
            fresh = fake_tensors.copy_of_fake(output.value, output.requires_grad)
            tracing.track(tracer, fresh, copies[output.node])
            leaves.append(fresh)
        else:
            leaves.append(values[output])
    return pytree.tree_unflatten(leaves, recorded.structure)
