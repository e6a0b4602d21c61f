"""How values of a captured program hold tokens: which dimensions are the sequence, which the batch, what depends on the
position. Read from the symbols in their shapes and from what they are computed of."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from cggr_compile.ir.program import Program, is_tensor, value
from cggr_compile.ir.sequence_order import CUTS, is_pointwise, is_token_count, packet_of

aten = torch.ops.aten

_VIEWS = {aten.view, aten.reshape, aten._unsafe_view}
_BY_ROW = {*_VIEWS, aten.linear, aten.to, aten._to_copy}
_REMAINDERS = {aten.remainder, aten.fmod}
COUNTERS = {aten.arange, aten.linspace}


class TokenShapes:
    """Questions about the values of one program, whose sequence length is a symbol."""

    def __init__(self, program: Program) -> None:
        assert isinstance(program.sequence, torch.SymInt)
        self.program = program
        self.sequence = program.sequence
        self.positional: dict[fx.Node, bool] = {}

    def is_flattened(self, node: fx.Node) -> bool:
        """Whether rows are tokens in order: a view of [B, S, …] as [B · S, …], or what row by row is computed from
        one."""
        if not is_tensor(node) or not node.args or not is_tensor(node.args[0]):
            return False
        source, shape, before = node.args[0], value(node).shape, value(node.args[0]).shape
        if not shape or not self.program.same_size(shape[0], self.program.batch * self.sequence):
            return False
        if packet_of(node) in _VIEWS and not self.program.same_shape(before, shape):
            batch_first = len(before) > 1 and self.is_batch(before[0]) and self.is_sequence(before[1])
            return batch_first and self.program.same_shape(before[2:], shape[1:])
        by_row = packet_of(node) in _BY_ROW or (len(node.all_input_nodes) == 1 and is_pointwise(node))
        return by_row and self.is_flattened(source)

    def counts_flattened(self, node: fx.Node) -> bool:
        """Whether the node counts flattened tokens: unlike positions in the sequence, these are counted anew."""
        size = value(node).shape[0]
        return is_token_count(self.program, size) and not self.is_sequence(size)

    def finds_places(self, node: fx.Node) -> bool:
        """Whether the node has an entry for each position without counting these: S places out of something longer, or
        what is left modulo S, of flattened tokens' numbers say."""
        packet = packet_of(node)
        if packet in _REMAINDERS:
            return self.program.mentions(value(node.args[1]), self.sequence)
        if packet not in CUTS:
            return False
        pairs = zip(value(node.args[0]).shape, value(node).shape, strict=True)
        return any(self.is_sequence(now) and not self.program.mentions(before, self.sequence) for before, now in pairs)

    def lead(self, node: fx.Node, reader: fx.Node) -> int | None:
        """How many dimensions broadcasting adds in front of a value to reach the batch; None where that is not
        known."""
        shape = value(node).shape
        if self.is_batch(shape[0]):
            return 0
        if is_pointwise(reader):
            result = value(reader).shape
        elif reader.target == aten.scaled_dot_product_attention.default and node not in reader.args[:3]:
            result = value(reader.args[0]).shape
        else:
            return None
        if not self.is_batch(result[0]):
            return None
        lead = len(result) - len(shape)
        if lead == 0:
            return 0 if shape[0] == 1 else None
        return lead if lead > 0 else None

    def holds_tokens(self, node: fx.Node) -> bool:
        """Whether the value can be gathered along its dimensions of size S."""
        return self._only_sequence(node) and self.has_positions(node)

    def has_positions(self, node: fx.Node) -> bool:
        """Whether the value may differ from token to token: it depends on the batch, on positions or on chance."""
        if node not in self.positional:
            if node.op == "placeholder":
                found = self.program.kind(node) != "size" and self.mentions_sequence(node)
            elif packet_of(node) in COUNTERS:
                found = self.is_sequence(value(node).shape[0])
            else:
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                found = random or self.finds_places(node)
                found = found or any(self.has_positions(source) for source in node.all_input_nodes)
            self.positional[node] = found
        return self.positional[node]

    def is_sequence(self, size: Any) -> bool:
        """Whether a size is S."""
        return self.program.same_size(size, self.program.sequence)

    def is_batch(self, size: Any) -> bool:
        """Whether a size is B."""
        return self.program.same_size(size, self.program.batch)

    def mentions_sequence(self, node: fx.Node) -> bool:
        """Whether a size of the node's value depends on S."""
        return any(self.program.mentions(size, self.sequence) for size in _sizes(value(node)))

    def _only_sequence(self, node: fx.Node) -> bool:
        """Whether the value is a tensor whose dimensions of a size that depends on S are of size S itself."""
        dims = [size for size in _sizes(value(node)) if self.program.mentions(size, self.sequence)]
        return is_tensor(node) and bool(dims) and all(map(self.is_sequence, dims))

    def text(self, node: fx.Node) -> str:
        """The node's shape in B and S."""
        return shape_text(self.program, value(node))


def shape_text(program: Program, val: Any) -> str:
    """`[B, 1, S, S]` of a tensor, its sizes in the batch size B and the sequence length S."""
    names = {
        program.expression(size): sympy.Symbol(name)
        for name, size in (("B", program.batch), ("S", program.sequence))
        if isinstance(size, torch.SymInt)
    }
    sizes = [sympy.sympify(program.expression(size)).xreplace(names) for size in _sizes(val)]
    return f"[{', '.join(map(str, sizes))}]".replace("*", "·")


def _sizes(val: Any) -> list[Any]:
    values = val if isinstance(val, (list, tuple)) else [val]
    shapes = [item.shape if isinstance(item, torch.Tensor) else [item] for item in values]
    return [size for shape in shapes for size in shape if isinstance(size, (int, torch.SymInt, torch.SymFloat))]
