"""Private corners of symbolic sizes: symbols of what is read from data, ranges, and torch's own functions of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type


def data_symbols(values: Any) -> set[sympy.Symbol]:
    """The symbols of `values` (numbers, tensors, containers) that stand for data: elements read, entries counted."""
    parts = pytree.tree_leaves(values)
    sizes = [part for part in parts if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Tensor))]
    return set(free_unbacked_symbols(sizes))


def _is_read(expression: Any) -> bool:
    return bool(expression.is_Symbol) and symbol_is_type(expression, SymT.UNBACKED_INT)


@contextmanager
def nothing_pending(shape_env: ShapeEnv) -> Iterator[None]:
    """While operators are traced that a capture holds already: symbols that wait for a node which gives them are none
    of theirs, and those that they make are dropped."""
    pending = list(shape_env.pending_fresh_unbacked_symbols)
    shape_env.pending_fresh_unbacked_symbols.clear()
    try:
        with shape_env.ignore_fresh_unbacked_symbols():
            yield
    finally:
        shape_env.pending_fresh_unbacked_symbols[:] = pending


def inherit_range(old: Any, new: Any) -> None:
    """Gives a number that was read from data anew what is known of the one it stands for: its range, and whether it is
    a size. Both come from what the model does with it, which the copy does as well, not from the sizes of its operands.
    """
    if not isinstance(old, torch.SymInt) or not isinstance(new, torch.SymInt):
        return
    shape_env, was, now = new.node.shape_env, old.node._expr, new.node._expr
    if was == now or not (_is_read(was) and _is_read(now)):
        return
    known = shape_env.var_to_range[was]
    shape_env.constrain_symbol_range(now, known.lower, known.upper)
    if was in shape_env.size_like:
        shape_env.size_like.add(now)


def _size_functions() -> dict[Any, Any]:
    """torch's own functions in symbolic sizes, each with the Python function that it stands for."""
    import operator

    from torch.utils._sympy import functions

    return {
        functions.FloorDiv: operator.floordiv,
        functions.CleanDiv: operator.floordiv,
        functions.Mod: operator.mod,
        functions.PythonMod: operator.mod,
        functions.Max: torch.sym_max,
        functions.Min: torch.sym_min,
    }


SIZE_FUNCTIONS = _size_functions()


def new_symbol(shape_env: ShapeEnv, name: str, hint: int) -> sympy.Expr:
    """A symbol for a size of at least 2."""
    return shape_env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC)


def new_size(shape_env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A symbolic size of its own, that nothing specialises, 0 and 1 included."""
    source = ConstantSource(name)
    symbol = shape_env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    return shape_env.create_symintnode(symbol, hint=hint, source=source)
