"""From Dynamo's graph to a `Program`: symbols of their own for batch and sequence, functional ATen, named inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.capture.branches import branches_of
from cggr_compile.capture.retrace import functional_aten
from cggr_compile.capture.unify import unify
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import drop_unused
from cggr_compile.ir.program import ORIGIN, PART, REGION, Autocast, Input, Program, Region, Snapshot, expression, value
from cggr_compile.ir.roles import changes_of
from cggr_compile.torch_internals import decisions, dynamo, symbols
from cggr_compile.torch_internals.fake_tensors import FakeTensor

aten = torch.ops.aten


def dynamic_dims(tensors: Mapping[Any, torch.Tensor], ids: Any, labels: Any) -> dict[Any, tuple[int, ...]]:
    """Which dimensions of the call's tensors may turn out to be batch or sequence: those of the sizes that the token
    ids and the labels have (`tensors[ids]`, `tensors[labels]`, where there are any).

    Marked dynamic, each gets a symbol of its own, whatever its size: what they have in common is then proved by what
    the model does with them, not guessed. Sizes of 1 are left out: Dynamo specialises them.
    """
    sizes = {size for key in (ids, labels) if key in tensors for size in tensors[key].shape[:2] if size > 1}
    found = {
        key: tuple(dim for dim, size in enumerate(tensor.shape) if size in sizes) for key, tensor in tensors.items()
    }
    return {key: dims for key, dims in found.items() if dims}


def token_ids_of(tensors: Mapping[Any, torch.Tensor]) -> Any:
    """The name of the token ids among a call's tensors: `input_ids`, else the first two-dimensional integer tensor."""
    names = [name for name, t in tensors.items() if t.dim() == 2 and not t.is_floating_point() and name != "labels"]
    return "input_ids" if "input_ids" in names else next(iter(names), None)


def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Program:
    """Builds the program of one Dynamo graph.

    Args:
        gm: the graph a torch.compile backend receives.
        example_inputs: its real inputs.

    Raises:
        CannotOptimize: the graph ends at a graph break, or has no token ids.
        TensorifyScalarRestartAnalysis: the sizes were static, or decisions by them were not written down; Dynamo traces
            again, with both (once).
    """
    _refuse_graph_break(gm)
    placeholders = gm.graph.find_nodes(op="placeholder", sort=True)
    sources = [dynamo.source_name(node._dynamo_source) for node in placeholders]
    batch, length, sequence = _symbols(placeholders, _arguments(sources), example_inputs)
    fakes = [node.meta["example_value"] for node in placeholders]
    fake_mode = next(fake for fake in fakes if isinstance(fake, FakeTensor)).fake_mode
    with fake_mode:
        traced = functional_aten(gm, fakes)
        unify(traced.graph, torch.Size((batch, length)), sequence)
    batch, sequence = _settled(fake_mode.shape_env, batch), _settled(fake_mode.shape_env, sequence)
    graph, inputs = _normalize(traced, sources, batch, sequence)
    branches = branches_of(fake_mode.shape_env)
    numbers = dynamo.numbers_given()
    program = Program(graph, traced, inputs, fake_mode, batch, sequence, branches, _stored(gm), numbers)
    _refuse_changed_arguments(program)
    return Program(**{**vars(program), "snapshots": (Snapshot("capture", graph),)})


def _refuse_changed_arguments(program: Program) -> None:
    for node in changes_of(program):
        if program.kind(node.args[0]) == "batch":
            raise CannotOptimize(
                f"the forward changes {program.path(node.args[0])} in place",
                node=node,
                hint="let it change a copy: a routed step runs on some of the rows",
            )


def _stored(gm: fx.GraphModule) -> frozenset[int]:
    """The outputs that the frame puts into objects that outlive it."""
    names = dynamo.stored_nodes()
    outputs = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return frozenset(i for i, out in enumerate(outputs) if isinstance(out, fx.Node) and out.name in names)


def _refuse_graph_break(gm: fx.GraphModule) -> None:
    broken = dynamo.graph_break_of(gm)
    if broken is not None:
        frame = broken.user_stack[-1]
        raise CannotOptimize(
            f"the model breaks Dynamo's graph ({next(iter(broken.reason.splitlines()), 'no reason given')})",
            source=f"{frame.filename}:{frame.lineno}: {frame.line}",
            hint="use cggr.optimize(model), which removes the known causes, or rewrite that line",
        )


def _is_state(source: str, example: Any) -> bool:
    return isinstance(example, nn.Parameter) or bool(re.search(r"\._(modules|parameters|buffers)\[", source))


def _arguments(sources: list[str]) -> dict[str, int]:
    """The inputs that are arguments of the call, by name; of two with one name, by the expression that reads them."""
    found: dict[str, int] = {}
    for index, source in enumerate(sources):
        if dynamo.is_argument(source):
            path = _path(source)
            found[source if path in found else path] = index
    return found


