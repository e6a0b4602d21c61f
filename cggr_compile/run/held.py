"""What a training step holds in memory, from a run on fake tensors, which take none.

The step is divided as it is for an inner backend that compiles layers one by one (a step that is compiled as a whole
saves as much: benchmarks/results/step_time-outlined-h100.json), forward and backward by torch's own partitioner, and
autograd itself holds and frees what lies between them. Fake tensors are on the CPU, whose attention saves what CUDA's
does, while this package's operators are those of a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef

from cggr_compile.errors import CannotOptimize, first_line
from cggr_compile.ir.amounts import Sizes, amounts_of, concrete, sizes_of
from cggr_compile.ir.liveness import Liveness, nbytes
from cggr_compile.ir.program import Analysed, Autocast, Region, hint, value
from cggr_compile.passes.lower.lower_kernels import lowered_for
from cggr_compile.passes.lower.lower_regions import Body
from cggr_compile.passes.lower.outline_layers import is_size, outline_layers
from cggr_compile.run.inner import Shared, compile_in
from cggr_compile.run.plan import Plan
from cggr_compile.torch_internals import symbols
from cggr_compile.torch_internals.autograd import beside_saved_tensor_hooks
from cggr_compile.torch_internals.fake_tensors import FakeTensorMode
from cggr_compile.torch_internals.partitioner import Run, divided

_CPU, _META = torch.device("cpu"), torch.device("meta")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DROPOUT = 4  # the place of its `dropout_p`


class Held(NamedTuple):
    """Bytes beside parameters and buffers: `saved` by the forward for the backward; where most is held at once, of what
    the forward left (`activations`), of what the backward made (`gradients`) and of what is there only for a moment
    (`transient`); and all `gradients_of_parameters`."""

    saved: int
    activations: int
    gradients: int
    transient: int
    gradients_of_parameters: int


def held_by(plan: Plan, trained: Collection[str], rows: int) -> Held:
    """What a step of a plan on so many rows of the captured length holds, of all fractions that its schedule keeps the
    largest.

    Args:
        plan: of a capture on any device.
        trained: paths of the parameters that have gradients.
        rows: of the batch.

    Raises:
        CannotOptimize: it cannot be predicted.
    """
    config = plan.owner.in_force
    if plan.captured.shards:
        raise CannotOptimize(
            "the memory of sharded steps is not predicted", hint="explain the model before sharding it"
        )
    fraction = largest_fraction(plan)
    program = lowered_for(_META, (plan.route if fraction < 1 else plan.whole).program, config)
    amounts = amounts_of(program, config, fraction, rows, hint(program.sequence)) if fraction < 1 else {}
    sizes = _all_sizes(program, sizes_of(program, rows, hint(program.sequence), amounts))
    caller = Region(autocasts=tuple(_on_cpu(cast) for cast in plan.autocast.autocasts))
    with _whole_autograd(), caller.active():
        try:
            return _Rehearsal(program, sizes, trained, config.recompute_elementwise).run()
        except RuntimeError as error:
            raise CannotOptimize(
                f"the memory of this step cannot be predicted: {first_line(error)}",
                hint="measure it: torch.cuda.max_memory_allocated() after a few steps",
            ) from error


def largest_fraction(plan: Plan) -> float:
    """The largest that steps of a plan keep."""
    return max(plan.owner.in_force.fractions(0, first=False)) if plan.selects else 1.0


@contextmanager
def _whole_autograd() -> Iterator[None]:
    """Gradients are recorded, by this thread alone, which knows the fake tensors' modes."""
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), beside_saved_tensor_hooks():
        yield


def _on_cpu(cast: Autocast) -> Autocast:
    return cast._replace(device_type="cpu")


def _all_sizes(program: Analysed, known: Mapping[Any, int]) -> dict[Any, int]:
    """The values of all symbols: those that no route changes are as captured."""
    sizes = dict(known)
    for node in program.graph.nodes:
        if symbols.data_symbols(value(node)):
            raise CannotOptimize("a size of this step depends on data, so its memory is not predicted", node=node)
    for node in program.placeholders:
        val = value(node)
        for size in (val,) if isinstance(val, torch.SymInt) else getattr(val, "shape", ()):
            if isinstance(size, torch.SymInt) and program.expression(size).is_Symbol:
                sizes.setdefault(program.expression(size), hint(size))
    return sizes


