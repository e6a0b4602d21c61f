"""Dynamo's graph, traced once more into functional pre-dispatch ATen.

Tracing in front of autograd and autocast yields the operators that eager runs, in eager's order; autograd derives the
backward from whatever the passes make of them. Four constructs need care:

* a checkpointed body is inlined and its nodes tagged for recomputation, so that passes see every operator;
* a `torch.autograd.Function` defines its own backward and stays one opaque node, bodies and all;
* dropout in front of an in-place operator: functionalisation refuses to mutate its output, because where nothing is
  dropped that is the input itself. So it is: the input where nothing is dropped, a fresh tensor otherwise;
* a vmapped region is traced on its own, behind vmap: in front of it, batched tensors have no place in the graph.

A graph without in-place operators is functional as it stands, and so is one that changes only what nobody else knows
(`in_place.py`); any other pays for functionalisation.
"""

from __future__ import annotations

import inspect
import operator
from itertools import takewhile
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import PendingUnbackedSymbolNotFound
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from cggr_compile.capture.copies import Calls, Mutation, Replayer, mutates
from cggr_compile.capture.in_place import out_of_place
from cggr_compile.capture.memory import Memories, Memory, memory_of
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.torch_internals import autograd, dynamo, tracing

aten = torch.ops.aten

_AUGMENTED = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow),
    operator.setitem,
}
_DROPOUT = inspect.signature(F.dropout)


def functional_aten(gm: fx.GraphModule, fakes: list[Any]) -> fx.GraphModule:
    """The functional ATen graph of Dynamo's `gm`; call it under the fake mode of `fakes`.

    Raises:
        CannotOptimize: part of the computation escaped the trace.
    """
    calls = Calls()
    device = next(fake.device.type for fake in fakes if isinstance(fake, torch.Tensor))

    def run(*args: Any) -> Any:
        return _Inliner(_with_vmaps_traced(out_of_place(gm)), calls).run(*args)

    changed: list[int] = []

    def run_with_changes(*args: Any) -> Any:
        outputs = _Functional(_with_vmaps_traced(gm)).run(*args)
        changed[:] = [place for place, arg in enumerate(args) if tracing.is_changed(arg)]
        return (*outputs, *(args[place] for place in changed))

    with fx_traceback.preserve_node_meta():
        try:
            with autograd.modes_kept(device):
                traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*fakes)
            functional = not any(map(mutates, traced.graph.nodes))
        except Mutation:
            functional = False
        if not functional:
            traced = tracing.functional_graph(run_with_changes, fakes, {aten.copy.default: _copy})
            if changed:
                _write_back(gm, traced, changed, fakes)
    _refuse_escaped_values(traced)
    return traced


def _write_back(gm: fx.GraphModule, traced: fx.GraphModule, changed: list[int], fakes: list[Any]) -> None:
    """Writes what the forward of `gm` changed in place, the last of the outputs, into the inputs at the places
    `changed`.

    State that it keeps, as batch norm its statistics, is written at the end, so that what a backward has saved of the
    input is not found changed. A parameter that trains is written where it is changed, and read from there: the changed
    one is the parameter, which has the gradient.

    Raises:
        CannotOptimize: a parameter that trains is changed by more than its own values, or read before.
    """
    graph, output = traced.graph, next(iter(traced.graph.find_nodes(op="output")))
    own, new = output.args[0][: -len(changed)], output.args[0][-len(changed) :]
    output.args = (own,)
    inputs = graph.find_nodes(op="placeholder", sort=True)
    given = gm.graph.find_nodes(op="placeholder", sort=True)
    kept = []
    for place, value in zip(changed, new, strict=True):
        if fakes[place].requires_grad:
            _write_parameter(graph, inputs[place], value, dynamo.source_name(given[place]._dynamo_source))
        else:
            kept.append((inputs[place], value))
    for source, _ in kept:
        with graph.inserting_after(inputs[-1]):
            before = graph.call_function(aten.clone.default, (source,))
        before.meta = {**source.meta, "val": source.meta["val"].clone()}
        source.replace_all_uses_with(before)
        before.args = (source,)
    with graph.inserting_before(output):
        _copy_into(graph, kept)