def _symbols(
    placeholders: list[fx.Node], arguments: Mapping[str, int], example_inputs: list[Any]
) -> tuple[torch.SymInt, torch.SymInt | int, torch.SymInt | int]:
    """The symbols of the batch, of the ids' length and of the sequence; asks Dynamo to trace again where arguments have
    no symbols of their own.

    The labels have one row for each row of the ids; the sequence is theirs: a decoder's own where it is not the ids'
    (`unify` tells).
    """
    tensors = {
        name: example_inputs[index]
        for name, index in arguments.items()
        if isinstance(example_inputs[index], torch.Tensor)
    }
    ids = token_ids_of(tensors)
    if ids is None:
        raise CannotOptimize(
            "the captured call has no token ids (a two-dimensional integer tensor)",
            hint="pass input_ids; inputs_embeds alone cannot be routed",
        )
    dims = dynamic_dims(tensors, ids, "labels")
    unmarked = {
        arguments[name]: marked
        for name, marked in dims.items()
        if not set(marked) <= getattr(tensors[name], "_dynamo_weak_dynamic_indices", set())
    }
    if unmarked:
        decisions.write_down_until_compiled()
        dynamo.request_dynamic(example_inputs, unmarked)
    decisions.require_written_down()
    batch, length = placeholders[arguments[ids]].meta["example_value"].shape
    sequence = length
    if "labels" in tensors and tensors["labels"].dim() == 2:
        rows, sequence = placeholders[arguments["labels"]].meta["example_value"].shape
        bool(rows == batch)  # comparing backed symbols of equal size adds the guard that they are equal and merges them
    return batch, length, sequence


def _settled(shape_env: ShapeEnv, size: torch.SymInt | int) -> torch.SymInt | int:
    """The number itself where the trace added the guard that the symbol is that number."""
    known = expression(shape_env, size)
    return int(known) if isinstance(known, sympy.Integer) else size


def _normalize(
    traced: fx.GraphModule,
    sources: list[str],
    batch: torch.SymInt | int,
    sequence: torch.SymInt | int,
) -> tuple[fx.Graph, tuple[Input, ...]]:
    """Names the placeholders, turns mode switches into regions, and drops assertions that guards imply and casts that
    give the tensor itself."""
    graph = fx.Graph(traced)
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    region = Region()
    remaining = iter(sources)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            source = next(remaining)
            path, kind = _describe(source, value(node), batch, sequence)
            env[node] = graph.placeholder(re.sub(r"\W+", "_", path).strip("_"))
            env[node].target = env[node].name  # made unique by the graph; the target becomes the argument's name
            env[node].meta = dict(node.meta)
            inputs.append(Input(env[node].name, path, kind))
        elif (entered := _enter(node, region)) is not None:
            region = entered
            continue
        elif _is_guarded(node):
            continue
        elif _gives_itself(node):
            env[node] = env[node.args[0]]
            continue
        else:
            env[node] = graph.node_copy(node, lambda old: env[old])
        env[node].meta.update({REGION: region if node.op not in ("placeholder", "output") else Region()})
        env[node].meta.update({PART: "main", ORIGIN: env[node].name})
    output = next(iter(graph.find_nodes(op="output")))
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)
    drop_unused(graph)
    graph.lint()
    return graph, tuple(inputs)


def _is_guarded(node: fx.Node) -> bool:
    """Whether the node asserts what the guards of the capture enforce; assertions about data are side effects."""
    if node.target == aten._assert_scalar.default:
        return not symbols.data_symbols(value(node.args[0]))
    return node.target == aten._assert_tensor_metadata.default


def _gives_itself(node: fx.Node) -> bool:
    """Whether the node is a cast to what the tensor is. A trace takes what it gives for the tensor from there on, in
    whatever module it was written."""
    if node.target not in (aten.to.dtype, aten.to.device, aten.to.dtype_layout):
        return False
    given, made = value(node.args[0]), value(node)
    names = [argument.name for argument in node.target._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    copies = arguments.get("copy") or arguments.get("memory_format") is not None or arguments.get("pin_memory")
    return not copies and (given.dtype, given.device, given.layout) == (made.dtype, made.device, made.layout)


def _enter(node: fx.Node, region: Region) -> Region | None:
    """The region that follows a mode switch; None where the node is not one. Capture runs with gradients enabled."""
    if node.target is torch._C._set_grad_enabled:
        return region._replace(grad=None if node.args[0] else False)
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return region._replace(autocasts=(*region.autocasts, Autocast(*node.args)))
    if node.target is torch.amp.autocast_mode._exit_autocast:
        return region._replace(autocasts=region.autocasts[:-1])
    return None


def _describe(source: str, val: Any, batch: Any, sequence: Any) -> tuple[str, str]:
    """Path and kind of one input, from the expression Dynamo reads it by."""
    if isinstance(val, (torch.SymInt, int)) and source.endswith("]") and ".size()[" in source:
        for name, symbol in (("batch", batch), ("sequence", sequence)):
            if isinstance(val, torch.SymInt) and isinstance(symbol, torch.SymInt) and val.node.expr == symbol.node.expr:
                return name, "size"
        return re.sub(r"\.size\(\)\[(\d+)\]", r"_size_\1", _path(source)), "size"
    if _is_state(source, None):
        return _path(source), "state"
    return _path(source), "batch" if dynamo.is_argument(source) else "constant"


def _path(source: str) -> str:
    """`L['model']._modules['h']._modules['0']._parameters['weight']` becomes `h.0.weight`; `L['kw']['ids']`, `ids`."""
    if _is_state(source, None):
        return dynamo.module_path(source)
    names = re.findall(r"\['([^']+)'\]", re.sub(r"\.size\(\)\[\d+\]", "", source))
    suffix = re.findall(r"\.size\(\)\[\d+\]$", source)
    return (names[-1] if names else source) + "".join(suffix)
