"""Finds the experts of a mixture by dataflow: a sum over each token's choices of two products with tables of experts.

transformers writes the same MLPs in several ways (`experts_implementation`). Two are one graph for every batch:
`grouped_mm` sorts the pairs of token and expert, gathers tokens, multiplies rows of one expert by its tables, weighs,
and undoes the sort; `batched_mm` gathers a table for each pair. What is found is followed from the sum back to the
tokens, and everything on the way must be part of it, so that the operator that takes its place computes the same. The
loop over the experts that are hit ("eager") has sizes that are data and does not get here.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from cggr_compile.ir.program import Program, is_tensor, value

aten = torch.ops.aten

_GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class Experts(NamedTuple):
    """What stands for the arguments of `cggr::grouped_mlp`, nodes and constants.

    Attributes:
        gate_up, down: the tables, and whether they are those of the operator or transposed.
        batched: whether products are made with one table a pair.
        rest: activation, interleaved, and of a clamped gate alpha and limit.
    """

    hidden: fx.Node
    gate_up: tuple[fx.Node, bool]
    down: tuple[fx.Node, bool]
    weights: fx.Node
    experts: fx.Node
    gate_up_bias: fx.Node | None
    down_bias: fx.Node | None
    batched: bool
    rest: tuple[Any, ...]


class _Product(NamedTuple):
    """rows × tables[expert] + bias; `owners` are the nodes that say which expert a row has,
    `ends` where they end."""

    rows: fx.Node
    tables: fx.Node
    transposed: bool
    bias: fx.Node | None
    owners: tuple[fx.Node, ...]
    ends: fx.Node | None


def find_experts(program: Program, total: fx.Node) -> Experts | None:
    """The experts whose results `total`, a sum over choices [T, K, D] to [T, D], adds up."""
    if total.target != aten.sum.dim_IntList or list(total.args[1]) != [1] or len(total.args) > 2 or total.kwargs:
        return None
    by_token = total.args[0]
    if by_token.target not in _VIEWS or value(by_token).dim() != 3:
        return None
    weighed = by_token.args[0]
    unsorted = weighed.target == aten.index.Tensor
    inverse = _index(weighed) if unsorted else None
    weighed = weighed.args[0] if unsorted else weighed
    if weighed.target != aten.mul.Tensor:
        return None
    results, weight = weighed.args
    if not is_tensor(weight) or weight.target != aten.unsqueeze.default or weight.args[1] not in (-1, 1):
        return None
    second = _product(results)
    activated = None if second is None else _activation(second.rows)
    first = None if activated is None else _product(activated[0])
    if first is None or second is None or activated is None or first.ends is not second.ends:
        return None
    flat = weight.args[0]
    if second.ends is None:
        found = _batched(first, second, flat, None if unsorted else by_token)
    else:
        found = None if inverse is None else _grouped(program, first, second, flat, inverse)
    if found is None:
        return None
    hidden, weights, experts = found
    shape = value(by_token).shape
    if not program.same_shape(value(weights).shape, shape[:2]) or not program.same_shape(
        value(experts).shape, shape[:2]
    ):
        return None
    if not program.same_shape(value(hidden).shape, (shape[0], shape[2])):
        return None
    tensors = [hidden, first.tables, second.tables, *(bias for bias in (first.bias, second.bias) if bias is not None)]
    if len({value(tensor).dtype for tensor in tensors}) > 1:
        return None
    return Experts(
        hidden,
        (first.tables, first.transposed),
        (second.tables, second.transposed),
        weights,
        experts,
        first.bias,
        second.bias,
        second.ends is None,
        activated[1:],
    )


def _grouped(
    program: Program, first: _Product, second: _Product, flat: fx.Node, inverse: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Hidden, weights and experts of products over sorted pairs."""
    counted = first.ends
    assert counted is not None
    order = _sorted_by(counted, value(first.tables).shape[0])
    if order is None:
        return None
    sort, experts = order
    if any(_sort_of(index) is not sort for index in (*first.owners, *second.owners)):
        return None
    choices = value(experts).shape[1]
    rows = _unmasked(first.rows)[0]
    token, place = _index(rows), _index(flat)
    if token is None or place is None or not _is_part(place, sort, 1) or flat.args[0].target not in _VIEWS:
        return None
    if not _is_quotient(token, choices) or not _is_part(token.args[0], sort, 1):
        return None
    if not _is_inverse(program, inverse, sort):
        return None
    return rows.args[0], flat.args[0].args[0], experts


