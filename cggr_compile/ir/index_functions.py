"""Tensors that depend on shapes only, as functions of their indices.

`IndexFunctions` reads a graph and finds, for a node computed from sizes and constants alone, an expression of its
element at (i0, i1, …): an attention mask built from `arange`, comparisons and `&` becomes `i3 <= i2`, for every size at
once. Nothing is run and nothing is guessed: an operator without a rule here, or a rule whose conditions are not
met, leaves its result unknown, and so everything computed from it. Integer tensors may be let in by a name
(`IndexFunctions.name`): what is computed of them is an expression of their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.ir.program import expression, value

aten = torch.ops.aten

Expression = Any  # a sympy integer expression or a sympy boolean


def axis(dim: int) -> sympy.Symbol:
    """The index along dimension `dim`."""
    return sympy.Symbol(f"i{dim}", integer=True, nonnegative=True)


def element_of(name: str, *places: Expression) -> Expression:
    """The element of a named integer tensor at some indices; 0 or another number for that of a boolean one."""
    return sympy.Function(name, integer=True)(*places)


class IndexFunction(NamedTuple):
    """An integer or boolean tensor: its sizes, and its element as an expression of `axis(0)`, `axis(1)`, …"""

    sizes: tuple[Any, ...]
    element: Expression

    def at(self, places: Sequence[Expression]) -> Expression:
        """The element with each index replaced."""
        return self.element.subs(dict(zip(map(axis, range(len(self.sizes))), places, strict=True)), simultaneous=True)


class IndexFunctions:
    """The index functions of one graph's nodes, found on demand and remembered.

    `shape_env` knows which of the graph's symbolic sizes are equal; `inputs` are integer tensors by the names that
    stand for their elements; `one_row` says that the first dimension of one has one entry, always.
    """

    def __init__(self, shape_env: ShapeEnv, inputs: Mapping[str, fx.Node] | None = None) -> None:
        self.shape_env = shape_env
        self._found: dict[fx.Node, IndexFunction | None] = {}
        shapes = [value(node).shape for node in (inputs or {}).values()]
        self.one_row = any(isinstance(shape[0], int) and shape[0] == 1 for shape in shapes)
        for name, node in (inputs or {}).items():
            self.name(node, name)

    def name(self, node: fx.Node, name: str) -> None:
        """Lets `name` stand for the elements of an integer tensor, whatever they are; of a boolean one, where they are
        not 0."""
        sizes = tuple(map(self.size, value(node).shape))
        element = element_of(name, *map(axis, range(len(sizes))))
        boolean = value(node).dtype == torch.bool
        self._found[node] = IndexFunction(sizes, sympy.Ne(element, 0) if boolean else element)

    def of(self, node: fx.Node) -> IndexFunction | None:
        """The node's index function, or None where its elements are not known to depend on their indices alone."""
        for needed in self._unread(node):
            self._found[needed] = self._read(needed)
        return self._found[node]

    def _unread(self, node: fx.Node) -> list[fx.Node]:
        """What has to be read for `node`, in an order in which arguments come first."""
        order: list[fx.Node] = []
        seen = set(self._found)
        stack = [(node, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                order.append(current)
            elif current not in seen:
                seen.add(current)
                stack.append((current, True))
                # An operator without a rule is unknown whatever its arguments are.
                if current.target in _RULES:
                    stack += [(source, False) for source in current.all_input_nodes]
        return order

    def _read(self, node: fx.Node) -> IndexFunction | None:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        result = value(node)
        if rule is None or not isinstance(result, torch.Tensor) or result.is_floating_point() or result.is_complex():
            return None
        arguments = [self._argument(argument) for argument in node.args]
        if node.target in _OF_SIZES:
            arguments[0] = None
        options = {name: self._argument(argument) for name, argument in node.kwargs.items()}
        if _unknown(arguments) or _unknown(list(options.values())):
            return None
        element = rule(_Call(node, self), *arguments, **options)
        return None if element is None else IndexFunction(tuple(map(self.size, result.shape)), element)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._argument(part) for part in argument]
        if not isinstance(argument, fx.Node):
            return argument
        held = value(argument)
        if isinstance(held, torch.Tensor):
            return self._found.get(argument) or _UNKNOWN
        return self.size(held) if isinstance(held, (int, torch.SymInt)) else _UNKNOWN

    def size(self, size: int | torch.SymInt) -> Expression:
        """A size as a sympy expression in which equal sizes are equal."""
        return sympy.sympify(expression(self.shape_env, size))


_UNKNOWN = object()


def _unknown(arguments: list[Any]) -> bool:
    return any(part is _UNKNOWN or (isinstance(part, list) and _unknown(part)) for part in arguments)


class _Call(NamedTuple):
    """One node while its rule is applied."""

    node: fx.Node
    functions: IndexFunctions

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The result's sizes."""
        return tuple(map(self.functions.size, value(self.node).shape))

    def broadcast(self, operand: Any) -> Expression:
        """An operand's element at the result's indices."""
        return broadcast(operand, self.sizes)


def broadcast(operand: IndexFunction | Expression, sizes: Sequence[Any]) -> Expression:
    """The element of an operand (a number stands for itself) at the indices of a result of `sizes`."""
    if not isinstance(operand, IndexFunction):
        return sympy.sympify(operand)
    first = len(sizes) - len(operand.sizes)
    places = [0 if own == 1 and sizes[first + dim] != 1 else axis(first + dim) for dim, own in enumerate(operand.sizes)]
    return operand.at(places)


def _arange(call: _Call, *bounds: Any, **options: Any) -> Expression:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    return sympy.sympify(start) + sympy.sympify(step) * axis(0)


def _constant(number: Any) -> Expression:
    return sympy.true if number is True else sympy.false if number is False else sympy.sympify(number)


def _full(number: int) -> Callable[..., Expression]:
    def rule(call: _Call, *_: Any, **__: Any) -> Expression:
        return _constant(bool(number) if value(call.node).dtype == torch.bool else number)

    return rule


def _full_of(place: int) -> Callable[..., Expression]:
    def rule(call: _Call, *arguments: Any, **_: Any) -> Expression | None:
        number = arguments[place]
        if isinstance(number, float):
            return None
        return _constant(bool(number) if value(call.node).dtype == torch.bool else number)

    return rule


def _is_boolean(element: Expression) -> bool:
    return isinstance(element, (Relational, BooleanAtom, BooleanFunction))


def _same(call: _Call, x: IndexFunction, *_: Any, **__: Any) -> Expression | None:
    """Copies, and casts that keep every value."""
    dtype = value(call.node).dtype
    if dtype == torch.bool:
        return x.element if _is_boolean(x.element) else sympy.Ne(x.element, 0)
    return x.element if dtype in (torch.int64, torch.int32) and not _is_boolean(x.element) else None


def _unsqueeze(call: _Call, x: IndexFunction, dim: int) -> Expression:
    dim %= len(x.sizes) + 1
    return x.at([axis(place + (place >= dim)) for place in range(len(x.sizes))])


def _squeeze(call: _Call, x: IndexFunction, dim: int) -> Expression:
    dim %= len(x.sizes)
    if x.sizes[dim] != 1:
        return x.element
    return x.at([axis(place - (place > dim)) if place != dim else 0 for place in range(len(x.sizes))])


def _select(call: _Call, x: IndexFunction, dim: int, index: Any) -> Expression | None:
    dim %= len(x.sizes)
    if not isinstance(index, int) or index < 0:
        return None
    return x.at([axis(place - (place > dim)) if place != dim else index for place in range(len(x.sizes))])


def _slice(
    call: _Call, x: IndexFunction, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Expression | None:
    start = 0 if start is None else start
    if not isinstance(start, int) or start < 0 or step != 1:
        return None
    dim %= len(x.sizes)
    return x.at([axis(place) + (start if place == dim else 0) for place in range(len(x.sizes))])


def _view(call: _Call, x: IndexFunction, *_: Any, **__: Any) -> Expression | None:
    return x.element if call.sizes == x.sizes else None


def _expand(call: _Call, x: IndexFunction, *_: Any, **__: Any) -> Expression:
    return call.broadcast(x)


def _permute(call: _Call, x: IndexFunction, dims: Sequence[int]) -> Expression:
    rank = len(x.sizes)
    to = {dim % rank: place for place, dim in enumerate(dims)}
    return x.at([axis(to[dim]) for dim in range(rank)])


def _transpose(call: _Call, x: IndexFunction, first: int, second: int) -> Expression:
    dims = list(range(len(x.sizes)))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(call, x, dims)


def _elementwise(function: Callable[..., Expression], of_booleans: bool = False) -> Callable[..., Expression | None]:
    def rule(call: _Call, *operands: Any, **options: Any) -> Expression | None:
        if options or any(isinstance(operand, float) for operand in operands):
            return None
        elements = [call.broadcast(operand) for operand in operands]
        if any(_is_boolean(element) != of_booleans for element in elements):
            return None
        return function(*elements)

    return rule


def _related(relation: Callable[..., Expression]) -> Callable[..., Expression]:
    """A comparison, of which |x| <= y is written as x <= y and -x <= y."""

    def compare(x: Expression, y: Expression) -> Expression:
        if relation in (sympy.Le, sympy.Lt) and isinstance(x, sympy.Abs):
            return sympy.And(relation(x.args[0], y), relation(-x.args[0], y))
        if relation in (sympy.Ge, sympy.Gt) and isinstance(y, sympy.Abs):
            return sympy.And(relation(x, y.args[0]), relation(x, -y.args[0]))
        return relation(x, y)

    return compare


def _index(call: _Call, x: IndexFunction, places: list[Any]) -> Expression | None:
    """Reading at indices that run over whole dimensions, so that none is out of range or negative."""
    if len(places) != len(x.sizes) or not all(isinstance(place, IndexFunction) for place in places):
        return None
    chosen = [call.broadcast(place) for place in places]
    in_range = all(
        place == 0
        or (place.is_Symbol and any(place == axis(dim) and size == own for dim, size in enumerate(call.sizes)))
        for place, own in zip(chosen, x.sizes, strict=True)
    )
    return x.at(chosen) if in_range else None


def _diff(
    call: _Call, x: IndexFunction, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> Expression | None:
    """Differences with one element in front, where the first agrees with the rest."""
    dim %= len(x.sizes)
    if n != 1 or not isinstance(prepend, IndexFunction) or prepend.sizes[dim] != 1 or append is not None:
        return None
    here = [axis(place) for place in range(len(x.sizes))]
    before = [place - 1 if index == dim else place for index, place in enumerate(here)]
    first = [0 if index == dim else place for index, place in enumerate(here)]
    rest = sympy.expand(x.element - x.at(before))
    start = sympy.expand(x.at(first) - prepend.at(first))
    return rest if sympy.expand(rest.subs(axis(dim), 0) - start) == 0 else None


def _cumsum(call: _Call, x: IndexFunction, dim: int, **_: Any) -> Expression | None:
    if x.element in (sympy.false, sympy.Integer(0)):
        return sympy.Integer(0)
    return None


def _tril(keep: Callable[[Expression, Expression], Expression]) -> Callable[..., Expression | None]:
    def rule(call: _Call, x: IndexFunction, diagonal: int = 0) -> Expression | None:
        if value(call.node).dtype != torch.bool:
            return None
        rank = len(x.sizes)
        return sympy.And(x.element, keep(axis(rank - 1) - axis(rank - 2), sympy.sympify(diagonal)))

    return rule


_COMPARISONS = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}
_CONNECTIVES = {
    "bitwise_and": sympy.And, "logical_and": sympy.And, "__and__": sympy.And,
    "bitwise_or": sympy.Or, "logical_or": sympy.Or, "__or__": sympy.Or,
}  # fmt: skip


def _rules() -> dict[Any, Callable[..., Expression | None]]:
    rules: dict[Any, Callable[..., Expression | None]] = {
        aten.arange.default: _arange,
        aten.arange.start: _arange,
        aten.arange.start_step: _arange,
        aten.full.default: _full_of(1),
        aten.new_full.default: _full_of(2),
        aten.full_like.default: _full_of(1),
        aten.unsqueeze.default: _unsqueeze,
        aten.squeeze.dim: _squeeze,
        aten.select.int: _select,
        aten.slice.Tensor: _slice,
        aten.expand.default: _expand,
        aten.view.default: _view,
        aten.reshape.default: _view,
        aten.permute.default: _permute,
        aten.transpose.int: _transpose,
        aten.add.Tensor: _elementwise(lambda x, y: x + y),
        aten.add.Scalar: _elementwise(lambda x, y: x + y),
        aten.sub.Tensor: _elementwise(lambda x, y: x - y),
        aten.sub.Scalar: _elementwise(lambda x, y: x - y),
        aten.mul.Tensor: _elementwise(lambda x, y: x * y),
        aten.abs.default: _elementwise(sympy.Abs),
        aten.bitwise_not.default: _elementwise(sympy.Not, of_booleans=True),
        aten.logical_not.default: _elementwise(sympy.Not, of_booleans=True),
        aten.index.Tensor: _index,
        aten.diff.default: _diff,
        aten.cumsum.default: _cumsum,
        aten.tril.default: _tril(sympy.Le),
        aten.triu.default: _tril(sympy.Ge),
    }
    for make, number in (("ones", 1), ("zeros", 0)):
        for name in (make, f"new_{make}", f"{make}_like"):
            rules[getattr(aten, name).default] = _full(number)
    for name, relation in _COMPARISONS.items():
        for overload in ("Tensor", "Scalar"):
            rules[getattr(getattr(aten, name), overload)] = _elementwise(_related(relation))
    for name, connective in _CONNECTIVES.items():
        overload = "default" if name.startswith("logical") else "Tensor"
        rules[getattr(getattr(aten, name), overload)] = _elementwise(connective, of_booleans=True)
    for cast in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default,
                 aten.contiguous.default, aten.detach.default, aten.alias.default):  # fmt: skip
        rules[cast] = _same
    return rules


_RULES = _rules()
_OF_SIZES = {
    getattr(aten, name).default for make in ("ones", "zeros", "full") for name in (f"new_{make}", f"{make}_like")
}
"""Operators that read only the sizes of their first argument."""
