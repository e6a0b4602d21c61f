"""Key and value heads that were repeated for grouped queries, as they were before."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cggr_compile.ir.program import Program, value

aten = torch.ops.aten


def unrepeated(program: Program, node: fx.Node) -> fx.Node | None:
    """The heads [B, H, S, D] that `node` [B, H·n, S, D] repeats n times each, next to each other, or None."""
    joined = _through_copies(program, node)
    if joined.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    expanded = _through_copies(program, joined.args[0])
    if expanded.target != aten.expand.default:
        return None
    lifted = _through_copies(program, expanded.args[0])
    if lifted.target != aten.unsqueeze.default or lifted.args[1] not in (2, -3):
        return None
    heads = _through_copies(program, lifted.args[0])
    if len(value(heads).shape) != 4:
        return None
    batch, count, length, width = value(heads).shape
    times = value(expanded).shape[2]
    wanted = ((batch, count, times, length, width), (batch, count * times, length, width))
    same = all(_same_sizes(program, x, sizes) for x, sizes in zip((expanded, node), wanted, strict=True))
    return heads if same else None


def _through_copies(program: Program, node: fx.Node) -> fx.Node:
    """What a node's elements are, before copies of them and slices of everything."""
    while True:
        source = node.args[0] if node.args else None
        whole = node.target == aten.slice.Tensor and _same_sizes(program, node, value(source).shape)
        if not whole and node.target not in (aten.clone.default, aten.contiguous.default, aten.alias.default):
            return node
        node = source


def _same_sizes(program: Program, node: fx.Node, sizes: Any) -> bool:
    shape = value(node).shape
    return len(shape) == len(sizes) and all(program.same_size(a, b) for a, b in zip(shape, sizes, strict=True))
