"""What happens at each step: how many rows are kept, which compiled variant runs, what is remembered for the user.

Nothing here reads a tensor back to the CPU. The number of rows comes from shapes, the curriculum from a Python
counter; selections and scores stay on the device until somebody asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.passes.lower_regions import lower_regions
from cggr_compile.passes.pipeline import UNROUTED, passes_for, routable, run
from cggr_compile.program import Program, value
from cggr_compile.router_head import Basis
from cggr_compile.sizes import KEPT, Amount, amounts_of, concrete, sizes_of

# Distinct (batch, sequence, k) for which the inner backend keeps compiled code; the oldest is dropped beyond.
MAX_SPECIALIZATIONS = 64

EXTRA_OUTPUTS = ("rows", "weights", "scores", "counts", "basis_image", "positions", "loss_mask")


class Runtime:
    """State of one optimised model: configuration, optimiser steps done, last selection, router head, plans so far."""

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self.steps = 0
        self.plans: list[Plan] = []
        self.passive: list[str] = []
        self.last: dict[str, torch.Tensor | int | None] = {}
        self.basis = Basis(config.router_head_refresh)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._generator_states: dict[str, torch.Tensor] = {}

    def noise(self, size: Sequence[int], device: torch.device) -> torch.Tensor:
        """Uniform fp32 noise of a shape from this model's own generator on the device."""
        return torch.rand(tuple(size), device=device, generator=self.generator(device))

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of selections and router heads, seeded by `config.seed` or from torch's global seed."""
        if device not in self._generators:
            generator = torch.Generator(device)
            seed = self.config.seed if self.config.seed is not None else torch.initial_seed() % 2**63
            generator.manual_seed(seed)
            if str(device) in self._generator_states:
                generator.set_state(self._generator_states[str(device)])
            self._generators[device] = generator
        return self._generators[device]

    def state_dict(self) -> dict[str, Any]:
        """Steps, generators and basis: tensors and numbers only."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {
            "steps": self.steps,
            "generators": {**self._generator_states, **states},
            "basis": self.basis.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; ValueError for other entries."""
        expected = {"steps", "generators", "basis"}
        if set(state) != expected:
            raise ValueError(f"the state of a routed model has entries {sorted(expected)}, got {sorted(state)}")
        self.steps = state["steps"]
        self._generators = {}
        self._generator_states = dict(state["generators"])
        self.basis.load_state_dict(state["basis"])

    def __getstate__(self) -> dict[str, Any]:
        """Configuration and state; compiled plans are rebuilt by the first step of the copy."""
        return {"config": self.config, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self.load_state_dict(state["state"])


class Plan:
    """One capture: the routed program, the unrouted one, and the code that runs them. Called by Dynamo's frame."""

    def __init__(self, captured: Program, runtime: Runtime) -> None:
        self.captured = captured
        self.runtime = runtime
        config = runtime.config
        self.routed = routable(captured, config)
        passes = passes_for(config) if self.routed else UNROUTED
        self.program = run(captured, config, passes)
        assert self.program.head is not None
        self.device = value(self.program.head.weight).device
        self.inner = resolve_inner(config.inner, self.device)
        inputs = zip(self.program.placeholders, self.program.inputs, strict=True)
        self._inputs_of_passes = [(entry.name, value(node)) for node, entry in inputs if entry.kind == "added"]
        self._routed = Variant(self.program, self.inner)
        self._unrouted: Variant | None = None if self.routed else self._routed
        self._ids = next(
            index
            for index, node in enumerate(captured.placeholders)
            if captured.kind(node) == "batch"
            and isinstance(value(node), torch.Tensor)
            and value(node).dim() == 2
            and not value(node).is_floating_point()
        )

    @property
    def unrouted(self) -> Variant:
        """The program without router and selection, built when a step first keeps every row."""
        if self._unrouted is None:
            self._unrouted = Variant(run(self.captured, self.runtime.config, UNROUTED), self.inner)
        return self._unrouted

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        rows, length = inputs[self._ids].shape
        amounts = amounts_of(self.program, self.runtime.config, self.runtime.steps, rows, length)
        whole = all(amount.kept >= amount.total for amount in amounts.values())
        added = () if whole else self._added(sizes_of(self.program, rows, length, amounts), amounts)
        outputs = self.unrouted(*inputs) if whole or not self.routed else self._routed(*inputs, *added)
        extra = outputs[-len(EXTRA_OUTPUTS) :]
        self.runtime.last = {
            "total": rows,
            "length": length,
            "kept": min(amounts["sequence"].kept, rows) if "sequence" in amounts else rows,
            **dict(zip(EXTRA_OUTPUTS, extra, strict=True)),
        }
        image = self.runtime.last.pop("basis_image")
        if isinstance(image, torch.Tensor):
            self.runtime.basis.update(image)
        if self.runtime.last["rows"] is None:
            self.runtime.last["rows"] = torch.arange(rows, device=self.device)
        if self.runtime.last["positions"] is None and "token" in amounts:
            self.runtime.last["positions"] = torch.arange(length, device=self.device).expand(rows, length)
        return outputs[: -len(EXTRA_OUTPUTS)]

    def _added(self, sizes: Mapping[Any, int], amounts: Mapping[str, Amount]) -> Iterator[Any]:
        """What the passes' own inputs get in this step, in their order."""
        kept = {KEPT[route]: amount.kept for route, amount in amounts.items()}
        for name, fake in self._inputs_of_passes:
            if name in kept:
                yield kept[name]
            elif name == "basis":
                width, rank = fake.shape
                yield self.runtime.basis.on(width, rank, self.runtime.generator(self.device))
            else:
                yield self.runtime.noise([concrete(self.program, size, sizes) for size in fake.shape], self.device)


def resolve_inner(inner: str, device: torch.device) -> str:
    """`auto` is inductor on CUDA and eager elsewhere."""
    if inner != "auto":
        return inner
    return "inductor" if device.type == "cuda" else "eager"


class Variant:
    """One lowered program and its compiled code for each concrete (batch, sequence, k)."""

    def __init__(self, program: Program, inner: str) -> None:
        self.inner = inner
        self.module = lower_regions(program, checkpoints=inner == "eager")
        self.specialized: OrderedDict[tuple[int, ...], Callable[..., Any]] = OrderedDict()
        self.compilations = 0
        self._run = self.module if inner == "eager" else self._specialized

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._run(*inputs)

    def _specialized(self, *inputs: Any) -> tuple[Any, ...]:
        key = (*(size for size in inputs if isinstance(size, int)), *_shapes(inputs))
        if key not in self.specialized:
            self.compilations += 1
            self.specialized[key] = compile_static(self.module, list(inputs), self.inner)
            if len(self.specialized) > MAX_SPECIALIZATIONS:
                self.specialized.popitem(last=False)
        self.specialized.move_to_end(key)
        return tuple(self.specialized[key](*inputs))


def _shapes(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes of the inputs that are not parameters: those of the model cannot change."""
    return tuple(
        size
        for tensor in inputs
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, torch.nn.Parameter)
        for size in tensor.shape
    )


def compile_static(module: fx.GraphModule, inputs: list[Any], inner: str) -> Callable[..., Any]:
    """Compiles a module with every size input replaced by its value."""
    graph = fx.Graph(module)
    env: dict[fx.Node, Any] = {}
    for node, given in zip(module.graph.find_nodes(op="placeholder", sort=True), inputs, strict=True):
        copy = graph.node_copy(node)
        env[node] = given if isinstance(given, int) else copy
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda old: env[old]))
        elif node.op != "placeholder":
            env[node] = _substituted(graph, node, env)
    static = fx.GraphModule(module, graph)
    with torch._guards.tracing(None):
        return torch._dynamo.lookup_backend(inner)(static, inputs)


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
