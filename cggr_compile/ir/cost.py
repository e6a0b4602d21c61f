"""FLOPs of a captured forward by layer, head and rest, and the cost that routing is predicted to have.

Every node is run on fake tensors of the captured batch's concrete sizes under torch's own counter, so composite
operators are counted by what they decompose into. Nodes that agree in operator and arguments cost the same and are run
once. FLOPs depend neither on device nor on dtype: everything runs on the meta device, where attention decomposes into
matrix products instead of a fused kernel that the counter may not know, and operands of mixed floating dtypes, legal
under autocast only, run in fp32. What the counter does not know and is not plain ATen is listed, not taken for free.

The cost model, with φ = n / L, η = head / body, κ = the router's head / the exact head and c = φ + κη: a plain step
costs 3 (1 + η) bodies (backward = 2 × forward), a routed one m times that, and the router c more. So the router makes a
step ω = 1 + c / (3 m (1 + η)) times as expensive as one on equally many random rows or tokens. m is the fraction r of
the rows (sequence route); what the forward costs with the middle layers counted at k tokens a sequence, attention's
square included (token route), or with r of the grouped products of their experts alone (`skip="experts"`); or with r of
the head (loss route).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.dataflow import ancestors, descendants
from cggr_compile.ir.names import operator_of
from cggr_compile.ir.program import Analysed, Program, hint, is_tensor, value
from cggr_compile.ir.roles import middle_layers
from cggr_compile.ir.router_head import cost_factor
from cggr_compile.schedule import kept_of
from cggr_compile.torch_internals.fake_tensors import FakeTensorMode

BACKWARD = 2

MEASURED = 1.00, 1.19
"""Measured over predicted steps, less the optimiser's kernels, the least and the most, under CUDA graphs
(benchmarks/results/step_time-*.json)."""

# Products of row blocks with one matrix each, mixture-of-experts' own: every row meets one matrix.
_GROUPED_PRODUCTS = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_META = torch.device("meta")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward on the captured batch; `experts` are the grouped products of each layer; `uncounted`:
    operators that could not be run, how often."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    head: int
    rest: int
    uncounted: tuple[tuple[str, int], ...]

    @property
    def body(self) -> int:
        """All layers."""
        return sum(self.layers)

    @property
    def total(self) -> int:
        """The whole forward."""
        return self.body + self.head + self.rest


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a routed step; symbols as in the module's docstring.

    `router_share` is the router's part of one plain forward, `step_ratio` the routed step over the plain one and
    `random_ratio` (m) a step on equally many random rows or tokens over the plain one, all counted; `break_even` is ω.
    """

    forward_flops: int
    layer_flops: tuple[int, ...]
    head_flops: int
    rest_flops: int
    phi: float
    eta: float
    kappa: float
    c: float
    ratio: float
    router_share: float
    step_ratio: float
    random_ratio: float
    break_even: float
    uncounted: tuple[tuple[str, int], ...]


def break_even(c: float, main: float, eta: float) -> float:
    """ω = 1 + c / (3 m (1 + η))."""
    return 1 + c / ((1 + BACKWARD) * main * (1 + eta))


def predict(analysed: Analysed, router_layers: int, ratio: float, config: RoutingConfig) -> Cost:
    """The cost of routing a program whose loss (and, with `router_layers` > 0, whose layers) have been found.

    Without layers the whole of the forward that is not head counts as body.
    """
    flops = count(analysed)
    body = flops.body or flops.rest
    eta = flops.head / body if body else 0.0
    phi = router_layers / len(flops.layers) if router_layers else 0.0
    kappa = _kappa(analysed, config) if router_layers else 0.0
    c = phi + kappa * eta
    share = 0.0
    if router_layers:
        share = (sum(flops.layers[:router_layers]) + kappa * flops.head + flops.rest) / max(flops.total, 1)
    main = _main_share(analysed, flops, ratio, config)
    return Cost(
        forward_flops=flops.total,
        layer_flops=flops.layers,
        head_flops=flops.head,
        rest_flops=flops.rest,
        phi=phi,
        eta=eta,
        kappa=kappa,
        c=c,
        ratio=ratio,
        router_share=share,
        step_ratio=main + share / (1 + BACKWARD),
        random_ratio=main,
        break_even=break_even(c, main, eta),
        uncounted=flops.uncounted,
    )


def _main_share(analysed: Analysed, flops: Flops, ratio: float, config: RoutingConfig) -> float:
    """m: the routed forward, without the router, over the plain one."""
    if not flops.total:
        return ratio
    body, head = float(flops.body), float(flops.head)
    if "segment" in config.routes:
        return count(analysed, _short_sizes(analysed, ratio)).total / flops.total
    if "token" in config.routes and analysed.layers is not None:
        middle = middle_layers(analysed, config)
        if config.skip == "experts":
            length = hint(analysed.sequence)
            body -= sum(flops.experts[i] for i in middle) * (1 - kept_of(ratio, length) / length)
        else:
            short = count(analysed, _short_sizes(analysed, ratio)).layers
            body = sum(short[i] if i in middle else whole for i, whole in enumerate(flops.layers))
    if "loss" in config.routes:
        head *= ratio
    share = (body + head + flops.rest) / flops.total
    return share * ratio if "sequence" in config.routes else share


