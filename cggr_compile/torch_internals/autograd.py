"""Private corners of autograd and autocast: modes, who holds memory, checkpoints around a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


@contextmanager
def modes_kept(device_type: str) -> Iterator[None]:
    """Puts gradient mode and autocast back where an error leaves a graph between the nodes that switch them."""
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        if not torch.amp.is_autocast_available(device_type):
            yield
            return
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        cached, depth = torch.is_autocast_cache_enabled(), _autocast_depth()
        try:
            yield
        finally:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
            torch.set_autocast_cache_enabled(cached)
            while _autocast_depth() > depth:
                if torch.autocast_decrement_nesting() == 0:
                    torch.clear_autocast_cache()


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _storage_owners(x: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


_ALONE = _storage_owners(torch.empty(0))


def shares_memory(x: torch.Tensor) -> bool:
    """Whether another tensor, a view of it too, lies in the memory of this one."""
    return _storage_owners(x) > _ALONE


def transforms_are_active() -> bool:
    """Whether a function transform (vmap, grad) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Checkpoints(NamedTuple):
    """The checkpoints of `torch.utils.checkpoint` (not reentrant ones) that a call runs under.

    Attributes:
        first_runs: those in their forward that began within the recomputation, if there is one; innermost first.
        recomputed: the innermost that is being recomputed, and what tells backwards apart.
    """

    first_runs: tuple[Any, ...] = ()
    recomputed: tuple[Any, Any] | None = None


def checkpoints_around() -> Checkpoints:
    """The checkpoints under way in this thread, read off the hooks that they put on saved tensors: the closure of one
    in its forward holds its `frame`, that of a recomputation a reference to it (`torch/utils/checkpoint.py`)."""
    first_runs = []
    recomputed = None
    with _without_saved_tensor_hooks() as hooks:
        for pack, _ in hooks:
            variables = inspect.getclosurevars(inspect.unwrap(pack)).nonlocals if _is_checkpoints(pack) else {}
            if "frame" in variables:
                first_runs.append(variables["frame"])
            elif "target_frame_ref" in variables:
                recomputed = (variables["target_frame_ref"](), variables["gid"])
                break
    return Checkpoints(tuple(first_runs), recomputed)


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[list[tuple[Any, Any]]]:
    """Takes this thread's hooks on saved tensors away, the innermost first, and puts them back."""
    taken: list[tuple[Any, Any]] = []
    try:
        while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
        yield taken
    finally:
        for pack, unpack in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _is_checkpoints(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "torch.utils.checkpoint"


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def beside_saved_tensor_hooks() -> Iterator[None]:
    """Keeps what is computed within, gradients included, from the hooks on saved tensors around, those of checkpoints
    among them: traces and probes are no part of the caller's step. Hooks that come within are in force."""
    with _without_saved_tensor_hooks():
        yield
