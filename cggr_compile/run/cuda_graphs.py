"""CUDA graphs: a compiled step's forward and backward, recorded once for each batch shape that recurs and replayed.

Where the host launches kernels more slowly than the device runs them, a replay launches all of them at once. A
recording has fixed memory, so what must not be confused is kept apart here:

* Inputs are copied into the recording's own; parameters are used where they are, and one that has moved causes a new
  recording. Results are copied out, so that a loss that is kept stays what it was. Gradients are where they are, for
  loops that let go of them before the next forward, and copied out for others (`graph_memory`).
* Activations live from a forward to its backward. A forward that comes while another one still waits for its backward
  is not replayed but run; a backward whose activations are gone raises.
* Among several ranks the backward of a step in pieces is recorded in parts, each a function of its own to autograd
  (`backward_parts`).
* Recording runs the step a few times. It takes the random-number state back afterwards, and refuses steps that change
  their inputs, which such runs would change too.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cggr_compile.errors import first_line, warn
from cggr_compile.run.backward_parts import PARTS, Part, differentiable, forward_and_parts
from cggr_compile.run.graph_memory import CALLS_THAT_DISPLACE, Pool, Turn
from cggr_compile.torch_internals.autograd import beside_saved_tensor_hooks
from cggr_compile.torch_internals.distributed import all_ranks

WARM_UP = 1
"""Runs on the stream of a recording before it, behind the call that ran as it was: libraries allocate there."""

RECORDED_AT = 2
"""Which call of the same sizes records. A shape that comes once, as the last batch of an epoch may, is not worth it."""

SIZES_REMEMBERED = 1024
"""Sizes whose calls are counted; those that came longest ago are forgotten beyond."""


class Replays:
    """A program's compiled steps, recorded for sizes that come again and replayed from then on."""

    def __init__(self, pool: Pool, obstacle: str | None) -> None:
        self.pool = pool
        self.obstacle = obstacle
        self._by_sizes: OrderedDict[tuple[Any, ...], Replayed] = OrderedDict()

    def run(self, sizes: tuple[Any, ...], step: Callable[..., Sequence[Any]], inputs: tuple[Any, ...]) -> Any:
        """Calls a step that serves these sizes, which are those of the inputs."""
        if sizes not in self._by_sizes:
            self._by_sizes[sizes] = Replayed(step, self.pool, self.obstacle)
            if len(self._by_sizes) > SIZES_REMEMBERED:
                self._by_sizes.popitem(last=False)
        self._by_sizes.move_to_end(sizes)
        return self._by_sizes[sizes](*inputs)

    @property
    def recordings(self) -> int:
        """CUDA graphs recorded, for the sizes that are remembered."""
        return sum(replayed.recordings for replayed in self._by_sizes.values())

    @property
    def obstacles(self) -> list[str]:
        """Why steps could not be recorded."""
        return [replayed.obstacle for replayed in self._by_sizes.values() if replayed.obstacle is not None]


class Replayed:
    """A compiled step at some sizes, that is recorded at a later call and replayed from then on.

    `run` takes tensors and ints and returns a tuple of tensors and None. Where it cannot be recorded it is run as it
    is; `obstacle` says why, and a warning does once. Where the pool has no room for a recording it is run too.
    """

    def __init__(self, run: Callable[..., Sequence[Any]], pool: Pool, obstacle: str | None) -> None:
        self.run = run
        self.pool = pool
        self.obstacle = obstacle
        self.recordings = 0
        self._calls: deque[int] = deque(maxlen=CALLS_THAT_DISPLACE)
        self._recording: _Recording | None = None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        self.pool.leave_to_holders()
        self._calls.append(self.pool.shelf.next_call())
        if len(self._calls) < RECORDED_AT or self.obstacle is not None or self.pool.busy:
            return tuple(self.run(*inputs))
        if self._recording is None or not self._recording.fits(inputs):
            self._record(inputs)
        if self._recording is None:
            return tuple(self.run(*inputs))
        self.pool.shelf.replayed(self)
        return self._recording(inputs)

    def forget(self) -> None:
        """Drops the recording."""
        self._recording = None

    def _record(self, inputs: tuple[Any, ...]) -> None:
        self.forget()
        self.obstacle = _unrecordable(inputs)
        if self.obstacle is None:
            # What a recording keeps for itself alone is gradients, for the most part.
            expected = sum(x.nbytes for x in inputs if isinstance(x, Tensor) and x.requires_grad)
            if not self.pool.shelf.makes_room(self, expected, self._calls):
                return
            try:
                # A failed capture leaves its stream current; this one comes back whatever happens.
                with torch.cuda.stream(torch.cuda.current_stream()), beside_saved_tensor_hooks():
                    self._recording = _Recording(self.run, inputs, self.pool)
                self.recordings += 1
                self.pool.shelf.keep(self, self._recording.nbytes)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.obstacle = f"recording failed: {first_line(error)}"
        if self.obstacle is not None:
            warn(f"running without CUDA graphs: {self.obstacle}")