def _short_sizes(analysed: Analysed, ratio: float) -> dict[Any, int]:
    """The captured sizes, with the kept tokens of each sequence in place of all."""
    assert isinstance(analysed.sequence, torch.SymInt)
    sizes = {analysed.expression(analysed.sequence): kept_of(ratio, hint(analysed.sequence))}
    if isinstance(analysed.batch, torch.SymInt):
        sizes[analysed.expression(analysed.batch)] = hint(analysed.batch)
    return sizes


def _kappa(analysed: Analysed, config: RoutingConfig) -> float:
    return cost_factor(config, value(analysed.head.weight).shape[0])


def count(analysed: Analysed, sizes: Mapping[Any, int] | None = None) -> Flops:
    """Counts one forward of a captured program, with `sizes` in place of the captured ones of some symbols; a node
    belongs to layer i if residual i is computed from it through the stream of activations and residual i - 1 is not, to
    the head if it is the head's linear, else to the rest."""
    counter = _Counter(analysed, sizes or {})
    layers, experts = ([0] * len(analysed.layers or ()) for _ in range(2))
    owner = _owners(analysed)
    head = rest = 0
    for node in analysed.graph.nodes:
        if node.op != "call_function":
            continue
        flops = counter.count(node)
        if node is analysed.head.linear:
            head += flops
        elif node in owner:
            layers[owner[node]] += flops
            experts[owner[node]] += flops if operator_of(node) in _GROUPED_PRODUCTS else 0
        else:
            rest += flops
    return Flops(tuple(layers), tuple(experts), head, rest, tuple(sorted(counter.uncounted.items())))


def _owners(analysed: Analysed) -> dict[fx.Node, int]:
    if analysed.layers is None:
        return {}
    stream = descendants([analysed.layers.entry], _is_activation) - {analysed.layers.entry}
    owner: dict[fx.Node, int] = {}
    for index, residual in enumerate(analysed.layers.residuals):
        for node in ancestors([residual], stop=owner):
            if node in stream:
                owner[node] = index
    return owner


def _is_activation(node: fx.Node) -> bool:
    """Whether the node carries tensors (one, or several as `split` gives); sizes carry no activations."""
    return not isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


class _Counter:
    """Counts nodes one by one, each distinct call once."""

    def __init__(self, program: Program, sizes: Mapping[Any, int]) -> None:
        self.program = program
        self.sizes = sizes
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[str, int] = {}
        self.uncounted: Counter[str] = Counter()

    def count(self, node: fx.Node) -> int:
        described = fx.map_arg((node.args, node.kwargs), lambda source: _Described(source, self._number))
        key = f"{node.target} {described}"
        if key not in self.known:
            self.known[key] = self._run(node)
        if self.known[key] < 0:
            self.uncounted[operator_of(node)] += 1
        return max(self.known[key], 0)

    def _run(self, node: fx.Node) -> int:
        """FLOPs of the node, or -1 where they are not known."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return -1 if _has_body(node) else 0
        promoted = len(_floating_dtypes(node.all_input_nodes)) > 1
        try:
            with self.mode, FlopCounterMode(display=False) as counter, torch.no_grad():
                args, kwargs = self._on_meta((node.args, node.kwargs), promoted)
                result = node.target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return -1
        if operator_of(node) in _GROUPED_PRODUCTS:
            return int(2 * args[0].numel() * result.shape[-1])
        flops = int(counter.get_total_flops())
        return flops if flops or node.target.namespace in ("aten", "prims") else -1

    def _on_meta(self, arguments: Any, promoted: bool) -> Any:
        """Arguments with the values of nodes in place of nodes, numbers in place of symbols, and the meta device."""

        def one(item: Any) -> Any:
            if isinstance(item, torch.device):
                return _META
            if not isinstance(item, torch.Tensor):
                return self._number(item)
            dtype = torch.float32 if promoted and item.is_floating_point() else item.dtype
            shape, stride = ([self._number(size) for size in sizes] for sizes in (item.shape, item.stride()))
            return torch.empty_strided(shape, stride, dtype=dtype, device=_META)

        return tree_map(one, fx.map_arg(arguments, value))

    def _number(self, size: Any) -> Any:
        """A size's hint, or its value for the sizes asked for."""
        if not self.sizes or not isinstance(size, torch.SymInt):
            return hint(size)
        expression = self.program.expression(size)
        return int(expression.xreplace(self.sizes)) if expression.free_symbols <= self.sizes.keys() else hint(size)


class _Described:
    """A node inside a printed key: what its value looks like, in numbers, not which node it is."""

    def __init__(self, node: fx.Node, number: Callable[[Any], Any]) -> None:
        self.val = value(node)
        self.number = number

    def __repr__(self) -> str:
        return str(tree_map(self._one, self.val))

    def _one(self, val: Any) -> str:
        if isinstance(val, torch.Tensor):
            sizes = [[self.number(size) for size in sizes] for sizes in (val.shape, val.stride())]
            return f"{val.dtype}{sizes[0]}{sizes[1]}"
        return str(self.number(val))


def _has_body(node: fx.Node) -> bool:
    """Whether a call that is not an ATen operator may hide work: higher-order operators do, Python arithmetic not."""
    return any(source.op == "get_attr" and not is_tensor(source) for source in node.all_input_nodes)


def _floating_dtypes(nodes: Iterable[fx.Node]) -> set[torch.dtype]:
    return {value(node).dtype for node in nodes if is_tensor(node) and value(node).is_floating_point()}
