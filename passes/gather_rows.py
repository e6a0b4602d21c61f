"""Rebuilds the main pass on the selected rows: batched inputs are gathered, the batch size becomes k.

Only inputs are replaced. Everything computed from them (masks, positions, flattened sizes) is recomputed by the copied
nodes, so no value of the full batch can leak into the part that trains; `verify` checks that no size there depends on
the batch symbol.
"""

from __future__ import annotations

import cggr_compile.kernels.label_ops  # noqa: F401  registers torch.ops.cggr
import torch
from cggr_compile.passes.subgraph import clone
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.program import PART, TRAINED_PARTS, Builder, Program, is_tensor, value


def gather_rows(program: Program, config: RoutingConfig) -> Program:
    """Inserts `cggr::gather` for each batched input and copies the main pass onto the results.

    Raises:
        CannotOptimize: an input whose size depends on the batch size without being it.
    """
    routing = program.routing
    assert routing.rows is not None
    assert routing.kept is not None
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router", "score", "select")
    rows, kept = builder.env[routing.rows], builder.env[routing.kept]
    builder.part = "gather"
    substitution = {node: builder.env[node] for node in program.placeholders}
    gathered: list[tuple[str, int]] = []
    for node in program.placeholders:
        if program.kind(node) == "size" and program.same_size(value(node), program.batch):
            substitution[node] = kept
        elif program.kind(node) == "batch" and is_tensor(node):
            for dim in _batch_dims(program, node):
                substitution[node] = builder.call(torch.ops.cggr.gather.default, substitution[node], rows, dim)
                gathered.append((program.path(node), dim))
    builder.part = "main"
    env = clone(builder, main_roots(program), substitution, _checked_before)
    builder.env.update({old: new for old, new in env.items() if old not in builder.env})
    outputs = [env.get(out, builder.env.get(out)) if isinstance(out, fx.Node) else out for out in program.outputs]
    builder.output(tuple(outputs))
    return builder.finish("gather_rows", routing=builder.routing(gathered=tuple(gathered)))


def _checked_before(builder: Builder, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The kept rows' labels in place of a check: those of the whole batch passed it before any row was selected."""
    checks = node.target == torch.ops.cggr.checked_target.default
    return env[node.args[0]] if checks else None


def main_roots(program: Program) -> list[fx.Node]:
    """What the main pass must compute: the outputs, and nodes that act by side effect."""
    outputs = [out for out in program.outputs if isinstance(out, fx.Node)]
    effects = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta[PART] in TRAINED_PARTS and node.is_impure()
    ]
    return outputs + effects


def _batch_dims(program: Program, node: fx.Node) -> list[int]:
    dims = [dim for dim, size in enumerate(value(node).shape) if program.same_size(size, program.batch)]
    if not dims and any(program.mentions(size, program.batch) for size in value(node).shape):
        raise CannotOptimize(
            f"input {program.path(node)} of shape {tuple(value(node).shape)} has no dimension of the batch size",
            node=node,
            hint="give the input one row for each row of input_ids",
        )
    return dims