def obstacle_of(graph: fx.Graph) -> str | None:
    """Why a step cannot be recorded, or None as far as its graph tells."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for given, parameter in zip(node.args, schema.arguments, strict=False):
            written = parameter.alias_info is not None and parameter.alias_info.is_write
            if written and isinstance(given, fx.Node) and given.op == "placeholder":
                return f"the step changes its input {given.name}"
    return None


def _unrecordable(inputs: tuple[Any, ...]) -> str | None:
    elsewhere = [x for x in inputs if isinstance(x, Tensor) and x.device.type != "cuda"]
    return f"an input of shape {tuple(elsewhere[0].shape)} is on {elsewhere[0].device}" if elsewhere else None


class _Recording:
    """Forward and backward of `run` at fixed addresses."""

    def __init__(self, run: Callable[..., Sequence[Any]], inputs: tuple[Any, ...], pool: Pool) -> None:
        self.pool = pool
        self._epoch = pool.epoch
        self._leaves = [_leaf(x) for x in inputs]
        self._copied = [place for place, x in enumerate(inputs) if isinstance(x, Tensor) and not _stays(x)]
        self._places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        self._addresses = self._addresses_of(inputs)
        sources = [self._leaves[place] for place in self._places]
        state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                outputs, parts = forward_and_parts(run, self._leaves, sources, 1)
                parts[0].run([torch.ones_like(x) for x in differentiable(outputs)])
        torch.cuda.current_stream().wait_stream(side)
        del outputs, parts
        torch.cuda.set_rng_state(state)

        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool.handle):
            outputs, parts = forward_and_parts(run, self._leaves, sources, 1 if all_ranks() is None else PARTS)
        self._of_outputs = [torch.zeros_like(x) for x in differentiable(outputs)]
        self._parts: list[_RecordedPart] = []
        while parts:  # what a part has used up is free for the next one
            self._parts.append(_RecordedPart(parts.pop(0), [] if self._parts else self._of_outputs, pool))
        # A loop that still has gradients at this forward will have them at the next ones.
        pool.lending.copies |= any(x.is_leaf and x.grad is not None for x in (inputs[place] for place in self._places))
        self._outputs = [x.detach() if isinstance(x, Tensor) else x for x in outputs]
        self._differentiable = [isinstance(x, Tensor) and x.requires_grad for x in outputs]

    @property
    def nbytes(self) -> int:
        """Memory that is this recording's alone, from replay to replay."""
        copies = [self._leaves[place] for place in self._copied]
        gradients = (gradient for part in self._parts for gradient in part.gradients)
        kept = [*copies, *self._outputs, *self._of_outputs, *gradients]
        return sum(x.nbytes for x in kept if isinstance(x, Tensor))

    def _addresses_of(self, inputs: tuple[Any, ...]) -> list[int]:
        return [x.data_ptr() for x in inputs if isinstance(x, Tensor) and _stays(x)]

    def fits(self, inputs: tuple[Any, ...]) -> bool:
        """Whether the parameters are where they were, and nobody holds what a replay would write to."""
        return self._epoch == self.pool.epoch and self._addresses_of(inputs) == self._addresses

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        turn, token = Turn(), None
        self.pool.open(turn)
        for part in reversed(self._parts[1:]):
            token = _LaterPart.apply(self.pool, part, turn, token, *self._sources(part, inputs))
        found = iter(_Replay.apply(self, turn, inputs, token, *self._sources(self._parts[0], inputs)))
        return tuple(next(found) if isinstance(x, Tensor) else x for x in self._outputs)

    def _sources(self, part: _RecordedPart, inputs: tuple[Any, ...]) -> Iterator[Tensor]:
        return (inputs[self._places[place]] for place in part.places)

    def forward(self, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Replays the forward; copies of its tensors."""
        for place in self._copied:
            self._leaves[place].detach().copy_(inputs[place])
        self._forward.replay()
        return [x.clone() for x in self._outputs if isinstance(x, Tensor)]

    @property
    def constants(self) -> list[bool]:
        """For each tensor among the outputs, whether it has no gradient."""
        pairs = zip(self._outputs, self._differentiable, strict=True)
        return [not differs for x, differs in pairs if isinstance(x, Tensor)]

    def backward(self, of_outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Replays the backward's first part; its gradients, as the pool lends them."""
        torch._foreach_copy_(self._of_outputs, list(of_outputs))
        return self._parts[0].replay(self.pool)


class _RecordedPart:
    """A part of a backward at fixed addresses."""

    def __init__(self, part: Part, of_outputs: Sequence[Tensor], pool: Pool) -> None:
        self.places = part.places
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool.handle):
            self.gradients = part.run(of_outputs)

    def replay(self, pool: Pool) -> list[Tensor | None]:
        """Replays it; its gradients, as the pool lends them."""
        self._graph.replay()
        return pool.lending.hand_out(self.gradients)