def _write_parameter(graph: fx.Graph, source: fx.Node, value: fx.Node, name: str) -> None:
    """Writes the value of a parameter, by the expression `name`, where it is computed, and lets what reads it behind
    that read the parameter.

    A checkpointed region computes again what it holds, so there it is in front of the region: once in a step.
    """
    computing = ancestors([value], stop=[source])
    place = {node: index for index, node in enumerate(graph.nodes)}
    by_more = any(
        node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in computing
    )
    if by_more or any(
        place[user] < place[value] and user not in computing for node in (source, *computing) for user in node.users
    ):
        raise CannotOptimize(
            f"the forward changes the parameter {dynamo.module_path(name) or name} in place, by more than its own "
            "values or behind where it reads it",
            node=value,
            hint="change it after optimizer.step(), or make it a buffer",
        )
    region = value.meta.get("ac_graph_id")
    there = value.next
    if region is not None:
        there = next(node for node in place if node.meta.get("ac_graph_id") == region and node not in computing)
        for node in sorted(computing, key=place.__getitem__):
            there.prepend(node)
            for tag in ("ac_graph_id", "recompute"):
                node.meta.pop(tag, None)
    modes = [node.args[0] for node in place if node.target is torch._C._set_grad_enabled and place[node] < place[there]]
    with graph.inserting_before(there):
        [written] = _copy_into(graph, [(source, value)], [True, *modes][-1])
    for node in (source, value):
        node.replace_all_uses_with(written, delete_user_cb=lambda user: user not in computing and user is not written)


def _copy_into(graph: fx.Graph, values: list[tuple[fx.Node, fx.Node]], mode: bool = True) -> list[fx.Node]:
    """Writes values into inputs, without gradients, in front of a place where gradients are enabled or not (`mode`)."""
    graph.call_function(torch._C._set_grad_enabled, (False,))
    found = [graph.call_function(aten.copy_.default, pair) for pair in values]
    for node, (source, value) in zip(found, values, strict=True):
        node.meta = {**value.meta, "val": source.meta["val"]}
    graph.call_function(torch._C._set_grad_enabled, (mode,))
    return found


