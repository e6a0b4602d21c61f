"""Compiles the Triton kernels of a step on threads of their own while the inner backend compiles the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import warn
from cggr_compile.ir.amounts import concrete
from cggr_compile.ir.program import REGION, Program, Region, callers_region, is_tensor, value
from cggr_compile.kernels.providers import launches_triton


class KernelsAhead:
    """The kernels that a lowered program launches with the given inputs, being compiled; `sizes` are its symbols'.

    Kernels that were compiled before cost nothing, and whatever could not be compiled here is when it first runs.
    """

    def __init__(self, program: Program, inputs: Sequence[Any], sizes: Mapping[Any, int]) -> None:
        self._compiling: Future[None] | None = None
        launching = [node for node in program.graph.nodes if launches_triton(node.target)]
        if not launching:
            return
        from cggr_compile.kernels.triton.ahead import compile_kernels

        device = value(launching[0].args[0]).device
        trained = _with_gradients(program, inputs)
        caller = callers_region(device.type)
        calls = [partial(_call, program, node, sizes, trained, caller) for node in launching]
        thread = ThreadPoolExecutor(1, "cggr-kernels")
        self._compiling = thread.submit(compile_kernels, calls, device)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Returns when they are compiled."""
        compiling, self._compiling = self._compiling, None
        error = compiling.exception() if compiling is not None else None
        if error is not None:
            warn(f"kernels could not be compiled ahead and are compiled as they run: {type(error).__name__}: {error}")


def _with_gradients(program: Program, inputs: Sequence[Any]) -> set[fx.Node]:
    """The nodes whose values autograd follows in a step with these inputs, as far as dataflow tells."""
    found = {
        node
        for node, given in zip(program.placeholders, inputs, strict=True)
        if isinstance(given, torch.Tensor) and given.requires_grad
    }
    for node in program.graph.nodes:
        differentiable = (is_tensor(node) and value(node).is_floating_point()) or isinstance(value(node), tuple)
        if differentiable and node.meta[REGION].grad is not False and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _call(program: Program, node: fx.Node, sizes: Mapping[Any, int], trained: set[fx.Node], caller: Region) -> None:
    """The operator of a node, forward and backward, on tensors as the node's."""

    def stand_in(argument: fx.Node) -> Any:
        val = value(argument)
        if not isinstance(val, torch.Tensor):
            return number(val)
        x = torch.empty_strided(
            tuple(map(number, val.shape)), tuple(map(number, val.stride())), dtype=val.dtype, device=val.device
        )
        return x.requires_grad_(argument in trained)

    def number(size: Any) -> Any:
        return concrete(program.expression(size), sizes) if isinstance(size, (int, torch.SymInt)) else size

    args, kwargs = fx.map_arg((node.args, node.kwargs), stand_in)
    target: Callable[..., Any] = node.target
    with caller.active(), node.meta[REGION].active():
        outputs = target(*args, **kwargs)
    if isinstance(outputs, torch.Tensor) and outputs.requires_grad:
        leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        with torch.autograd.set_multithreading_enabled(False):  # another thread would not know that this only compiles
            torch.autograd.grad(outputs, leaves, torch.empty_like(outputs))
