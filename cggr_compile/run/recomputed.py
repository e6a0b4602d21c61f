"""Steps that `torch.utils.checkpoint` runs a second time, in the backward: on what the first run selected.

A checkpoint around the model keeps no activations and calls the model again when the backward asks for them. What comes
out belongs to the loss of the first call only where nothing is drawn or decided anew: k may be another since, scores
follow weights, and selections draw from a generator that the checkpoint does not put back. So everything that a step
under a checkpoint was given beside its batch is remembered with the checkpoint, for as long as that lives, and given
again. torch's checkpoint is found by the hooks on saved tensors that it computes under (`autograd.checkpoints_around`),
so steps without one have nothing to remember.

A step that a backward runs in any other way (a reentrant checkpoint runs the first one without gradients, where nothing
is routed) cannot be told what its loss was made of, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from cggr_compile.errors import CannotOptimize
from cggr_compile.run.variant import Variant
from cggr_compile.torch_internals import autograd


@dataclass(frozen=True)
class Given:
    """What a step ran with beside the inputs of its call."""

    plan: object
    variant: Variant
    added: tuple[Any, ...]


@dataclass
class _Calls:
    """The model's calls in one checkpoint, in order, and how many of them each backward has run again."""

    given: list[Given] = field(default_factory=list)
    repeated: dict[Any, int] = field(default_factory=dict)


class Recomputations:
    """What the steps of one model were given under checkpoints that still wait for their backward."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()

    def again(self, plan: object) -> Given | None:
        """What the step was given that this call runs again; None where the call is a step of its own.

        Raises:
            CannotOptimize: it is a recomputation, and not of a step that was routed alike.
        """
        around = autograd.checkpoints_around()
        if around.recomputed is None:
            if autograd.in_backward():
                raise CannotOptimize(
                    "a backward runs the model again, and nothing says which step that was (a reentrant checkpoint "
                    "around the model)",
                    hint="checkpoint by torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
                )
            return None
        frame, backward = around.recomputed
        calls, number = self._next(frame, backward)
        if number >= len(calls.given) or calls.given[number].plan is not plan:
            raise CannotOptimize(
                "a checkpoint runs the model again, and not the step that it ran first",
                hint="between a forward and its backward, leave the model's mode, parameters and options as they are",
            )
        calls.repeated[backward] = number + 1
        return calls.given[number]

    def may_be_routed(self) -> bool:
        """Whether the call under way may run a routed step again: eager's whole batch would be another step's."""
        around = autograd.checkpoints_around()
        if around.recomputed is None:
            return autograd.in_backward()
        calls, number = self._next(*around.recomputed)
        return number < len(calls.given)

    def _next(self, frame: Any, backward: Any) -> tuple[_Calls, int]:
        calls = self._calls.get(frame, _Calls())
        return calls, calls.repeated.get(backward, 0)

    def remember(self, given: Given) -> None:
        """For the checkpoints that the step runs under."""
        for frame in autograd.checkpoints_around().first_runs:
            self._calls.setdefault(frame, _Calls()).given.append(given)
