"""Rebuilds the main pass on the kept documents: arguments are gathered token by token, the sequence length becomes k.

Nothing but arguments is gathered. Masks, positions and sizes are recomputed by the copied nodes, so what trains is the
model's own step on the packed sequences of the kept documents; `verify` checks that no size there depends on S.

Behind the kept documents come places of no document. Each is a document of its own, of one token at position 0, whose
label is ignored: it is seen by no other, and no loss is of it.

Before::

    main    %hidden = aten.embedding(embed.weight, %input_ids)    # [B, S, D]

After::

    gather  %places = aten.clamp_min(%positions, 0)
    gather  %ids = cggr.gather_tokens(%input_ids, %places, [1])
    main    %hidden = aten.embedding(embed.weight, %ids)    # [B, k, D]
"""

from __future__ import annotations

import torch
from cggr_compile.passes.rewrite.shared import write_main_pass
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import Analysed, hint, is_tensor, value
from cggr_compile.ir.roles import main_roots

aten = torch.ops.aten


def gather_documents(program: Analysed, config: RoutingConfig) -> Analysed:
    """Inserts `cggr::gather_tokens` for each argument with tokens and copies the main pass onto the results.

    Raises:
        CannotOptimize: an argument of which it cannot be told what a document has of it.
    """
    routing = program.routing
    assert routing.positions is not None
    assert routing.kept_tokens is not None
    builder = Builder(program)
    builder.copy_inputs()
    builder.copy_parts("router", "score", "select")
    roots = main_roots(program)
    needed = ancestors(roots)
    labels = ancestors([program.head.target])
    substitution = {node: builder.env[node] for node in program.placeholders}
    builder.part = "gather"
    empty = builder.call(aten.lt.Scalar, builder.env[routing.positions], 0)
    places = builder.call(aten.clamp_min.default, builder.env[routing.positions], 0)
    gathered: list[tuple[str, int]] = []
    for node in program.placeholders:
        if program.kind(node) == "size" and program.same_size(value(node), program.sequence):
            substitution[node] = builder.env[routing.kept_tokens]
        if program.kind(node) not in ("batch", "constant", "size") or node not in needed:
            continue
        dims = _dims(program, node)
        if not dims:
            continue
        taken = builder.call(torch.ops.cggr.gather_tokens.default, builder.env[node], places, dims)
        name = program.path(node)
        if name == "position_ids":
            taken = builder.call(aten.masked_fill.Scalar, taken, empty, 0)
        elif node in labels and not value(node).is_floating_point():
            taken = builder.call(aten.masked_fill.Scalar, taken, empty, program.head.ignore_index)
        substitution[node] = taken
        gathered += [(name, dim) for dim in dims]
    builder.renaming.put(value(routing.kept_tokens), program.sequence)
    write_main_pass(builder, roots, substitution)
    return builder.finish("gather_documents", routing=builder.routing(gathered=tuple(gathered)))


def _dims(program: Analysed, node: fx.Node) -> list[int]:
    """The dimensions of an input that are the sequence; none of a number."""
    if not is_tensor(node):
        if program.same_size(value(node), program.sequence) or not program.mentions(value(node), program.sequence):
            return []
        raise _not_told(program, node, f"of {hint(value(node))}")
    shape = value(node).shape
    dims = [dim for dim, size in enumerate(shape) if program.same_size(size, program.sequence)]
    others = [size for dim, size in enumerate(shape) if dim not in dims]
    by_row = bool(dims) and dims[0] > 0 and program.same_size(shape[0], program.batch)
    fixed = not any(isinstance(size, torch.SymInt) for size in shape)
    one = fixed and all(size == 1 for size in shape) and isinstance(program.batch, torch.SymInt)  # and several rows
    alike = not shape or one or (fixed and program.kind(node) == "constant")
    if not alike and (not by_row or any(program.mentions(size, program.sequence) for size in others)):
        raise _not_told(program, node, f"of shape {tuple(shape)}")
    return dims if by_row else []


def _not_told(program: Analysed, node: fx.Node, what: str) -> CannotOptimize:
    return CannotOptimize(
        f"the model reads {program.path(node)} {what}, and it cannot be told what each document has of it",
        node=node,
        hint="pass tensors [batch, sequence, …], one entry for each token, a number for the whole batch without "
        "dimensions, or use route='sequence'",
    )