class _Replay(torch.autograd.Function):
    """A recording's outputs as differentiable functions of the inputs whose gradients the backward's first part
    completes, and of `token`, which stands for the other parts."""

    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, turn: Turn, inputs: tuple[Any, ...], token: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.recording, ctx.turn, ctx.is_last = recording, turn, token is None
        found = recording.forward(inputs)
        ctx.constants = recording.constants
        ctx.mark_non_differentiable(*(x for x, constant in zip(found, ctx.constants, strict=True) if constant))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn.begun:
            raise RuntimeError(
                "the backward of a step under CUDA graphs ran twice, and its activations are gone; "
                "use cuda_graphs=False to differentiate a loss more than once"
            )
        ctx.turn.begun = True
        wanted = [grad for grad, constant in zip(grads, ctx.constants, strict=True) if not constant]
        found = ctx.recording.backward(wanted)
        ctx.turn.over = ctx.is_last
        return (None, None, None, None if ctx.is_last else grads[0].new_zeros(0), *found)


class _LaterPart(torch.autograd.Function):
    """A token, as a function of the inputs whose gradients a part of the backward completes, and of the token of the
    part that comes after it; the last part has none."""

    @staticmethod
    def forward(
        ctx: Any, pool: Pool, part: _RecordedPart, turn: Turn, token: Tensor | None, *sources: Tensor
    ) -> Tensor:
        ctx.pool, ctx.part, ctx.turn, ctx.is_last = pool, part, turn, token is None
        return sources[0].new_zeros(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.part.replay(ctx.pool)
        ctx.turn.over = ctx.is_last
        return (None, None, None, None if ctx.is_last else grad, *found)


def _stays(x: Tensor) -> bool:
    """Whether an input keeps its address from step to step."""
    return isinstance(x, torch.nn.Parameter)


def _leaf(x: Any) -> Any:
    """What a recording computes with: parameters' own memory, copies of other tensors, without their hooks."""
    if not isinstance(x, Tensor):
        return x
    return (x.detach() if _stays(x) else x.detach().clone()).requires_grad_(x.requires_grad)