def _batched(
    first: _Product, second: _Product, flat: fx.Node, by_token: fx.Node | None
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Hidden, weights and experts of products with a table a pair."""
    of_pairs = {_unclamped(index) for index in (*first.owners, *second.owners)}
    repeated = first.rows
    if by_token is None or len(of_pairs) != 1 or repeated.target != aten.repeat_interleave.self_int:
        return None
    (pairs,) = of_pairs
    if pairs.target not in _VIEWS or flat.target not in _VIEWS or value(pairs.args[0]).dim() != 2:
        return None
    if tuple(repeated.args[1:]) != (value(by_token).shape[1], 0):
        return None
    return repeated.args[0], flat.args[0], pairs.args[0]


def _product(node: fx.Node) -> _Product | None:
    """The product that `node` is, with a bias added to it and zeros in place of rows of no expert."""
    node, masks = _unmasked(_written(node))
    bias, index = None, list(masks)
    if node.target == aten.add.Tensor and not node.kwargs and is_tensor(node.args[1]):
        of_expert = _index(node.args[1])
        if of_expert is None or value(node.args[1].args[0]).dim() != 2:
            return None
        bias = node.args[1].args[0]
        index.append(of_expert)
        node, masks = _unmasked(node.args[0])
        index += masks
    if str(getattr(node.target, "overloadpacket", None)) in _GROUPED:
        rows, tables, ends, *rest = node.args
        if any(x is not None for x in (*rest, *node.kwargs.values())):
            return None
        # Tables of the operator stand the other way.
        transposed = tables.target == aten.transpose.int and {x % 3 for x in tables.args[1:]} == {1, 2}
        tables = tables.args[0] if transposed else tables
        return _Product(rows, tables, not transposed, bias, tuple(index), ends)
    if node.target != aten.squeeze.dim or node.args[0].target != aten.bmm.default:
        return None
    left, right = node.args[0].args
    place = node.args[1] % 3
    transposed = place == 1
    rows, tables = (left, right) if transposed else (right, left)
    of_expert = _index(tables)
    if of_expert is None or rows.target != aten.unsqueeze.default or rows.args[1] % 3 != place or place == 0:
        return None
    return _Product(rows.args[0], tables.args[0], transposed, bias, (*index, of_expert), None)


def _activation(node: fx.Node) -> tuple[Any, ...] | None:
    """(first products, activation, interleaved, alpha, limit) of what an expert's second table multiplies."""
    if node.target == aten.silu.default:
        return node.args[0], "silu", False
    if node.target != aten.mul.Tensor or not all(map(is_tensor, node.args)):
        return None
    for gated, other in (node.args, node.args[::-1]):
        if gated.target == aten.silu.default:
            found = _gate_and_up(gated.args[0], other)
            return None if found is None else (found[0], "silu_gated", found[1])
    for raised, gated in (node.args, node.args[::-1]):
        if raised.target == aten.add.Tensor and raised.args[1] == 1 and not raised.kwargs:
            return _clamped(raised.args[0], gated)
    return None


def _clamped(up: fx.Node, gated: fx.Node) -> tuple[Any, ...] | None:
    """Of clamp(up) + 1, and gate · sigmoid(alpha · gate) of the clamped gate."""
    if gated.target != aten.mul.Tensor or not all(map(is_tensor, gated.args)):
        return None
    gate, curve = gated.args
    if curve.target != aten.sigmoid.default or curve.args[0].target != aten.mul.Tensor:
        return None
    same, alpha = curve.args[0].args
    if same is not gate or not isinstance(alpha, float) or gate.kwargs or up.kwargs:
        return None
    if gate.target != aten.clamp.default or up.target != aten.clamp.default or len(up.args) != 3:
        return None
    low, limit = up.args[1:]
    if tuple(gate.args[1:]) != (None, limit) or low != -limit or limit <= 0:
        return None
    found = _gate_and_up(gate.args[0], up.args[0])
    return None if found is None else (found[0], "clamped_gated", found[1], alpha, float(limit))


def _gate_and_up(gate: fx.Node, up: fx.Node) -> tuple[fx.Node, bool] | None:
    """What the two are the first and the second half of, or every other column; and whether it is the latter."""
    if gate.target == up.target == getitem:
        halves = gate.args[0]
        if halves is not up.args[0] or (gate.args[1], up.args[1]) != (0, 1) or len(halves.args) != 3:
            return None
        source, (size, dim) = _written(halves.args[0]), halves.args[1:]
        sizes = {aten.split.Tensor: value(gate).shape[-1], aten.chunk.default: 2}
        halved = dim in (-1, 1) and value(source).dim() == 2 and value(source).shape[-1] == 2 * value(gate).shape[-1]
        return (source, False) if halved and sizes.get(halves.target) == size else None
    if gate.target == up.target == aten.slice.Tensor and _written(gate.args[0]) is _written(up.args[0]):
        source = _written(gate.args[0])
        columns = value(source).shape[-1]
        for cuts, interleaved in ((_alternate(columns), True), (_halved(columns), False)):
            if [_cut(x, columns) for x in (gate, up)] == cuts and value(source).dim() == 2:
                return source, interleaved
    return None


def _cut(node: fx.Node, columns: int) -> tuple[int, int, int] | None:
    dim, start, end, *step = node.args[1:]
    return (start, min(end, columns), *step, 1)[:3] if dim in (-1, 1) else None


def _alternate(columns: int) -> list[tuple[int, int, int]]:
    return [(0, columns, 2), (1, columns, 2)]


def _halved(columns: int) -> list[tuple[int, int, int]]:
    return [(0, columns // 2, 1), (columns // 2, columns, 1)]


def _written(node: fx.Node) -> fx.Node:
    """What was written in place into a squeezed product, where the node is that product squeezed again."""
    lifted = node.args[0] if node.target == aten.squeeze.dim else node
    same = lifted.target == aten.unsqueeze.default and lifted.args[1] == node.args[1]
    return lifted.args[0] if same and lifted is not node else node


def _unmasked(node: fx.Node) -> tuple[fx.Node, Sequence[fx.Node]]:
    """What a node is where each row has an expert, and the nodes that say which it has."""
    if node.target != aten.masked_fill.Scalar or node.args[2] != 0:
        return node, ()
    mask = node.args[1]
    if mask.target != aten.unsqueeze.default or mask.args[0].target != aten.ge.Scalar:
        return node, ()
    return node.args[0], (mask.args[0].args[0],)


def _index(node: Any) -> fx.Node | None:
    """The one index of `x[index]` along the first dimension."""
    if not isinstance(node, fx.Node) or node.target != aten.index.Tensor or len(node.args[1]) != 1:
        return None
    return node.args[1][0]


def _unclamped(index: fx.Node) -> fx.Node:
    # An expert that is none of a rank's has the weight 0 there.
    return index.args[0] if index.target == aten.clamp.default else index


def _is_part(node: Any, sort: fx.Node, part: int) -> bool:
    return isinstance(node, fx.Node) and node.target == getitem and tuple(node.args) == (sort, part)


def _sort_of(index: fx.Node) -> fx.Node | None:
    index = _unclamped(index)
    return index.args[0] if index.target == getitem and index.args[1] == 0 else None


def _sorted_by(ends: fx.Node, count: int) -> tuple[fx.Node, fx.Node] | None:
    """The sort whose counts `ends` adds up, of experts [T, K] below `count`, and the experts."""
    if ends.target != aten.cumsum.default or ends.args[1] != 0:
        return None
    histogram = ends.args[0]
    if histogram.target != aten.histc.default or tuple(histogram.args[1:]) != (count, 0, count - 1):
        return None
    cast = histogram.args[0]
    sort = _sort_of(cast.args[0]) if cast.target in (aten._to_copy.default, aten.to.dtype) else None
    if sort is None or sort.target != aten.sort.default or len(sort.args) > 1 or sort.kwargs:
        return None
    flat = sort.args[0]
    if flat.target not in _VIEWS or value(flat).dim() != 1 or value(flat.args[0]).dim() != 2:
        return None
    return sort, flat.args[0]


def _is_quotient(node: fx.Node, by: int) -> bool:
    return str(getattr(node.target, "overloadpacket", None)) == "aten.floor_divide" and node.args[1] == by


def _is_inverse(program: Program, node: fx.Node, sort: fx.Node) -> bool:
    """Whether it is x with x[place] = 0, 1, 2, …, of the places of a sort."""
    if node.target != aten.index_put.default or len(node.args) > 3 or len(node.args[1]) != 1:
        return False
    _, (place,), numbers = node.args
    if not _is_part(place, sort, 1) or numbers.target != aten.arange.default:
        return False
    return program.same_shape(value(numbers).shape, value(place).shape)
