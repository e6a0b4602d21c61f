"""Rebuilds the main pass on the selected rows: batched inputs are gathered, the batch size becomes k.

Inputs are replaced, and nothing else where every argument has an entry for each row or is shared by all. Everything
computed from them (masks, positions, flattened sizes) is recomputed by the copied nodes, so no value of the full batch
can leak into the part that trains; `verify` checks that no size there depends on the batch symbol.

Where an argument's entries are divided among the rows by the model itself (`row_flow`), what they are merged into is
computed for the whole batch, in a part of its own, and gathered there.

Where the ranks select together, rows are gathered out of those of all ranks (`share_rows`).

Before::

    main    %hidden = aten.embedding(embed.weight, %input_ids)    # [B, S, D]

After::

    gather  %ids = cggr.gather(%input_ids, %rows, 0)
    main    %hidden = aten.embedding(embed.weight, %ids)    # [k, S, D]
"""

from __future__ import annotations

import torch
from cggr_compile.passes.analyse.row_flow import RowFlow
from cggr_compile.passes.rewrite.share_rows import share_arguments
from cggr_compile.passes.rewrite.shared import write_main_pass
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors, clone
from cggr_compile.ir.program import ORIGIN, Analysed, value
from cggr_compile.ir.roles import main_roots

aten = torch.ops.aten


def gather_rows(program: Analysed, config: RoutingConfig) -> Analysed:
    """Inserts `cggr::gather` for each batched input and copies the main pass onto the results.

    Raises:
        CannotOptimize: an input of which it cannot be proved what a row has of it (`RowFlow`), or one that is merged
            for the whole batch by something that draws random numbers.
    """
    routing = program.routing
    assert routing.rows is not None
    assert routing.kept is not None
    flow = RowFlow(program)
    builder = Builder(program)
    builder.copy_inputs()
    shared = share_arguments(builder, routing.ranks, flow) if routing.ranks is not None else None
    builder.copy_parts("router", "score", "select")
    substitution = {node: builder.env[node] for node in program.placeholders}
    if shared is not None:
        builder.part = "gather"
        substitution |= shared.arrived()
    roots = main_roots(program)
    whole = _whole(builder, flow, roots)
    builder.part = "gather"
    gathered: list[tuple[str, int]] = []

    def gather(node: fx.Node, full: fx.Node, dim: int, name: str) -> None:
        substitution[node] = builder.call(torch.ops.cggr.gather.default, full, builder.env[routing.rows], dim)
        gathered.append((name, dim))

    for node in program.placeholders:
        if program.kind(node) == "size" and program.same_size(value(node), program.batch):
            substitution[node] = builder.env[routing.kept]
        for dim in flow.dims.get(node, ()):
            gather(node, substitution[node], dim, program.path(node))
    substitution.update({node: copy for node, copy in whole.items() if node in flow.apart or node in flow.mixed})
    for node, dim in flow.whole.items():
        if node in whole:
            name = f"{node.meta.get(ORIGIN, node.name)} made of all {' and '.join(sorted(flow.names(node)))}"
            gather(node, whole[node], dim, name)
    builder.renaming.put(value(routing.kept), program.batch)
    write_main_pass(builder, roots, substitution)
    return builder.finish("gather_rows", routing=builder.routing(gathered=tuple(gathered)))


def _whole(builder: Builder[Analysed], flow: RowFlow, roots: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies what the main pass needs of values that are made for the whole batch; returns old node -> new node."""
    needed = ancestors(roots, stop=flow.whole)
    wanted = [node for node in flow.whole if not needed.isdisjoint(node.users) or node in roots]
    wanted += [root for root in roots if root in flow.mixed]
    if not wanted:
        return {}
    for node in ancestors(wanted):
        if _draws(node):
            names = " and ".join(sorted(frozenset().union(*map(flow.names, wanted))))
            raise CannotOptimize(
                f"the entries of {names} are divided among the rows by the model, behind an operator that draws random "
                f"numbers ({node.target})",
                node=node,
                hint="set that dropout to 0, or give the input one entry for each row of input_ids",
            )
    builder.part = "whole"
    return clone(builder, wanted, {node: builder.env[node] for node in builder.program.placeholders})


def _draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers; a dropout that is off or of probability 0 does not."""
    if node.target == aten.dropout.default:
        return bool(node.args[1]) and bool(node.args[2])
    if node.target == aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
