"""`Program`: the captured graph with the meaning of its nodes, and `Builder`, which every pass rewrites it with.

A program is immutable by convention: a pass reads one and builds another, so the untouched capture stays valid as
the left side of the diff and as the fallback.

Regions. Dynamo writes gradient mode and autocast as nodes with no data edges (`_set_grad_enabled`, `_enter_autocast`),
whose meaning is their position. Here they are stripped at capture and every node carries its `Region` instead, so
dataflow alone decides order: copying, reordering and dropping nodes cannot move an operation into another mode.
`passes.lower_regions` writes the nodes back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_symbols

from cggr_compile.errors import Refusal, VerificationError
from cggr_compile.ir.shards import Shard
from cggr_compile.torch_internals.distributed import Ranks
from cggr_compile.torch_internals.fake_tensors import FakeTensorMode

REGION = "cggr_region"
PART = "cggr_part"
PROVIDER = "cggr_provider"  # of a lowered operator: its name and implementation
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
    (by a pass: `kept`, `noise`, `kept_tokens`, `token_noise`, `kept_loss`, `loss_noise`, `column_noise`)."""

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
    """A value that the middle layers, or their experts, read on the kept tokens only: `name` and `shape` of the
    captured value, the dimensions it was gathered along (none where it was recomputed for k tokens), and why, in words.
    """

    name: str
    shape: str
    dims: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        dims = f" (dim {', '.join(map(str, self.dims))})" if self.dims else ""
        return f"{self.name} {self.shape}{dims}: {self.why}"


@dataclass(frozen=True)
class Float8Products:
    """How many products with weights are made in float8, and which are not, each with its number."""

    made: int
    exact: tuple[tuple[str, int], ...]

    @property
    def left(self) -> str:
        """The products that stay exact, in words."""
        return "; ".join(f"{count} × {what}" for what, count in self.exact) or "none"

    def __str__(self) -> str:
        total = self.made + sum(count for _, count in self.exact)
        left = f"; exact: {self.left}" if self.exact else ""
        return f"{self.made} of {total} products with weights{left}"


@dataclass(frozen=True)
class Routing:
    """Nodes inserted by the passes; None until the pass that inserts each has run.

    `kept` and `rows` are the sequence route's, `kept_tokens` and `positions` the token route's and the segment
    route's, whose own are `documents` and `documents_kept`; `kept_loss`, `loss_rows` and `loss_weights` are the loss
    route's. `gathered` lists the inputs that the sequence or segment route gathered, `shortened` what the token route's
    middle layers, or their experts, read.

    Where the `ranks` select together, `scores`, `valid` and `counts` are of the rows of all of them, `all_rows` and
    `all_weights` what they select, and `rows` and `weights` this rank's part of that.

    `quantized` is None where the products of the trained parts are exact, `quantized_router` where the router's are.

    `causal_attentions` counts the attentions that lost their mask to `is_causal`.
    """

    causal_attentions: int = 0
    router_layers: int = 0
    router_hidden: fx.Node | None = None
    quantized: Float8Products | None = None
    quantized_router: Float8Products | None = None
    token_scores: fx.Node | None = None
    scores: fx.Node | None = None
    valid: fx.Node | None = None
    counts: fx.Node | None = None
    confidence: fx.Node | None = None
    kept: fx.Node | None = None
    rows: fx.Node | None = None
    weights: fx.Node | None = None
    ranks: Ranks | None = None
    all_rows: fx.Node | None = None
    all_weights: fx.Node | None = None
    documents: fx.Node | None = None
    documents_kept: fx.Node | None = None
    kept_tokens: fx.Node | None = None
    positions: fx.Node | None = None
    kept_loss: fx.Node | None = None
    loss_rows: fx.Node | None = None
    loss_weights: fx.Node | None = None
    gathered: tuple[tuple[str, int], ...] = ()
    shortened: tuple[Shortened, ...] = ()
    providers: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()


class StepOutputs(NamedTuple):
    """What a rewritten graph puts out behind the model's own outputs; None where a step has no such thing.

    `rows` int64 [k] and their `weights` float32 [k]; `scores` float32 and counted labels `counts` int64 of all rows
    [B], where the scores are the router's, or, in the program of `"auto"` that keeps every row, the rows' own losses;
    where R ranks select together, these four are of all ranks, [R · k] and [R · B];
    the router's mean `confidence` (0-d); `positions` int64 [B, k] of the kept tokens, -1 where there is none;
    `documents_kept` int64 [B, 4], as `select_documents` counts them; `loss_mask` bool [B, S]; `figures` float32 [3],
    those of `measured_loss`.
    In a graph they are nodes, after a step tensors.
    """

    rows: Any
    weights: Any
    scores: Any
    counts: Any
    confidence: Any
    positions: Any
    documents_kept: Any
    loss_mask: Any
    figures: Any


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
            "middle", "loss", "shards").
        root: owner of tensor constants and submodules named by `get_attr` nodes.
        inputs: the placeholders, in order.
        batch, sequence: symbolic sizes; `sequence` is None where the capture specialised it.
        branches: what the model's own lines decided by sizes while it was traced.
        stored: indices of the outputs that the model's forward puts into objects that outlive the call.
        numbers: those among the call's arguments, which constants of the graph may be.
        shards: by the name of the placeholder of a sharded parameter, what a step is given in its place.
        loss_output: index of the loss among the outputs.
        snapshots: the graph after each pass so far, the capture first.
    """

    ROLES: ClassVar[tuple[str, ...]] = ()
    """Fields that name nodes."""

    graph: fx.Graph
    root: nn.Module
    inputs: tuple[Input, ...]
    fake_mode: FakeTensorMode
    batch: torch.SymInt
    sequence: torch.SymInt | int
    branches: tuple[Any, ...] = ()
    stored: frozenset[int] = frozenset()
    numbers: frozenset[float] = frozenset()
    shards: Mapping[str, Shard] = field(default_factory=dict)
    loss_output: int = -1
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


@dataclass(frozen=True, kw_only=True)
class Analysed(Program):
    """A program whose loss was found.

    Attributes:
        head: the loss and what it is made of.
        layers: the stack; `no_layers` is why none was found.
        routing: what passes inserted.
    """

    ROLES = ("head", "layers", "routing")

    head: Head
    layers: Layers | None = None
    no_layers: Refusal | None = None
    routing: Routing = field(default_factory=Routing)

    @property
    def stack(self) -> Layers:
        """`layers`, for what cannot go without.

        Raises:
            CannotOptimize: why there are none.
        """
        if self.layers is None:
            if self.no_layers is None:
                raise VerificationError("find_layers", "it has not run")
            raise self.no_layers.error()
        return self.layers


def expression(shape_env: ShapeEnv, size: Any) -> Any:
    """A symbolic number as a sympy expression in which equal sizes are equal, or the number that it is."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return shape_env.simplify(size.node.expr) if symbolic else size


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
    if type(item) is int:  # most are: sizes and strides
        return (int, item)
    if isinstance(item, torch.Tensor):
        return (item.dtype, item.device, item.requires_grad, *map(describe, (*item.shape, *item.stride())))
    if isinstance(item, (tuple, list)):
        return (type(item), *(describe(part) for part in item))
    if isinstance(item, dict):
        return tuple((name, describe(part)) for name, part in item.items())
    if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return item.node.expr
    return (type(item), id(item) if isinstance(item, nn.Module) else item)
