"""Hands a lowered program to the inner backend.

Inductor keeps what it compiled on disk, keyed by the graph, for other processes. Our graphs are the result of passes
and options, so those are in the key. What a graph only names, the functions of this package, is not, nor is what its
nodes say of checkpoints, which inductor's partitioner goes by, nor which kernels of attention are allowed; a
fingerprint stands for all three.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile import kernels
from cggr_compile.ir.amounts import Sizes
from cggr_compile.ir.dataflow import recomputation
from cggr_compile.ir.program import Program
from cggr_compile.kernels.collectives import start_gather, start_rows
from cggr_compile.kernels.op import fp8_linear
from cggr_compile.passes.lower.lower_regions import Body, lower_pieces
from cggr_compile.passes.lower.unshard_parameters import prefetch_gathers
from cggr_compile.torch_internals import dynamo, inductor
from cggr_compile.torch_internals.autograd import beside_saved_tensor_hooks
from cggr_compile.torch_internals.fake_tensors import FakeTensor, FakeTensorMode


def resolve_inner(inner: str, device: torch.device) -> str:
    """`auto` is inductor on CUDA and eager elsewhere."""
    if inner != "auto":
        return inner
    return "inductor" if device.type == "cuda" else "eager"


def compile_static(
    module: fx.GraphModule, inputs: Sequence[Any], inner: str, recompute: bool = False
) -> Callable[..., Any]:
    """Compiles a module with every size input replaced by its value; call it with the same inputs, sizes too.
    `recompute` is `RoutingConfig.recompute_elementwise`."""
    # Inductor looks at its caches only where a `ShapeEnv` tells it that no size is unknown.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.cache_enabled = True  # sizes are numbers here, and layers alike
    return compile_in(mode, module, inputs, inner, recompute)


def compile_in(
    mode: FakeTensorMode,
    module: fx.GraphModule,
    inputs: Sequence[Any],
    inner: str | Callable[..., Any],
    recompute: bool,
) -> Callable[..., Any]:
    """Compiles a module for such inputs: numbers are written into it, tensors that are not fake ones of `mode` have the
    sizes that they have; call it with all inputs, numbers too. `inner` is a backend of torch.compile or its name."""
    places = [place for place, given in enumerate(inputs) if not isinstance(given, int)]
    wanted = [inputs[place] for place in places]
    # The mode remembers a fake tensor for as long as somebody holds it; without, AOT makes one with symbols.
    real = [x for x in wanted if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
    fakes = [mode.from_tensor(each, static_shapes=True) for each in real]
    written = _with_numbers(module, inputs)
    gathers = any(node.target in (start_gather, start_rows) for node in written.graph.nodes)
    rounds = any(node.target in (fp8_linear.scaled_mm, fp8_linear.fp8_linear) for node in written.graph.nodes)
    held = rounds and inner == "inductor"
    functions = _named_functions(written) | (inductor.ROWS_HELD if held else {})
    options = inductor.options(functions, prefetch_gathers if gathers else None)
    arguments: dict[str, Any] = {"config_patches": options} if inner == "inductor" else {}
    if held:
        arguments["inner_compile"] = inductor.compile_holding_rows
    with dynamo.one_at_a_time(), inductor.compiling(mode, options, recompute), beside_saved_tensor_hooks():
        compiled = torch._dynamo.lookup_backend(inner)(written, wanted, **arguments)
    del fakes
    return lambda *inputs: compiled(*(inputs[place] for place in places))


class Shared:
    """A step in pieces (`lower_pieces`), which are compiled when they first run: one for all that are alike.

    `before_running` is called when a piece has been compiled and is about to run for the first time; `call` is how each
    of them is called.
    """

    def __init__(
        self,
        program: Program,
        pieces: Sequence[Sequence[fx.Node]],
        sizes: Sizes,
        inner: str,
        recompute: bool = False,
        before_running: Callable[[], None] = lambda: None,
    ) -> None:
        self.program = program
        self.inner = inner
        self.recompute = recompute
        self.before_running = before_running
        self.call = call_plainly
        self.pieces = len(pieces)
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._sizes = sizes
        self._run = self._lower(pieces, sizes)

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs)

    def serves(self, sizes: Sizes) -> bool:
        """Whether it may be called with such sizes."""
        return sizes == self._sizes

    def _lower(self, pieces: Sequence[Sequence[fx.Node]], sizes: Sizes) -> fx.GraphModule:
        return lower_pieces(self.program, pieces, sizes, self._piece)

    def _piece(self, body: Body) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None
        text = body.text()

        def run(*inputs: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = self._shared(body, text, inputs)
            return self.call(compiled, inputs)

        return run

    def _shared(self, body: Body, text: str, inputs: tuple[Any, ...]) -> Callable[..., Any]:
        key = (text, *self._kinds(body, inputs))
        if key not in self.compiled:
            self.compiled[key] = self._compile(body, [as_leaf(x) for x in inputs])
            self.before_running()
        return self.compiled[key]

    def _kinds(self, body: Body, inputs: Sequence[Any]) -> Iterator[Any]:
        """All that a compiled piece assumes of each input."""
        return ((*described(x), x.shape, x.stride()) for x in inputs)

    def _compile(self, body: Body, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_static(body.module, inputs, self.inner, self.recompute)


def call_plainly(piece: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Calls a piece."""
    return piece(*inputs)


def as_leaf(x: Any) -> Any:
    """A tensor that a piece can be compiled with: one without the history of the pieces before."""
    return x if not isinstance(x, torch.Tensor) or x.is_leaf else x.detach().requires_grad_()


def described(x: torch.Tensor) -> tuple[Any, ...]:
    """What a compiled piece assumes of a tensor, but for its sizes."""
    return (x.dtype, x.device, x.requires_grad, isinstance(x, torch.nn.Parameter))


def _with_numbers(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The module over its other inputs, without the values of its capture."""
    graph = fx.Graph(module)
    env: dict[fx.Node, Any] = {}
    for node, given in zip(module.graph.find_nodes(op="placeholder", sort=True), inputs, strict=True):
        env[node] = given if isinstance(given, int) else _bare(graph.node_copy(node))
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda old: env[old]))
        elif node.op != "placeholder":
            env[node] = _substituted(graph, node, env)
    return fx.GraphModule(module, graph)


def _substituted(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    args, kwargs = (fx.map_arg(given, lambda old: env[old]) for given in (node.args, node.kwargs))
    copy = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
    copy.meta = dict(node.meta)
    return _bare(copy)


def _bare(node: fx.Node) -> fx.Node:
    node.meta.pop("val", None)
    return node


def _named_functions(module: fx.GraphModule) -> dict[str, str]:
    """The Python functions of this package that a graph calls, each with the fingerprint that its artifacts carry.

    Operators of this package are in it too, for the fingerprint: their fakes decide what is compiled around them.
    """
    package = __name__.partition(".")[0]
    functions = [node.target for node in module.graph.nodes if isinstance(node.target, types.FunctionType)]
    names = {f"{function.__module__}.{function.__name__}" for function in functions}
    fingerprint = _digest([_fingerprint(), inductor.attention_kernels(), *recomputation(module.graph.nodes)])
    return {name: fingerprint for name in [package, *sorted(names)] if name.partition(".")[0] == package}


@cache
def _fingerprint() -> str:
    """Of the sources of the kernels and operators."""
    sources = (source for folder in kernels.__path__ for source in sorted(Path(folder).rglob("*.py")))
    return _digest(source.read_text("utf-8") for source in sources)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
