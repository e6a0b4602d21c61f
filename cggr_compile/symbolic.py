"""Code for many sizes: a lowered program compiled with its sizes as symbols.

The symbols are fresh ones, each of its own, so that sizes which happen to be equal when it is compiled are not taken
for one; a size of 0 or 1 is a number, since broadcasting treats it apart. Whatever the compiler decides by a size it
writes down as a guard on the symbols. All guards are kept, also those of the backward, which is therefore compiled at
once, and sizes for which one of them does not hold are not served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from cggr_compile.inner import compile_in
from cggr_compile.program import Program, value
from cggr_compile.sizes import Sizes, concrete


class Code(NamedTuple):
    """Compiled code of a program: `run` takes its inputs, `serves` says for which sizes it may be called."""

    run: Callable[..., Any]
    serves: Callable[[Sizes], bool]


def compile_symbolic(
    module: fx.GraphModule, program: Program, inputs: Sequence[Any], sizes: Sizes, inner: str, recompute: bool
) -> Code:
    """Compiles the module of a program for all sizes that the compiler treats like those of these inputs.

    Raises:
        RuntimeError: the backend cannot compile it without knowing sizes.
    """
    symbols = FreshSymbols(sizes)
    given = [symbols.stand_in(program, node, x) for node, x in zip(program.placeholders, inputs, strict=True)]
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        run = compile_in(symbols.mode, module, given, inner, recompute)
    return Code(run, symbols.assumptions())


class FreshSymbols:
    """Symbols that stand for those of a program, with `sizes` as the compiler's hints."""

    def __init__(self, sizes: Sizes) -> None:
        self.hints = sizes
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env)
        self._terms = {symbol: self._term(index, hint) for index, (symbol, hint) in enumerate(sizes.items())}

    def _term(self, index: int, hint: int) -> sympy.Expr:
        if hint < 2:
            return sympy.Integer(hint)
        return self.shape_env.create_symbol(hint, ConstantSource(f"size_{index}"), DimDynamic.DYNAMIC)

    def size(self, expression: Any) -> Any:
        """A size of the program (`Program.expression`) in these symbols, or the number that it is."""
        if isinstance(expression, int):
            return expression
        term = expression.xreplace(self._terms)
        if term.is_Integer:
            return int(term)
        return self.shape_env.create_symintnode(term, hint=concrete(expression, self.hints))

    def stand_in(self, program: Program, node: fx.Node, given: Any) -> Any:
        """What the compiler is given for an input: the tensor itself where no size of it is a symbol."""
        val = value(node)
        if isinstance(given, int):
            return self.size(program.expression(val)) if isinstance(val, torch.SymInt) else given
        if not isinstance(given, torch.Tensor):
            return given
        shape, stride = ([self.size(program.expression(size)) for size in sizes] for sizes in (val.shape, val.stride()))
        if all(isinstance(size, int) for size in (*shape, *stride)):
            return given
        with self.mode:
            fake = torch.empty_strided(shape, stride, dtype=given.dtype, device=given.device)
        return fake.requires_grad_(given.requires_grad)

    def assumptions(self) -> Callable[[Sizes], bool]:
        """Whether all that was assumed of the symbols so far holds for other sizes."""
        guards = [guard.expr for guard in self.shape_env.guards]
        ranges = [(symbol, self.shape_env.var_to_range[term]) for symbol, term in self._terms.items() if term.is_Symbol]
        terms = self._terms

        @lru_cache(1024)  # of sizes that recur; symbolic arithmetic is slow
        def hold(*numbers: int) -> bool:
            sizes = dict(zip(terms, numbers, strict=True))
            if any(term.is_Integer and term != sizes[symbol] for symbol, term in terms.items()):
                return False
            if not all(known.lower <= sizes[symbol] <= known.upper for symbol, known in ranges):
                return False
            values = {term: sympy.Integer(sizes[symbol]) for symbol, term in terms.items()}
            return all(guard.xreplace(values) == sympy.true for guard in guards)

        return lambda sizes: hold(*sizes.values())
