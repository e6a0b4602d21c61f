"""Nodes that bring the rows of all ranks to each of them, where the ranks select together.

All ranks hold the same scores then and run the same rule, so they select the same rows; each trains a part of them, for
which it needs the arguments of rows that are elsewhere. What is sent has no gradient and is small beside a step: token
ids, labels and masks. It is started in front of the router and waited for behind the selection.

Before::

    select  %rows = cggr.select(%scores, %valid, %kept, "topk", None)    # of [B], [k]
    gather  %ids = cggr.gather(%input_ids, %rows, 0)

After::

    gather  %start = start_rows((%input_ids, …), …)                                    # in front of the router
    select  %share = finish_rows(start_rows((%scores, %counts), …), …)                 # [R · B]
    select  %all = cggr.select(%share[0], %valid, R · %kept, "topk", None)             # [R · k]
    select  %rows = %all[rank], %all[rank + R], …                                      # [k]
    gather  %whole = finish_rows(%start, (%input_ids, …), …)                           # [R · B, S]
    gather  %ids = cggr.gather(%whole[0], %rows, 0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from operator import getitem
from typing import Any, Generic, NoReturn, TypeVar

import torch
from cggr_compile.kernels.collectives import Rows, finish_rows, start_rows
from cggr_compile.passes.analyse.row_flow import RowFlow
from torch import fx

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed, Region, Routing, value
from cggr_compile.torch_internals.distributed import Ranks

aten = torch.ops.aten
K = TypeVar("K")


class SharedRows(Generic[K]):
    """Tensors with an entry for each row, each with the dimension of the rows, on their way to all ranks from where
    this is made."""

    def __init__(self, builder: Builder[Analysed], ranks: Ranks, sent: Mapping[K, tuple[fx.Node, int]]) -> None:
        self._builder, self._keys = builder, list(sent)
        self._tensors = tuple(node for node, _ in sent.values())
        self._how = Rows(tuple(dim for _, dim in sent.values()), ranks.count, ranks.group)
        self._started = self._quietly(start_rows, self._tensors, self._how)

    def arrived(self) -> dict[K, fx.Node]:
        """The tensors with the rows of all ranks, by the keys that they were sent under."""
        found = self._quietly(finish_rows, self._started, self._tensors, self._how)
        return {key: self._quietly(getitem, found, place) for place, key in enumerate(self._keys)}

    def _quietly(self, *call: Any) -> fx.Node:
        before, self._builder.region = self._builder.region, Region(grad=False)
        node = self._builder.call(*call)
        self._builder.region = before
        return node


def share_arguments(builder: Builder[Analysed], ranks: Ranks, flow: RowFlow) -> SharedRows[fx.Node]:
    """Starts to send the arguments that are gathered by row, in the order of `flow.dims`.

    Raises:
        CannotOptimize: an argument that cannot travel by row.
    """
    for node in flow.program.placeholders:
        if node in flow.dims or node in flow.apart:
            _refuse(flow, node)
    for node in (*flow.whole, *flow.mixed):
        names = " and ".join(sorted(flow.names(node)))
        _raise(node, f"the entries of {names} are divided among the rows by the model")
    if any(shard.unit.ranks != ranks.count for shard in flow.program.shards.values()):
        raise CannotOptimize(
            f"selection_scope='global' selects over {ranks.count} ranks, and fully_shard has a mesh of fewer",
            hint="give fully_shard the mesh of all ranks, or use selection_scope='local'",
        )
    builder.part = "gather"
    return SharedRows(builder, ranks, {node: (builder.env[node], dims[0]) for node, dims in flow.dims.items()})


def _refuse(flow: RowFlow, node: fx.Node) -> None:
    """Raises `CannotOptimize` for an argument of which a row that trains on another rank would not have its entry."""
    val, dims = value(node), flow.dims.get(node, [])
    problem = ""
    if len(dims) > 1:
        problem = "has several dimensions of rows"
    elif not dims and val.dim() > 0:
        problem = "has no entry for each row, so another rank's may differ"
    if problem:
        _raise(node, f"{flow.program.path(node)} {problem}")


def _raise(node: fx.Node, problem: str) -> NoReturn:
    raise CannotOptimize(
        f"selection_scope='global' sends rows to other ranks, and {problem}",
        node=node,
        hint="give the argument one entry for each row of input_ids, or use selection_scope='local'",
    )


def share_scores(
    builder: Builder[Analysed], ranks: Ranks, routing: Routing, noise: fx.Node | None
) -> tuple[Routing, fx.Node | None]:
    """The routing with `scores`, `counts` and `valid` of the rows of all ranks, and their noise; one collective."""
    # fp32 holds the counted tokens of a row exactly up to 2**24.
    own = {"counts": builder.call(aten.to.dtype, routing.counts, torch.float32), "scores": routing.scores}
    sent = {name: (node, 0) for name, node in {**own, "noise": noise}.items() if node is not None}
    found = SharedRows(builder, ranks, sent).arrived()
    counts = builder.call(aten.to.dtype, found["counts"], torch.int64)
    valid = builder.call(aten.gt.Scalar, counts, 0)
    routing = dataclasses.replace(routing, ranks=ranks, scores=found.get("scores"), counts=counts, valid=valid)
    return routing, found.get("noise")


def own_part(builder: Builder[Analysed], ranks: Ranks, kept: fx.Node, selected: fx.Node) -> fx.Node:
    """Of [R · k] entries the [k] that this rank trains: every R-th, so that rows of one rank, and those that only fill
    up, are spread over all."""
    return builder.call(aten.select.int, builder.call(aten.view.default, selected, [kept, ranks.count]), 1, ranks.rank)
