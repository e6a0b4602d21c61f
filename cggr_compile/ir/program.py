"""`Program`: the captured graph with the meaning of its nodes, and `Builder`, which every pass rewrites it with.

A program is immutable by convention: a pass reads one and builds another, so the untouched capture stays valid as
the left side of the diff and as the fallback.

Regions. Dynamo writes gradient mode and autocast as nodes with no data edges (`_set_grad_enabled`, `_enter_autocast`),
whose meaning is their position. Here they are stripped at capture and every node carries its `Region` instead, so
dataflow alone decides order: copying, reordering and dropping nodes cannot move an operation into another mode.
`passes.lower_regions` writes the nodes back at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols

from cggr_compile.errors import CannotOptimize
from cggr_compile.torch_internals import symbols

REGION = "cggr_region"
PART = "cggr_part"
ORIGIN = "cggr_origin"  # a captured node's name, which its copies cannot always keep

# The parts that autograd differentiates and whose side effects are the model's.
TRAINED_PARTS = ("main", "middle", "whole")


class Autocast(NamedTuple):
    """One `torch.autocast` entered by the model: its positional arguments."""

    device_type: str
    dtype: torch.dtype | None
    enabled: bool
    cache_enabled: bool | None


class Region(NamedTuple):
    """Modes a node runs under, besides those of the caller: gradient mode (None: the caller's) and autocasts."""

    grad: bool | None = None
    autocasts: tuple[Autocast, ...] = ()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Enters the region."""
        with ExitStack() as stack:
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for cast in self.autocasts:
                stack.enter_context(
                    torch.autocast(cast.device_type, cast.dtype, enabled=cast.enabled, cache_enabled=cast.cache_enabled)
                )
            yield


def callers_region(device_type: str) -> Region:
    """The autocast that holds where this is called, to enter elsewhere: in another thread, or after its end."""
    if not torch.amp.is_autocast_available(device_type):
        return Region()
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return Region(autocasts=(Autocast(device_type, dtype, enabled, None),))


@dataclass(frozen=True)
class Input:
    """One placeholder: `name` in the graph, `path` for people (`model.layers.0.mlp.up_proj.weight`, `input_ids`) and
    `kind`: "size" (a SymInt), "state" (parameter or buffer of the model), "batch" (an argument of the call), "constant"
    (a tensor that the forward reads elsewhere: a global, a closure's, a module's plain attribute) or "added"
    (by a pass: `kept`, `noise`, `kept_tokens`, `token_noise`, `kept_loss`, `loss_noise`, `column_noise`, `basis`)."""

    name: str
    path: str
    kind: str


@dataclass(frozen=True)
class Head:
    """The language-model head and its loss, as `find_loss` proved them.

    `logits = linear(hidden, weight, bias) * scale / divisor`, soft-capped where `softcap > 0`;
    `row_ops` are the nodes between head and loss that move rows and leave the vocabulary dimension alone (views,
    slices), in order; `loss` is the cross-entropy over the rows so moved and `target`.
    """

    linear: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    scale: float
    divisor: float
    softcap: float
    row_ops: tuple[fx.Node, ...]
    loss: fx.Node
    target: fx.Node
    reduction: str
    ignore_index: int
    shift: int

    @property
    def objective(self) -> str:
        """`causal` (position t predicts the label at t + 1) or `masked` (position t predicts its own label)."""
        return "causal" if self.shift == 1 else "masked"


@dataclass(frozen=True)
class Layers:
    """The layer stack: `residuals[i]` is the one tensor that leaves layer i; `entry` the one that enters layer 0."""

    path: str
    proof: str
    entry: fx.Node
    residuals: tuple[fx.Node, ...]

    def __len__(self) -> int:
        return len(self.residuals)


@dataclass(frozen=True)
class Shortened:
    """A value that the middle layers read on the kept tokens only: `name` and `shape` of the captured value, the
    dimensions it was gathered along (none where it was recomputed for k tokens), and why, in words."""

    name: str
    shape: str
    dims: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        dims = f" (dim {', '.join(map(str, self.dims))})" if self.dims else ""
        return f"{self.name} {self.shape}{dims}: {self.why}"


@dataclass(frozen=True)
class QuantizedBody:
    """How many of the router's products with weights are made in float8, and which are not, each with its number."""

    products: int
    exact: tuple[tuple[str, int], ...]

    @property
    def left(self) -> str:
        """The products that stay exact, in words."""
        return "; ".join(f"{count} × {what}" for what, count in self.exact) or "none"

    def __str__(self) -> str:
        total = self.products + sum(count for _, count in self.exact)
        left = f"; exact: {self.left}" if self.exact else ""
        return f"fp8 body ({self.products} of {total} products with weights{left})"


@dataclass(frozen=True)
class Routing:
    """Nodes inserted by the passes; None until the pass that inserts each has run.

    `kept` and `rows` are the sequence route's, `kept_tokens` and `positions` the token route's, `kept_loss`,
    `loss_rows` and `loss_weights` the loss route's; `gathered` lists the inputs that the sequence route gathered,
    `shortened` what the token route's middle layers read.

    `quantized` is None where the router's products are exact.

    `causal_attentions` counts the attentions that lost their mask to `is_causal`.
    """

    causal_attentions: int = 0
    router_layers: int = 0
    router_hidden: fx.Node | None = None
    quantized: QuantizedBody | None = None
    token_scores: fx.Node | None = None
    basis_image: fx.Node | None = None
    scores: fx.Node | None = None
    valid: fx.Node | None = None
    counts: fx.Node | None = None
    confidence: fx.Node | None = None
    kept: fx.Node | None = None
    rows: fx.Node | None = None
    weights: fx.Node | None = None
    kept_tokens: fx.Node | None = None
    positions: fx.Node | None = None
    kept_loss: fx.Node | None = None
    loss_rows: fx.Node | None = None
    loss_weights: fx.Node | None = None
    gathered: tuple[tuple[str, int], ...] = ()
    shortened: tuple[Shortened, ...] = ()
    providers: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """The graph after one pass."""

    name: str
    graph: fx.Graph


@dataclass(frozen=True)
class Program:
    """A functional ATen graph of a training step with the roles of its nodes.

    Attributes:
        graph: nodes in execution order; `meta["val"]` is a fake tensor or SymInt, `meta[REGION]` a `Region`,
            `meta[PART]` the part a pass put the node in ("main", "router", "score", "select", "whole", "gather",
            "middle", "loss").
        root: owner of tensor constants and submodules named by `get_attr` nodes.
        inputs: the placeholders, in order.
        batch, sequence: symbolic sizes; `sequence` is None where the capture specialised it.
        branches: what the model's own lines decided by sizes while it was traced.
        stored: indices of the outputs that the model's forward puts into objects that outlive the call.
        loss_output: index of the loss among the outputs.
        head, layers, routing: what the passes found and inserted; `no_layers` is why no stack was found.
        snapshots: the graph after each pass so far, the capture first.
    """

    graph: fx.Graph
    root: nn.Module
    inputs: tuple[Input, ...]
    fake_mode: FakeTensorMode
    batch: torch.SymInt
    sequence: torch.SymInt | int
    branches: tuple[Any, ...] = ()
    stored: frozenset[int] = frozenset()
    loss_output: int = -1
    head: Head | None = None
    layers: Layers | None = None
    no_layers: str = ""
    routing: Routing = field(default_factory=Routing)
    snapshots: tuple[Snapshot, ...] = ()

    @property
    def shape_env(self) -> ShapeEnv:
        """The symbols of this program."""
        shape_env = self.fake_mode.shape_env
        assert shape_env is not None
        return shape_env

    @property
    def placeholders(self) -> list[fx.Node]:
        """Placeholder nodes, in order."""
        return self.graph.find_nodes(op="placeholder", sort=True)

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(iter(self.graph.find_nodes(op="output")))

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The flat outputs."""
        return tuple(self.output.args[0])

    def kind(self, placeholder: fx.Node) -> str:
        """`Input.kind` of a placeholder."""
        return next(entry.kind for entry in self.inputs if entry.name == placeholder.name)

    def path(self, placeholder: fx.Node) -> str:
        """`Input.path` of a placeholder."""
        return next(entry.path for entry in self.inputs if entry.name == placeholder.name)

    def same_size(self, size: Any, symbol: torch.SymInt | int) -> bool:
        """Whether a size is provably the symbol, by the shape environment's replacements; never guards."""
        return self.expression(size) == self.expression(symbol)

    def same_shape(self, left: Sequence[Any], right: Sequence[Any]) -> bool:
        """Whether two shapes are provably equal; never guards."""
        return len(left) == len(right) and all(map(self.same_size, left, right))

    def mentions(self, size: Any, symbol: torch.SymInt) -> bool:
        """Whether a size depends on the symbol."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat)):
            return False
        wanted = self.expression(symbol)
        return bool(free_symbols(self.expression(size)) & free_symbols(wanted))

    def expression(self, size: Any) -> Any:
        """A size as a simplified sympy expression, or the int that it is."""
        return expression(self.shape_env, size)

    def module(self) -> fx.GraphModule:
        """A GraphModule over the graph (regions and operators not lowered)."""
        return fx.GraphModule(self.root, self.graph)


def expression(shape_env: ShapeEnv, size: Any) -> Any:
    """A size as a sympy expression in which equal sizes are equal, or the int that it is."""
    return shape_env.simplify(size.node.expr) if isinstance(size, (torch.SymInt, torch.SymFloat)) else size


def value(node: Any) -> Any:
    """The fake value of a node, or the constant itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def hint(size: Any) -> Any:
    """What a symbolic number was when it was captured, or the number itself."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def is_tensor(node: Any) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(value(node), torch.Tensor)


def describe(item: Any) -> Any:
    """A hashable description of an argument: all of a tensor that the fake run of an operator can depend on."""
    if isinstance(item, torch.Tensor):
        return (item.dtype, item.device, item.requires_grad, *map(describe, (*item.shape, *item.stride())))
    if isinstance(item, (tuple, list)):
        return (type(item), *(describe(part) for part in item))
    if isinstance(item, dict):
        return tuple((name, describe(part)) for name, part in item.items())
    if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return item.node.expr
    return (type(item), id(item) if isinstance(item, nn.Module) else item)


def map_nodes(item: Any, mapping: Callable[[fx.Node], fx.Node]) -> Any:
    """Copies a role (node, tuple, dataclass) with every node mapped."""
    if isinstance(item, fx.Node):
        return mapping(item)
    if isinstance(item, tuple):
        return tuple(map_nodes(part, mapping) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return dataclasses.replace(
            item,
            **{f.name: map_nodes(getattr(item, f.name), mapping) for f in dataclasses.fields(item)},
        )
    return item


class Builder:
    """Builds the next program: copies nodes of the old graph, adds new ones and keeps `meta["val"]` true.

    `env` maps old nodes to new. New nodes inherit `region` and `part` from the builder's current setting.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph(program.root)
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs = list(program.inputs)
        self.region = Region()
        self.part = "main"
        self._values: dict[Any, Any] = {}

    def copy_inputs(self) -> None:
        """Copies every placeholder, in order."""
        for node in self.program.placeholders:
            self.copy(node)

    def copy(self, node: fx.Node) -> fx.Node:
        """Copies one node whose arguments are already in `env`, with its value, region and part."""
        self.env[node] = self.graph.node_copy(node, lambda old: self.env[old])
        return self.env[node]

    def copy_parts(self, *parts: str) -> None:
        """Copies every node that earlier passes put into one of `parts`, in order."""
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output") and node.meta[PART] in parts:
                self.copy(node)

    def copy_rest(self) -> None:
        """Copies every node not copied yet, the output included."""
        for node in self.program.graph.nodes:
            if node.op != "output" and node not in self.env:
                self.copy(node)
        self.output(fx.map_arg(self.program.output.args[0], lambda old: self.env[old]))

    def copy_call(
        self,
        node: fx.Node,
        env: dict[fx.Node, fx.Node],
        args: tuple | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Copies one call with arguments from `env` and computes its value afresh; in the builder's part, or, where
        that is the main pass, in the original's.

        The copy runs under the original's region; where the builder's region disables gradients or adds an autocast,
        that holds too. `args` and `kwargs`, already mapped, replace the arguments.
        """
        new = self.graph.node_copy(node, lambda old: env[old])
        if args is not None:
            new.args = args
        if kwargs is not None:
            new.kwargs = kwargs
        region = node.meta[REGION]
        grad = self.region.grad if self.region.grad is not None else region.grad
        new.meta[REGION] = Region(grad, self.region.autocasts + region.autocasts)
        # Within the main pass, the layers that run on fewer tokens stay a part of their own.
        new.meta[PART] = node.meta[PART] if self.part == "main" else self.part
        unchanged = all(value(env[source]) is value(source) for source in node.all_input_nodes)
        if new.op == "call_function" and not (unchanged and args is None and kwargs is None):
            self.evaluate(new)
            symbols.inherit_range(value(node), value(new))
        return new

    def placeholder(self, name: str, val: Any) -> fx.Node:
        """Adds an input behind the last one."""
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta.update({"val": val, REGION: Region(), PART: "main"})
        self.inputs.append(Input(node.name, name, "added"))
        return node

    def tensor_input(self, name: str, shape: Sequence[Any], like: Any) -> fx.Node:
        """Adds an input of float32 [shape] on the device of the node `like`."""
        with self.program.fake_mode:
            empty = torch.empty(tuple(shape), dtype=torch.float32, device=value(like).device)
            return self.placeholder(name, empty)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call and computes its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({"val": None, REGION: self.region, PART: self.part})
        self.evaluate(node)
        return node

    def output(self, values: Any) -> None:
        """Adds the output node."""
        self.graph.output(values).meta.update({REGION: Region(), PART: "main"})

    def routing(self, **changes: Any) -> Routing:
        """The routing role in the new graph, with `changes`."""
        return dataclasses.replace(map_nodes(self.program.routing, self._follow), **changes)

    def _follow(self, node: fx.Node) -> fx.Node:
        return self.env.get(node, node)

    def _value(self, node: fx.Node) -> Any:
        return getattr(self.program.root, str(node.target)) if node.op == "get_attr" else value(node)

    def evaluate(self, node: fx.Node) -> None:
        """Computes `meta["val"]` by running the node on its arguments' fake values under its region.

        The layers of a stack are alike, and a fake run with symbols is slow: calls of one operator on values of the
        same description share one result, unless it has a size that depends on data.
        """
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        key = (node.target, node.meta[REGION], describe(args), describe(kwargs))
        if key in self._values:
            node.meta["val"] = self._values[key]
            return
        node.meta["val"] = self._run(node, args, kwargs)
        if not symbols.data_symbols(node.meta["val"]) - symbols.data_symbols((args, kwargs)):
            self._values[key] = node.meta["val"]

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        modes = (self.program.fake_mode, enable_python_dispatcher(), self.program.shape_env.suppress_guards())
        with modes[0], modes[1], modes[2], node.meta[REGION].active():
            try:
                return node.target(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise CannotOptimize(
                    f"the rewritten graph does not fit together: {str(error).splitlines()[0]}",
                    node=node,
                    hint="the model fixes a size that routing must change; please report it with this line",
                ) from error

    def finish(self, name: str, **changes: Any) -> Program:
        """The new program: roles follow their nodes through `env`; `changes` replaces fields; a snapshot is kept.

        A role whose node was not copied keeps pointing at nothing in the graph and must be in `changes`.
        """
        roles = {role: map_nodes(getattr(self.program, role), self._follow) for role in ("head", "layers", "routing")}
        fields = {**roles, **changes, "graph": self.graph, "inputs": tuple(self.inputs)}
        snapshot = Snapshot(name, self.graph)
        return dataclasses.replace(self.program, **fields, snapshots=(*self.program.snapshots, snapshot))
