"""Gathers the parameters that FSDP2 shards, unit by unit, and so scatters their gradients.

Up to here a sharded parameter is an input like any other, whole. This pass makes the rank's shard the input, and what
reads the parameter reads it gathered: router and main pass together. A unit starts to be gathered in front of what
first reads the unit before it, so it arrives while that one computes; units come in the order in which the step first
reads them, which is the same on all ranks, whatever each of them selects. Autograd scatters the gradients: those of a
unit at once, when the last one is there (`kernels/collectives.py`).

Where a unit reshards, its gathering is tagged to be computed again in the backward, as FSDP2 does, for inner backends
that own a partitioner; `inner="eager"` keeps what it gathered until the backward has used it. The partitioner puts what
it computes again in front of what first reads it, so there a unit would be gathered while nothing computes, and behind
the gradients that are being sent: `prefetch_gathers`, which inductor calls, has each start a unit earlier.

Before::

    input   %weight [64, 32]
    main    %linear = linear(%x, %weight)

After::

    input   %weight [32, 32]                                       # of 2 ranks
    shards  %start = start_gather((%weight, …), …)
    shards  %finish = finish_gather(%start, (%weight, …), …)       # behind what computes with the unit before
    main    %linear = linear(%x, %finish[0])
"""

from __future__ import annotations

from itertools import groupby, pairwise
from operator import getitem

import torch
from cggr_compile.kernels.collectives import Gathering, finish_gather, start_gather
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import PART, REGION, TRAINED_PARTS, Analysed, is_tensor, value
from cggr_compile.ir.roles import changes_of
from cggr_compile.ir.shards import Unit

# Of all regions that are computed again the last: a gathering that one of the others reads stays one of its own.
_REGION = 1_000_000


def unshard_parameters(program: Analysed, config: RoutingConfig) -> Analysed:
    """Makes inputs of the shards, and writes the gathering of each unit that something reads.

    Raises:
        CannotOptimize: the forward changes a parameter.
    """
    for node in changes_of(program):
        if node.args[0].name in program.shards:
            raise CannotOptimize(
                f"the forward changes the parameter {program.path(node.args[0])} in place, of which each rank has a "
                "shard (fully_shard)",
                node=node,
                hint="change it after optimizer.step(), or train by DistributedDataParallel",
            )
    builder = Builder(program)
    members: dict[Unit, list[fx.Node]] = {}
    for node in program.placeholders:
        new, shard = builder.copy(node), program.shards.get(node.name)
        if shard is not None:
            new.meta["val"] = _local(program, node)
            if node.users:
                members.setdefault(shard.unit, []).append(node)
    gathering = _Gathering(builder, members)
    calls = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    for region, run in groupby(calls, _checkpoint):
        for nodes in [list(run)] if region[0] is not None else ([node] for node in run):
            builder.part = "shards"
            gathering.before(nodes)
            for node in nodes:
                builder.copy(node)
    builder.output(fx.map_arg(program.output.args[0], lambda old: builder.env[old]))
    return builder.finish("unshard_parameters")


def prefetch_gathers(graph: fx.Graph) -> None:
    """Starts each gathering of a graph of ATen's operators in front of the wait for the one before it; one that needs
    what was gathered before (scores do) stays where it is."""
    wait, gather = (getattr(torch.ops._c10d_functional, x).default for x in ("wait_tensor", "all_gather_into_tensor"))
    place = {node: index for index, node in enumerate(graph.nodes)}
    waits = [node for node in place if node.target is wait and node.args[0].target is gather]
    for before, own in pairwise(waits):
        needed = ancestors([own.args[0]])
        if not any(node.target is wait for node in needed):
            for node in sorted(needed, key=place.__getitem__):
                if place[node] > place[before]:
                    before.prepend(node)


def _checkpoint(node: fx.Node) -> tuple[int | None, bool]:
    """The checkpointed region of a node, which stays in one piece."""
    return node.meta.get("ac_graph_id"), node.meta[PART] in TRAINED_PARTS


def _local(program: Analysed, node: fx.Node) -> torch.Tensor:
    whole, shard = value(node), program.shards[node.name]
    with program.fake_mode:
        local = torch.empty((shard.rows, *whole.shape[1:]), dtype=shard.dtype, device=whole.device)
    return local.requires_grad_(whole.requires_grad)


class _Gathering:
    """The units of a program, gathered one ahead of what reads them."""

    def __init__(self, builder: Builder[Analysed], members: dict[Unit, list[fx.Node]]) -> None:
        self._builder = builder
        self._members = members
        unit_of = {node: unit for unit, nodes in members.items() for node in nodes}
        readers = (source for node in builder.program.graph.nodes for source in node.all_input_nodes)
        self._unit_of = unit_of
        self._waiting = list(dict.fromkeys(unit_of[source] for source in readers if source in unit_of))
        self._shard_of = {node: builder.env[node] for node in unit_of}
        self._trained = ancestors([builder.program.output], through=_passes_gradients)
        self._started: dict[Unit, fx.Node] = {}

    def before(self, nodes: list[fx.Node]) -> None:
        """Writes what must be there when the nodes run."""
        sources = (source for node in nodes for source in node.all_input_nodes)
        read = {self._unit_of[source] for source in sources if source in self._unit_of}
        while self._waiting and read & set(self._waiting):
            unit = self._waiting.pop(0)
            for each in (unit, *self._waiting[:1]):
                if each not in self._started:
                    self._started[each] = self._start(each)
            self._finish(unit)

    def _start(self, unit: Unit) -> fx.Node:
        return self._call(unit, start_gather, self._shards(unit), self._how(unit))

    def _finish(self, unit: Unit) -> None:
        parameters = self._call(unit, finish_gather, self._started[unit], self._shards(unit), self._how(unit))
        for place, node in enumerate(self._members[unit]):
            self._builder.env[node] = self._call(unit, getitem, parameters, place)

    def _shards(self, unit: Unit) -> tuple[fx.Node, ...]:
        return tuple(self._shard_of[node] for node in self._members[unit])

    def _how(self, unit: Unit) -> Gathering:
        rows = tuple(value(node).shape[0] for node in self._members[unit])
        trained = tuple(node in self._trained for node in self._members[unit])
        return Gathering(rows, trained, unit.dtype, unit.reduce_dtype, unit.divisor, unit.ranks, unit.group)

    def _call(self, unit: Unit, *given: object) -> fx.Node:
        node = self._builder.call(*given)  # type: ignore[arg-type]
        if unit.reshards:
            node.meta.update({"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": _REGION})
        return node


def _passes_gradients(node: fx.Node) -> bool:
    """Whether autograd follows a node: one that requires none, or only counts and compares, has no gradient to pass."""
    if node.op == "placeholder":
        return True
    detaches = node.meta[REGION].grad is False or node.target is torch.ops.aten.detach.default
    return not detaches and (not is_tensor(node) or value(node).is_floating_point())
