"""Hands a lowered program to the inner backend, at concrete sizes.

Inductor keeps what it compiled on disk, keyed by the graph, for other processes. Our graphs are the result of passes
and options, so those are in the key; what a graph only names, the functions of this package, is not, and a fingerprint
of their sources stands for it.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile import kernels
from cggr_compile.passes.lower_regions import Body, lower_pieces
from cggr_compile.program import Program
from cggr_compile.recomputed import beside_checkpoints


def resolve_inner(inner: str, device: torch.device) -> str:
    """`auto` is inductor on CUDA and eager elsewhere."""
    if inner != "auto":
        return inner
    return "inductor" if device.type == "cuda" else "eager"


def compile_static(
    module: fx.GraphModule, inputs: list[Any], inner: str, recompute: bool = False
) -> Callable[..., Any]:
    """Compiles a module with every size input replaced by its value; call it with the same inputs, sizes too.
    `recompute` is `RoutingConfig.recompute_elementwise`."""
    places = [place for place, given in enumerate(inputs) if not isinstance(given, int)]
    tensors = [inputs[place] for place in places]
    static = _static(module, inputs)
    # Inductor looks at its caches only where a `ShapeEnv` tells it that no size is unknown.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.cache_enabled = True  # sizes are numbers here, and layers alike
    # The mode remembers a fake tensor for as long as somebody holds it; without, AOT makes one with symbols.
    fakes = [mode.from_tensor(each, static_shapes=True) for each in tensors if isinstance(each, torch.Tensor)]
    cacheable = torch._inductor.config.patch(unsafe_marked_cacheable_functions=_named_functions(static))
    # torch forbids it by default, because it is slower, if little.
    partition = torch._functorch.config.patch(ban_recompute_materialized_backward=not recompute)
    with tracing(TracingContext(mode)), cacheable, partition, beside_checkpoints():
        compiled = torch._dynamo.lookup_backend(inner)(static, tensors)
    del fakes
    return lambda *given: compiled(*(given[place] for place in places))


class Shared:
    """A step in pieces (`lower_pieces`), which are compiled when they first run: one for all that are alike.

    `before_running` is called when a piece has been compiled and is about to run for the first time.
    """

    def __init__(
        self,
        program: Program,
        pieces: Sequence[Sequence[fx.Node]],
        sizes: Mapping[Any, int],
        inner: str,
        recompute: bool = False,
        before_running: Callable[[], None] = lambda: None,
    ) -> None:
        self.inner = inner
        self.recompute = recompute
        self.before_running = before_running
        self.pieces = len(pieces)
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._run = lower_pieces(program, pieces, sizes, self._piece)

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs)

    def _piece(self, body: Body) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None
        text = body.text()

        def run(*inputs: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = self._shared(body, text, inputs)
            return compiled(*inputs)

        return run

    def _shared(self, body: Body, text: str, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        key = (text, *map(_kind, inputs))
        if key not in self.compiled:
            leaves = [x if x.is_leaf else x.detach().requires_grad_() for x in inputs]
            self.compiled[key] = compile_static(body.module, leaves, self.inner, self.recompute)
            self.before_running()
        return self.compiled[key]


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    """All that a compiled piece assumes of an input."""
    return (x.dtype, x.device, x.shape, x.stride(), x.requires_grad, isinstance(x, torch.nn.Parameter))


def _static(module: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
    """The module over its tensors alone."""
    graph = fx.Graph(module)
    env: dict[fx.Node, Any] = {}
    for node, given in zip(module.graph.find_nodes(op="placeholder", sort=True), inputs, strict=True):
        env[node] = given if isinstance(given, int) else graph.node_copy(node)
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda old: env[old]))
        elif node.op != "placeholder":
            env[node] = _substituted(graph, node, env)
    return fx.GraphModule(module, graph)


def _substituted(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    copy = graph.create_node(
        node.op,
        node.target,
        fx.map_arg(node.args, lambda old: env[old]),
        fx.map_arg(node.kwargs, lambda old: env[old]),
        name=node.name,
    )
    copy.meta = {key: item for key, item in node.meta.items() if key != "val"}
    return copy


def _named_functions(module: fx.GraphModule) -> dict[str, str]:
    """The Python functions of this package that a graph calls, each with the fingerprint that its artifacts carry.

    Operators of this package are in it too, for the fingerprint: their fakes decide what is compiled around them.
    """
    package = __name__.partition(".")[0]
    functions = [node.target for node in module.graph.nodes if isinstance(node.target, types.FunctionType)]
    names = {f"{function.__module__}.{function.__name__}" for function in functions}
    return {name: _fingerprint() for name in [package, *sorted(names)] if name.partition(".")[0] == package}


@cache
def _fingerprint() -> str:
    """Of the sources of the kernels and operators."""
    digest = hashlib.sha256()
    for folder in kernels.__path__:
        for source in sorted(Path(folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()