class _Inliner(Replayer):
    """Runs Dynamo's graph for tracing: checkpointed bodies inline, autograd functions opaque."""

    def __init__(self, gm: fx.GraphModule, calls: Calls | None = None) -> None:
        super().__init__(gm, calls)
        self.regions = 0

    def run_node(self, n: fx.Node) -> Any:
        name = getattr(n.target, "__name__", n.target)
        if name == "register_hook":
            raise CannotOptimize(
                "the forward registers a hook on a tensor's gradient, which no graph holds",
                node=n,
                hint="change the gradient in a torch.autograd.Function",
            )
        try:
            return super().run_node(n)
        except PendingUnbackedSymbolNotFound as error:
            raise CannotOptimize(
                f"torch cannot trace {name} at places or sizes that are read from data",
                node=n,
                hint="rewrite that line, with a mask instead of a slice, say",
            ) from error

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *inputs = args
            self.regions += 1
            for node in body.graph.nodes:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                node.meta["ac_graph_id"] = self.regions
            return self._inlined(body, inputs)
        if target is torch.ops.higher_order.autograd_function_apply:
            _refuse_lost_gradients(args[0])
            return _opaque(target, args, kwargs)
        if target is torch._C._autograd._get_data_attr:  # torch 2.11 cannot functionalise it
            return args[0].detach()
        name = getattr(target, "__name__", "")
        if getattr(target, "__module__", "") == F.__name__ and getattr(F, name, target) is not target:
            # A library has put another function into its place, which the model called and Dynamo traced into. Under a
            # trace torch's own would look its name up and find that again.
            with dynamo.replaced(F, name, target):
                return super().call_function(target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _inlined(self, body: fx.GraphModule, inputs: list[Any]) -> Any:
        inner = self._of_body(body)
        inner.regions = self.regions  # a checkpoint in the body is one of its own
        result = inner.run(*inputs)
        self.regions = inner.regions
        return result

    def _of_body(self, body: fx.GraphModule) -> _Inliner:
        return _Inliner(out_of_place(body), self.calls)


class _Functional(_Inliner):
    """The same for functionalisation, with dropouts whose outputs may be mutated, and detached tensors that something
    trained is added to in place: functionalisation would add it to what they were detached from, and detach the sum."""

    def __init__(self, gm: fx.GraphModule, memories: Memories | None = None) -> None:
        super().__init__(gm)
        self.memories = Memories() if memories is None else memories

    def _of_body(self, body: fx.GraphModule) -> _Inliner:
        return _Functional(body, self.memories)

    def run_node(self, n: fx.Node) -> Any:
        given = {source: self.env[source] for source in n.all_input_nodes if source in self.env}
        self.memories.refuse_stale(n, given)
        before = {source: tracing.changes_of(x) for source, x in given.items()}
        result = super().run_node(n)
        changed = [source for source, x in given.items() if tracing.changes_of(x) != before[source]]
        if any(_hides_from_gradients(n, x) for x in _changed_in_place(n, changed)):
            raise CannotOptimize(
                "a tensor that has a gradient is changed in place where gradients do not see it",
                node=n,
                hint="change a clone, without no_grad or detach",
            )
        self.memories.see(n, given, result, [given[source] for source in changed])
        if n.target in ("detach", torch.detach) and n.meta["example_value"].requires_grad:
            _refuse_read_again(n)
            return result.clone()
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is not F.dropout:
            return super().call_function(target, args, kwargs)
        bound = _DROPOUT.bind(*args, **kwargs)
        bound.apply_defaults()
        if not bound.arguments["training"] or bound.arguments["p"] == 0:
            return bound.arguments["input"]
        return super().call_function(target, args, kwargs).clone()


def _changed_in_place(node: fx.Node, changed: list[fx.Node]) -> list[torch.Tensor]:
    """What a call of Dynamo's graph changes, among `changed`, its arguments that lie where something changed. Its name
    tells which, mostly."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = (name.endswith("_") and not name.startswith("__")) or node.target in _AUGMENTED
    first = node.args[0] if named and node.args and isinstance(node.args[0], fx.Node) else None
    values = [each.meta.get("example_value") for each in changed if first is None or each is first]
    return [x for x in values if isinstance(x, torch.Tensor)]


def _hides_from_gradients(node: fx.Node, changed: torch.Tensor) -> bool:
    """Whether eager keeps the gradient of what a tensor was before a change, which functionalisation forgets; changes
    of parameters are `_write_back`'s."""
    if changed.requires_grad:
        return not (torch.is_grad_enabled() or changed.is_leaf)
    memory = memory_of(changed)
    before = takewhile(lambda each: each is not node, node.graph.nodes)
    known = [each.meta["example_value"] for each in before if _lies_in(each, memory)]
    return any(x.requires_grad and not x.is_leaf for x in known)


def _refuse_read_again(detached: fx.Node) -> None:
    """Raises `CannotOptimize` where what a tensor was detached from is read behind it: by then it has changed too."""
    memory = memory_of(detached.meta["example_value"])
    nodes = list(detached.graph.nodes)
    own = {detached}
    for node in nodes[nodes.index(detached) + 1 :]:
        read = [source for source in node.all_input_nodes if source not in own and _lies_in(source, memory)]
        if read:
            raise CannotOptimize(
                "a detached tensor is changed in place, and what it was detached from is read afterwards",
                node=node,
                hint="clone the tensor that is changed",
            )
        if _lies_in(node, memory):
            own.add(node)


def _lies_in(node: fx.Node, memory: Memory) -> bool:
    known = node.meta.get("example_value")
    return isinstance(known, torch.Tensor) and memory_of(known) == memory


def _refuse_lost_gradients(forward: fx.GraphModule) -> None:
    """Torch 2.11 gives the argument of a `torch.autograd.Function` that returns what it changed in place a gradient of
    zero, in torch.compile too. Its body returns such a tensor twice, before and after the change."""
    if not torch.__version__.startswith("2.11."):
        return
    results: Any = forward.graph.output_node().args[0]
    returned = results[0] if isinstance(results[0], tuple) else ()
    known: dict[int, fx.Node] = {}
    for node in dict.fromkeys(each for each in returned if isinstance(each, fx.Node)):
        if known.setdefault(id(node.meta.get("example_value", node)), node) is not node:
            raise CannotOptimize(
                "a torch.autograd.Function returns what it changed in place, whose gradient torch 2.11 loses",
                node=node,
                hint="change a clone in its forward, or use torch 2.12",
            )


def _opaque(target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One node for a call whose first arguments are its bodies; its value is computed outside the trace."""
    functional = any(isinstance(arg, tracing.FunctionalTensor) for arg in args)
    if functional:
        args = pytree.tree_map_only(tracing.FunctionalTensor, tracing.FunctionalTensor.from_functional, args)
    mode = get_proxy_mode()
    assert mode is not None
    tracer = mode.tracer

    def as_proxy(arg: Any) -> Any:
        if isinstance(arg, fx.GraphModule):
            name = tracer.get_fresh_qualname("body")
            tracer.root.register_module(name, arg)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(arg)

    proxies = pytree.tree_map(as_proxy, args, is_leaf=lambda arg: isinstance(arg, fx.GraphModule))
    proxy = tracer.create_proxy("call_function", target, proxies, kwargs)
    with disable_proxy_modes_tracing(), tracing.disable_functional_mode():
        outputs = target(*args, **kwargs)
    outputs = track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)
    to_functional = tracing.FunctionalTensor.to_functional
    return pytree.tree_map_only(torch.Tensor, to_functional, outputs) if functional else outputs


def _with_vmaps_traced(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with each outermost vmapped region replaced by a submodule of plain ATen."""
    regions = _vmap_regions(list(gm.graph.nodes))
    if not regions:
        return gm
    root = fx.GraphModule(gm, gm.graph)
    graph = fx.Graph(root)
    env: dict[fx.Node, fx.Node] = {}
    starts = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in gm.graph.nodes:
        if node in starts:
            name = f"vmapped_{len([key for key in starts if key in env])}"
            _outline(root, graph, env, starts[node], name)
        elif node not in inside:
            env[node] = graph.node_copy(node, lambda old: env[old])
    return fx.GraphModule(root, graph)


def _vmap_regions(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in nodes:
        if tracing.enters_vmap(node):
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if tracing.leaves_vmap(node):
            depth -= 1
    return regions


def _outline(
    root: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, fx.Node], region: list[fx.Node], name: str
) -> None:
    """Traces one region on the fake values Dynamo recorded and calls the result in its place."""
    members = set(region)
    taken = list(dict.fromkeys(s for node in region for s in node.all_input_nodes if s not in members))
    given = [node for node in region if any(user not in members for user in node.users)]
    body = fx.Graph(root)
    inner = {node: body.placeholder(node.name) for node in taken}
    for node in region:
        inner[node] = body.node_copy(node, lambda old: inner[old])
    body.output(tuple(inner[node] for node in given))
    module = fx.GraphModule(root, body)
    values = [node.meta["example_value"] for node in taken]
    with torch.no_grad():
        traced = make_fx(lambda *args: module(*args), tracing_mode="real")(*values)
    root.add_submodule(name, traced)
    call = graph.call_module(name, tuple(env[node] for node in taken))
    env[region[0]] = call
    for index, node in enumerate(given):
        env[node] = graph.call_function(_item, (call, index))


def _item(values: tuple, index: int) -> Any:
    return values[index]


def _copy(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`aten.copy` without its missing derivative: the source in the destination's dtype, device and shape."""
    return source.to(destination, non_blocking=non_blocking).expand_as(destination).clone()


def _refuse_escaped_values(traced: fx.GraphModule) -> None:
    """A fake tensor among the graph's constants is a value that was computed but not recorded."""
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target), None), torch._subclasses.FakeTensor):
            user = next(iter(node.users), node)
            raise CannotOptimize(
                "part of the computation escaped the trace",
                node=user,
                hint="the operator transform used there is not supported; please report it",
            )
