"""From Dynamo's graph to a `Program`: symbols of their own for batch and sequence, functional ATen, named inputs."""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile import compat
from cggr_compile.errors import CannotOptimize
from cggr_compile.program import ORIGIN, PART, REGION, Autocast, Input, Program, Region, Snapshot, expression, value
from cggr_compile.retrace import functional_aten

aten = torch.ops.aten


def batch_dims(tensors: dict[Any, torch.Tensor]) -> dict[Any, tuple[int, ...]]:
    """Which dimensions of the user's tensors are batch or sequence, judged by the sizes of the token ids.

    The ids are the first two-dimensional integer tensor; the leading dimension of every tensor of the same batch
    size is batch, later dimensions of the sequence size are sequence. Sizes of 1 are left out: Dynamo specialises them.
    """
    ids = next((t for t in tensors.values() if t.dim() == 2 and not t.is_floating_point()), None)
    if ids is None:
        return {}
    batch, sequence = ids.shape
    dims = {}
    for key, tensor in tensors.items():
        marked = [
            dim
            for dim, size in enumerate(tensor.shape)
            if size > 1 and ((dim == 0 and size == batch) or (dim > 0 and size == sequence))
        ]
        if marked:
            dims[key] = tuple(marked)
    return dims


def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Program:
    """Builds the program of one Dynamo graph.

    Args:
        gm: the graph a torch.compile backend receives.
        example_inputs: its real inputs.

    Raises:
        CannotOptimize: the graph ends at a graph break, or has no token ids.
        TensorifyScalarRestartAnalysis: the sizes were static; Dynamo traces again with symbols (once).
    """
    _refuse_graph_break(gm)
    placeholders = gm.graph.find_nodes(op="placeholder", sort=True)
    sources = [compat.source_name(node._dynamo_source) for node in placeholders]
    batch, sequence = _symbols(placeholders, sources, example_inputs)
    fakes = [node.meta["example_value"] for node in placeholders]
    fake_mode = next(fake for fake in fakes if isinstance(fake, FakeTensor)).fake_mode
    with fake_mode:
        traced = functional_aten(gm, fakes)
    batch, sequence = _settled(fake_mode.shape_env, batch), _settled(fake_mode.shape_env, sequence)
    graph, inputs = _normalize(traced, sources, batch, sequence)
    program = Program(graph, traced, inputs, fake_mode, batch, sequence, stored=_stored(gm))
    return Program(**{**vars(program), "snapshots": (Snapshot("capture", graph),)})


def _stored(gm: fx.GraphModule) -> frozenset[int]:
    """The outputs that the frame puts into objects that outlive it."""
    names = compat.stored_nodes()
    outputs = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return frozenset(i for i, out in enumerate(outputs) if isinstance(out, fx.Node) and out.name in names)


def _refuse_graph_break(gm: fx.GraphModule) -> None:
    broken = compat.graph_break_of(gm)
    if broken is not None:
        frame = broken.user_stack[-1]
        raise CannotOptimize(
            f"the model breaks Dynamo's graph ({broken.reason.splitlines()[0]})",
            source=f"{frame.filename}:{frame.lineno}: {frame.line}",
            hint="use cggr.optimize(model), which removes the known causes, or rewrite that line",
        )


def _is_state(source: str, example: Any) -> bool:
    return isinstance(example, nn.Parameter) or bool(re.search(r"\._(modules|parameters|buffers)\[", source))


def _symbols(
    placeholders: list[fx.Node], sources: list[str], example_inputs: list[Any]
) -> tuple[torch.SymInt, torch.SymInt | int]:
    """The batch and the sequence symbol, unified over all inputs; asks Dynamo to trace again where they are static."""
    tensors = {
        index: example
        for index, (source, example) in enumerate(zip(sources, example_inputs, strict=True))
        if isinstance(example, torch.Tensor) and not _is_state(source, example)
    }
    dims = batch_dims(tensors)
    if not dims:
        raise CannotOptimize(
            "the captured call has no token ids (a two-dimensional integer tensor)",
            hint="pass input_ids; inputs_embeds alone cannot be routed",
        )
    values = [node.meta["example_value"] for node in placeholders]
    ids = next(index for index, t in tensors.items() if t.dim() == 2 and not t.is_floating_point())
    batch, sequence = values[ids].shape
    static = {
        index: marked
        for index, marked in dims.items()
        if any(not isinstance(values[index].shape[dim], torch.SymInt) for dim in marked)
    }
    merged = isinstance(batch, torch.SymInt) and batch is not sequence and _same(batch, sequence)
    unmarked = {
        index: marked
        for index, marked in (dims if merged else static).items()
        if not set(marked) <= getattr(tensors[index], "_dynamo_weak_dynamic_indices", set())
    }
    if unmarked:
        compat.request_dynamic(example_inputs, unmarked)
    for index, marked in dims.items():
        for dim in marked:
            # Comparing two backed symbols of equal size adds the guard that they are equal and merges them.
            bool(values[index].shape[dim] == (batch if dim == 0 else sequence))
    return batch, sequence


def _settled(shape_env: ShapeEnv, size: torch.SymInt | int) -> torch.SymInt | int:
    """The number itself where the trace added the guard that the symbol is that number."""
    known = expression(shape_env, size)
    return int(known) if isinstance(known, sympy.Integer) else size


def _same(left: Any, right: Any) -> bool:
    return isinstance(right, torch.SymInt) and left.node.expr == right.node.expr


def _normalize(
    traced: fx.GraphModule,
    sources: list[str],
    batch: torch.SymInt | int,
    sequence: torch.SymInt | int,
) -> tuple[fx.Graph, tuple[Input, ...]]:
    """Names the placeholders, turns mode switches into regions and drops assertions that guards imply."""
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
        else:
            env[node] = graph.node_copy(node, lambda old: env[old])
        env[node].meta.update({REGION: region if node.op not in ("placeholder", "output") else Region()})
        env[node].meta.update({PART: "main", ORIGIN: env[node].name})
    output = next(iter(graph.find_nodes(op="output")))
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)
    graph.eliminate_dead_code()
    graph.lint()
    return graph, tuple(inputs)


def _is_guarded(node: fx.Node) -> bool:
    """Whether the node asserts what the guards of the capture enforce; assertions about data are side effects."""
    if node.target == aten._assert_scalar.default:
        return not compat.data_symbols(value(node.args[0]))
    return node.target == aten._assert_tensor_metadata.default


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
    return _path(source), "state" if _is_state(source, None) else "batch"


def _path(source: str) -> str:
    """`L['model']._modules['h']._modules['0']._parameters['weight']` becomes `h.0.weight`; `L['kw']['ids']`, `ids`."""
    if _is_state(source, None):
        members = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.(\w+)(?=$|\.|\[)", source)
        return ".".join(part for pair in members for part in pair if part and not part.startswith("_"))
    names = re.findall(r"\['([^']+)'\]", re.sub(r"\.size\(\)\[\d+\]", "", source))
    suffix = re.findall(r"\.size\(\)\[\d+\]$", source)
    return (names[-1] if names else source) + "".join(suffix)