class _Rehearsal(Shared):
    """A step in pieces whose compiled code counts memory and computes shapes."""

    def __init__(self, program: Analysed, sizes: Sizes, trained: Collection[str], recompute: bool) -> None:
        # Checkpoints hand states of random generators on, which are real.
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
        self._mode.cache_enabled = True
        self._backend = divided(self._counting)
        self._alive: dict[StorageWeakRef, tuple[int, bool]] = {}  # bytes, and whether the backward made it
        self._most = (0, 0, 0)
        self._inputs = [self._input(program, node, sizes, trained) for node in program.placeholders]
        self._stay = {_storage(x) for x in self._inputs if isinstance(x, torch.Tensor)}
        calls = tuple(node for node in program.graph.nodes if node.op == "call_function" and not is_size(node))
        outline = outline_layers(program)
        super().__init__(program, outline if isinstance(outline, tuple) else (calls,), sizes, "", recompute)

    def run(self) -> Held:
        """A forward and a backward."""
        outputs = self(*self._inputs)
        saved, _ = self._alive_now()
        loss = outputs[self.program.loss_output]
        if loss.requires_grad:
            loss.backward()
        leaves = [x for x in self._inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return Held(saved, *self._most, sum(nbytes(x.grad) for x in leaves))

    def _input(self, program: Analysed, node: fx.Node, sizes: Sizes, trained: Collection[str]) -> Any:
        val = value(node)
        if not isinstance(val, torch.Tensor):
            return concrete(program.expression(val), sizes) if isinstance(val, (int, torch.SymInt)) else val
        shape, stride = ([concrete(program.expression(n), sizes) for n in each] for each in (val.shape, val.stride()))
        with self._mode:
            fake = torch.empty_strided(shape, stride, dtype=val.dtype, device=_CPU)
        trains = program.kind(node) == "state" and program.path(node) in trained
        return nn.Parameter(fake) if trains else fake

    def _compile(self, body: Body, inputs: Any) -> Callable[..., Any]:
        for node in body.graph.nodes:
            _move(node)
        # A compiler holds on to what it was shown.
        shown = [self._like(x) if isinstance(x, torch.Tensor) and _storage(x) not in self._stay else x for x in inputs]
        return compile_in(self._mode, body.module, shown, self._backend, self.recompute)

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        with self._mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return fake.requires_grad_(x.requires_grad)

    def _counting(self, graph: fx.GraphModule, backward: bool) -> Run:
        """Code that runs a piece: what it takes is counted by its graph, what it leaves by who holds it."""
        liveness, placeholders = Liveness(graph.graph), graph.graph.find_nodes(op="placeholder")

        def run(args: list[Any]) -> Any:
            before = self._alive_now()
            pairs = zip(placeholders, args, strict=True)
            given_up = {
                node for node, x in pairs if backward and isinstance(x, torch.Tensor) and _storage(x) in self._alive
            }
            self._see(*before, liveness.most(given_up))
            with self._mode:
                outputs = graph(*args)
            args.clear()
            for x in outputs:
                if isinstance(x, torch.Tensor) and _storage(x) not in self._stay:
                    self._alive.setdefault(_storage(x), (x.untyped_storage().nbytes(), backward))
            self._see(*self._alive_now(), 0)
            return outputs

        return run

    def _alive_now(self) -> tuple[int, int]:
        """Bytes that are held, of what the forward and of what the backward made."""
        self._alive = {ref: found for ref, found in self._alive.items() if not ref.expired()}
        of_backward = sum(size for size, backward in self._alive.values() if backward)
        return sum(size for size, _ in self._alive.values()) - of_backward, of_backward

    def _see(self, activations: int, gradients: int, transient: int) -> None:
        self._most = max(self._most, (activations, gradients, transient), key=sum)


def _storage(x: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _move(node: fx.Node) -> None:
    """Lets a node of a body run on the CPU: devices and autocasts are the CPU's, and attention is without dropout, for
    which only CUDA has a kernel that saves no more."""

    def moved(argument: Any) -> Any:
        return _CPU if isinstance(argument, torch.device) else argument

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), moved)
    if node.target is torch.amp.autocast_mode._enter_autocast:
        args = ("cpu", *args[1:])
    if node.target is _ATTENTION and len(args) > _DROPOUT:
        args = (*args[:_DROPOUT], 0.0, *args[_DROPOUT + 1 :])
    elif node.target is _ATTENTION:
        kwargs = {**kwargs, "dropout_p": 0.0}
    node.args, node.kwargs = args, kwargs
