"""Which sizes of a captured call are provably one, where no operator compared them.

Every dimension of an argument that may be batch or sequence has a symbol of its own while the call is traced. Most are
merged by the operators themselves: whatever is added to, compared with or joined to the hidden states has their sizes.
Two cases are left, and both are read from the graph:

* a value that is indexed by `arange(B)` along a dimension of that size has one entry for each row, or each position:
  entry r is read for row r. Padding masks are read so;
* a cross-entropy has as many targets as rows of logits. Where those rows are counted by the ids' length, the labels'
  length is the same; the labels of a decoder of its own keep theirs. Targets that are an argument of the shape of the
  ids (`shift_labels`) have the ids' sizes.

What is merged here becomes a guard of the capture: a later call in which the sizes differ is captured anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cggr_compile.ir.program import hint, value

aten = torch.ops.aten

_KEEPS_COUNT = {
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
}
_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}


def unify(graph: fx.Graph, shape: torch.Size, sequence: torch.SymInt | int) -> None:
    """Merges such sizes in the graph's shape environment; call it under the graph's fake mode. `shape` is that
    of the ids [B, S], `sequence` the labels' length."""
    length = shape[1]
    for node in graph.nodes:
        if node.target == aten.index.Tensor:
            _merge_counted(node)
        elif node.target in _LOSSES and isinstance(length, torch.SymInt) and isinstance(sequence, torch.SymInt):
            rows, targets = (_symbols_of_rows(value(arg)) for arg in node.args[:2])
            if _symbols(sequence) <= targets and _symbols(length) <= rows - targets:
                _merge(length, sequence)
            elif _symbols(length) <= rows and rows.isdisjoint(targets):
                _merge_targets(node.args[1], shape)


def _merge_counted(index: fx.Node) -> None:
    table, places = index.args
    assert isinstance(places, (list, tuple))
    for size, place in zip(value(table).shape, places, strict=False):
        counted = _count(place) if isinstance(place, fx.Node) else None
        if isinstance(size, torch.SymInt) and isinstance(counted, torch.SymInt):
            _merge(size, counted)


def _merge_targets(node: fx.Node, shape: torch.Size) -> None:
    while node.target in _KEEPS_COUNT:
        node = node.args[0]
    if node.op == "placeholder" and value(node).dim() == len(shape):
        for size, wanted in zip(value(node).shape, shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(wanted, torch.SymInt):
                _merge(size, wanted)


def _count(node: fx.Node) -> Any:
    """How many numbers `arange` gives, where the node is what it gives: from 0, in steps of 1, in any shape."""
    while node.target in _KEEPS_COUNT or (node.target == aten.add.Tensor and node.args[1] == 0):
        counted = node.args[0]
        assert isinstance(counted, fx.Node)
        if node.target == aten.slice.Tensor and not _whole(node, counted):
            return None
        node = counted
    if node.target == aten.arange.default:
        return value(node.args[0])
    starts = node.target in (aten.arange.start, aten.arange.start_step) and node.args[0] == 0
    return value(node.args[1]) if starts and node.args[2:] in ((), (1,)) else None


def _whole(part: fx.Node, source: fx.Node) -> bool:
    return all(left is right or left == right for left, right in zip(_sizes(part), _sizes(source), strict=True))


def _sizes(node: fx.Node) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in value(node).shape]


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _symbols_of_rows(tensor: torch.Tensor) -> set[Any]:
    """Those of the first size; a single example has none."""
    return {symbol for size in tensor.shape[:1] for symbol in _symbols(size)}


def _merge(left: torch.SymInt, right: torch.SymInt) -> None:
    """Comparing two backed symbols of equal size adds the guard that they are equal and merges them."""
    if hint(left) is not None and hint(left) == hint(right):
        bool(left == right)
