"""What each argument of the call is to the rows: proved by following its values until they meet values of the rows.

An argument with a dimension of the batch size has an entry for each row; one without is either shared by all rows, or
has several entries a row (the images of a batch, which lie behind one another). Sizes cannot tell these apart, but what
the model does where the argument's values meet those of the rows can:

* an operator that acts on every row alike, with the argument as a table or broadcast over the rows: it is shared;
* anything else (`masked_scatter` takes entries by their order, a view divides them among rows, a mask picks entries
  of the rows to meet theirs): the result is computed
  for the whole batch, with gradients, and *its* rows are gathered. Whatever the argument is, that is exactly what these
  rows are in the whole batch; entries of other rows get gradients of zero.

A third kind cannot be told: an argument of as many entries as the batch has rows, which are summed, picked or counted
before any of them meets a row. What comes of them is refused where it meets the rows, or the step gives it out, unless
rows look up entries elsewhere: then it is a table.

Arguments with an entry for each row are gathered at the input, unless their entries are taken by order before they meet
the token ids. What the model reads elsewhere than in the call (globals, closures, attributes) is the same for all rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import carries_data
from cggr_compile.ir.program import PART, TRAINED_PARTS, Analysed, hint, is_tensor, value
from cggr_compile.ir.roles import main_roots
from cggr_compile.ir.sequence_order import indices_of, is_pointwise, packet_of
from cggr_compile.ir.token_shapes import COUNTERS

aten = torch.ops.aten

# Operators that act on every row alike, with the places of the arguments that all rows may share: tables, weights,
# masks that are broadcast, and tensors of which only dtype or shape is read.
_SHARING: dict[Any, tuple[int, ...]] = {
    aten.linear: (1, 2),
    aten.matmul: (0, 1),
    aten.embedding: (0,),
    aten.index: (0,),
    aten.index_select: (0,),
    aten.layer_norm: (2, 3),
    aten.rms_norm: (2,),
    aten.scaled_dot_product_attention: (1, 2, 3),
    aten.bucketize: (1,),
    aten.searchsorted: (0,),
    aten.isin: (1,),
    aten.to: (1,),
    aten.type_as: (1,),
    aten.expand_as: (1,),
}
_LOOKUPS = {aten.embedding, aten.index, aten.index_select}
# Operators that give every row the same.
_REPEATS = {aten.expand, aten.expand_as, aten.repeat, aten.new_zeros, aten.new_ones, aten.new_full}
_TOKENS = ("input_ids", "labels")


class RowFlow:
    """What became of the arguments in one program.

    Attributes:
        dims: the arguments that are gathered at the input, each with its dimensions of the batch size.
        whole: the values that are computed for the whole batch and then gathered, each with that dimension.
        apart: the values that are computed of such arguments in front of the rows, with the arguments' names.
        mixed: the values that hold entries of several rows in an order of their own, with the arguments' names.

    Raises:
        CannotOptimize: an input whose size depends on the batch size without being it, or that has an entry for each
            row and is no argument; entries that reach the loss without having been divided among the rows; what is
            made of as many entries as there are rows, of which no row reads its own.
    """

    def __init__(self, program: Analysed) -> None:
        self.program = program
        self.dims: dict[fx.Node, list[int]] = {}
        self.whole: dict[fx.Node, int] = {}
        self.apart: dict[fx.Node, frozenset[str]] = {}
        self.mixed: dict[fx.Node, frozenset[str]] = {}
        self._rows: set[fx.Node] = set()
        self._picked: set[fx.Node] = set()  # entries of the rows that a mask picked out, one behind another
        self._by_row: dict[fx.Node, frozenset[str]] = {}  # of arguments with an entry for each row, not met with tokens
        self._like_rows: list[tuple[str, Any]] = []  # arguments' sizes that look like the batch's
        self._reduced: dict[fx.Node, frozenset[str]] = {}  # made of such arguments, without a dimension of that size
        self._untold: list[tuple[fx.Node, frozenset[str]]] = []  # where that meets the rows, or comes out of the step
        self._tables: frozenset[str] = frozenset()  # arguments whose entries rows look up
        self._numbers: set[fx.Node] = set()  # made of the rows' numbers in the batch
        for node in program.placeholders:
            self._enter(node)
        self._note_like_rows()
        for node in program.graph.nodes:
            if node.op == "call_function" and node.meta[PART] in TRAINED_PARTS:
                self._follow(node)
        self._refuse_mixed_loss()
        self._untold += [(node, self._reduced.get(node, frozenset())) for node in main_roots(program)]
        self._refuse_untold()

    def names(self, node: fx.Node) -> frozenset[str]:
        """The arguments, not proved to be shared, that a value depends on."""
        return self._names(node.all_input_nodes) | self._by_order(node)

    def _enter(self, node: fx.Node) -> None:
        kind, name = self.program.kind(node), self.program.path(node)
        if kind not in ("batch", "constant") or not is_tensor(node):
            return
        dims = batch_dims(self.program, node)
        if kind == "constant" and dims:
            raise CannotOptimize(
                f"{name} has an entry for each row of the batch, and is no argument of the call",
                node=node,
                hint="pass it to the model's forward: only arguments are reduced to the selected rows",
            )
        if dims:
            self.dims[node] = dims
            self._rows.add(node)
            if name not in _TOKENS:
                self._by_row[node] = frozenset((name,))
        elif kind == "batch":
            self.apart[node] = frozenset((name,))

    def _note_like_rows(self) -> None:
        """Sizes of arguments that have no dimension of the batch size."""
        by_row = {self.program.path(node) for node in self.dims}
        named = [(self.program.path(node), node) for node in self.apart]
        sizes = [node for node in self.program.placeholders if self.program.kind(node) == "size"]
        of_sizes = [(re.sub(r"_size_\d+$", "", self.program.path(node)), node) for node in sizes]
        for name, node in (*named, *(pair for pair in of_sizes if pair[0] not in by_row)):
            for size in _sizes(node):
                known = any(self.program.same_size(size, of) for of in (self.program.batch, self.program.sequence))
                if isinstance(size, torch.SymInt) and hint(size) == hint(self.program.batch) and not known:
                    self._like_rows.append((name, size))

    def _follow(self, node: fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if carries_data(source)]
        names, by_order = self._names(sources), self._by_order(node)
        met = [source for source in sources if source in self._rows]
        reduced = self._reduces(node, bool(met))
        if self._counts_rows(node) or any(source in self._numbers for source in sources):
            self._numbers.add(node)
        if met and packet_of(node) in _LOOKUPS and node.args[0] in self.apart and node not in self._numbers:
            self._tables |= self.apart[node.args[0]]
        if _picks(node) or (any(source in self._picked for source in sources) and self._row_dim(node) is None):
            self._picked.add(node)
        if not names and not by_order:
            self._leave(node, reduced, bool(met))
            if met and all(source in self._by_row for source in met):
                self._by_row[node] = frozenset().union(*(self._by_row[source] for source in met))
            return
        sized = any(self.program.mentions(size, self.program.batch) for size in _sizes(node))
        if not by_order and self._acts_alike(node, sources, bool(met), sized):
            if not met and not sized:
                self.apart[node] = names
            self._leave(node, reduced, bool(met) or sized)
            return
        dim = self._row_dim(node)
        if dim is not None:
            self.whole[node] = dim
            self._rows.add(node)
        else:
            self.mixed[node] = names | by_order

    def _leave(self, node: fx.Node, reduced: frozenset[str], of_rows: bool) -> None:
        """Notes whether a value is one of the rows', and what it is made of that may be."""
        if of_rows:
            self._rows.add(node)
            self._untold.append((node, reduced))
        else:
            self._reduced[node] = reduced

    def _acts_alike(self, node: fx.Node, sources: list[fx.Node], meets: bool, sized: bool) -> bool:
        """Whether every row reads the same of the arguments that have no entry for each row."""
        if any(source in self.mixed or source in self._picked for source in sources):
            return False
        packet = packet_of(node)
        if not meets and (not sized or packet in _REPEATS):
            return True
        if is_pointwise(node):
            return not any(self._lies_along_rows(source, node) for source in sources if source in self.apart)
        if packet in _LOOKUPS and node in self._numbers:
            return False
        if packet == aten.index and any(not _is_integer(place) for place in indices_of(node)):
            return False
        shared = {argument for place, argument in enumerate(node.args) if place in _SHARING.get(packet, ())}
        shared |= {node.kwargs.get("attn_mask")} if packet == aten.scaled_dot_product_attention else set()
        return meets and all(source in shared for source in sources if source in self.apart)

    def _reduces(self, node: fx.Node, met: bool) -> frozenset[str]:
        """The arguments of as many entries as there are rows whose dimension of that size a value no longer has."""
        if not self._like_rows:
            return frozenset()
        sizes = _sizes(node)
        read = [source for source in node.all_input_nodes if not (met and source in self.apart)]
        of_sources = [size for source in read for size in _sizes(source)]
        lost = {
            name
            for name, symbol in self._like_rows
            if any(self.program.mentions(size, symbol) for size in of_sources)
            and not any(self.program.mentions(size, symbol) for size in sizes)
        }
        return frozenset(lost).union(*(self._reduced.get(source, ()) for source in node.all_input_nodes))

    def _refuse_untold(self) -> None:
        for node, reduced in self._untold:
            if names := " and ".join(sorted(reduced - self._tables)):
                raise CannotOptimize(
                    f"cannot tell whether {names}, with as many entries as the batch has rows, has one for each row: "
                    "no row reads an entry of its own",
                    node=node,
                    hint=f"let each row read its own entry of {names}, or pass what is made of {names} instead",
                )

    def _counts_rows(self, node: fx.Node) -> bool:
        """Whether a value counts the rows of the batch."""
        packet = packet_of(node)
        if packet not in (*COUNTERS, aten.cumsum) or not value(node).dim():
            return False
        size = value(node).shape[node.args[1] if packet == aten.cumsum else 0]
        return self.program.same_size(size, self.program.batch)

    def _lies_along_rows(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether a value that meets the rows entry by entry has entries along them, and is not broadcast."""
        pairs = zip(reversed(value(source).shape), reversed(value(node).shape), strict=False)
        return any(size != 1 and self.program.mentions(rows, self.program.batch) for size, rows in pairs)

    def _row_dim(self, node: fx.Node) -> int | None:
        """The one dimension of the batch size that a tensor has, where no other depends on it."""
        sizes = _sizes(node)
        dims = [dim for dim, size in enumerate(sizes) if self.program.mentions(size, self.program.batch)]
        exact = is_tensor(node) and len(dims) == 1 and self.program.same_size(sizes[dims[0]], self.program.batch)
        return dims[0] if exact else None

    def _by_order(self, node: fx.Node) -> frozenset[str]:
        """The arguments with an entry for each row whose values the node takes in their order, however many a row."""
        packet = packet_of(node)
        taken = packet == aten.masked_scatter or (
            packet == aten.index_put and any(not _is_integer(place) for place in indices_of(node))
        )
        return self._by_row.get(node.args[2], frozenset()) if taken else frozenset()

    def _names(self, sources: Iterable[fx.Node]) -> frozenset[str]:
        found = (known[source] for source in sources for known in (self.apart, self.mixed) if source in known)
        return frozenset().union(*found)

    def _refuse_mixed_loss(self) -> None:
        head, outputs = self.program.head, self.program.outputs
        for node in (head.hidden, head.target, outputs[self.program.loss_output]):
            if node in self.mixed:
                raise CannotOptimize(
                    f"cannot tell which rows the entries of {' and '.join(sorted(self.mixed[node]))} belong to: they "
                    "reach the loss in an order of their own",
                    node=node,
                    hint="give the input one entry for each row of input_ids, or use route='loss'",
                )


def batch_dims(program: Analysed, node: fx.Node) -> list[int]:
    """The dimensions of an input that are the batch.

    Raises:
        CannotOptimize: its size depends on the batch size otherwise.
    """
    sizes = value(node).shape
    dims = [dim for dim, size in enumerate(sizes) if program.same_size(size, program.batch)]
    if not dims and any(program.mentions(size, program.batch) for size in sizes):
        raise CannotOptimize(
            f"input {program.path(node)} of shape {tuple(sizes)} has no dimension of the batch size",
            node=node,
            hint="give the input one row for each row of input_ids",
        )
    return dims


def _picks(node: fx.Node) -> bool:
    """Whether a node gives the entries of a tensor at the places where a mask holds."""
    packet = packet_of(node)
    if packet == aten.index:
        return any(not _is_integer(place) for place in indices_of(node))
    return packet in (aten.masked_select, aten.nonzero)


def _sizes(node: fx.Node) -> list[Any]:
    values = value(node) if isinstance(value(node), (tuple, list)) else [value(node)]
    return [size for val in values for size in (val.shape if isinstance(val, torch.Tensor) else [val])]


def _is_integer(place: fx.Node) -> bool:
    return not value(place).is_floating_point() and value(place).dtype not in (torch.bool, torch.uint8)
