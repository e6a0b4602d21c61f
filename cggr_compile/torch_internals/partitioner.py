"""Private corners of AOTAutograd: what it saves for a backward, and which operators a compiler makes one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import OpTypes, get_default_op_list, min_cut_rematerialization_partition
from torch._guards import detect_fake_mode

Run = Callable[[list[Any]], Any]
"""A compiled graph; takes its arguments in a list, and clears that."""


def divided(compile_: Callable[[fx.GraphModule, bool], Run]) -> Callable[..., Any]:
    """A backend for `torch.compile` that divides a graph into forward and backward as inductor does, and leaves each to
    `compile_`, which is told whether it is the backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.virtualized import V

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        with V.set_fake_mode(detect_fake_mode(inputs)):
            joint_graph.joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)

    def compiler(backward: bool) -> Callable[..., Run]:
        def compiled(graph: fx.GraphModule, _: Any) -> Run:
            run = compile_(graph, backward)
            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiled

    return aot_autograd(
        fw_compiler=compiler(backward=False),
        bw_compiler=compiler(backward=True),
        decompositions=select_decomp_table(),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )


@cache
def _kinds() -> OpTypes:
    return get_default_op_list()


def _operator(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def is_view(node: fx.Node) -> bool:
    """Whether a node of a compiler's graph gives memory of its argument."""
    return _operator(node) in _kinds().view_ops or _operator(node) is torch.ops.aten._unsafe_view


def is_fusible(node: fx.Node) -> bool:
    """Whether a compiler writes the operator into one kernel with its neighbours."""
    return _operator(node) in _kinds().fusible_ops
