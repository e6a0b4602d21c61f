"""Code for many sizes: a lowered program compiled with its sizes as symbols.

The symbols are fresh ones, each of its own, so that sizes which happen to be equal when it is compiled are not taken
for one; a size of 0 or 1 is a number, since broadcasting treats it apart. Whatever the compiler decides by a size it
writes down as a guard on the symbols. All guards are kept, also those of the backward, which is therefore compiled at
once, and sizes for which one of them does not hold are not served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cggr_compile.errors import CannotOptimize, first_line
from cggr_compile.ir.amounts import Sizes, Symbols, concrete
from cggr_compile.ir.program import Program, value
from cggr_compile.passes.lower.lower_regions import Body, lower_pieces
from cggr_compile.run.inner import Shared, as_leaf, compile_in, described
from cggr_compile.torch_internals import symbols
from cggr_compile.torch_internals.fake_tensors import FakeTensorMode


class Code(NamedTuple):
    """Compiled code: `run` takes a program's inputs, `serves` says for which sizes, `symbolic` that these are many."""

    run: Callable[..., Any]
    serves: Callable[[Sizes], bool]
    symbolic: bool = False


def compile_symbolic(
    module: fx.GraphModule, program: Program, inputs: Sequence[Any], sizes: Sizes, inner: str, recompute: bool
) -> Code:
    """Compiles the module of a program for all sizes that the compiler treats like `sizes`, those of the inputs.

    Raises:
        RuntimeError: the backend cannot compile it without knowing sizes.
    """
    symbols = FreshSymbols(program, sizes)
    given = [symbols.stand_in(value(node), x) for node, x in zip(program.placeholders, inputs, strict=True)]
    return Code(symbols.compile(module, given, inner, recompute), symbols.assumptions(), symbolic=True)


class FreshSymbols:
    """Symbols that stand for those of a program, with `sizes` as the compiler's hints."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self._program = program
        self._hints = sizes
        self._shape_env = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shape_env)
        self._terms = {symbol: self._term(index, hint) for index, (symbol, hint) in enumerate(sizes.items())}

    def _term(self, index: int, hint: int) -> sympy.Expr:
        if hint < 2:
            return sympy.Integer(hint)
        return symbols.new_symbol(self._shape_env, f"size_{index}", hint)

    def size(self, size: Any) -> Any:
        """A size of the program in these symbols, or the number that it is."""
        expression = self._program.expression(size)
        if isinstance(expression, int):
            return expression
        term = expression.xreplace(self._terms)
        if term.is_Integer:
            return int(term)
        return self._shape_env.create_symintnode(term, hint=concrete(expression, self._hints))

    @property
    def inputs(self) -> list[Any]:
        """The symbols themselves, in the order of `sizes`."""
        pairs = zip(self._terms.values(), self._hints.values(), strict=True)
        return [
            int(term) if term.is_Integer else self._shape_env.create_symintnode(term, hint=hint) for term, hint in pairs
        ]

    def stand_in(self, val: Any, given: Any) -> Any:
        """What the compiler is given for an input whose value in the program is `val`."""
        if isinstance(given, int):
            return self.size(val)
        return self.tensor(val.shape, val.stride(), given) if isinstance(given, torch.Tensor) else given

    def tensor(self, shape: Sequence[Any], stride: Sequence[Any] | None, given: torch.Tensor) -> torch.Tensor:
        """A tensor like `given`, with sizes and strides (None: contiguous) of the program; itself where none of them is
        a symbol."""
        shape = [self.size(size) for size in shape]
        stride = _contiguous(shape) if stride is None else [self.size(size) for size in stride]
        if all(isinstance(size, int) for size in (*shape, *stride)):
            return given
        with self._mode:
            fake = torch.empty_strided(shape, stride, dtype=given.dtype, device=given.device)
        return fake.requires_grad_(given.requires_grad)

    def are_now(self, sizes: Sequence[Any], numbers: Sequence[int]) -> bool:
        """Whether sizes of the program are these numbers where its symbols are the hints."""
        return [concrete(self._program.expression(size), self._hints) for size in sizes] == list(numbers)

    def compile(self, module: fx.GraphModule, inputs: Sequence[Any], inner: str, recompute: bool) -> Callable[..., Any]:
        """Compiles a module for such inputs, its backward as well."""
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            return compile_in(self._mode, module, inputs, inner, recompute)

    def assumptions(self) -> Callable[[Sizes], bool]:
        """Whether all that has been assumed of the symbols holds for other sizes."""
        terms = self._terms
        guards = [guard.expr for guard in self._shape_env.guards]
        ranges = {term: self._shape_env.var_to_range[term] for term in terms.values() if term.is_Symbol}

        @lru_cache(1024)  # symbolic arithmetic is slow, and sizes recur
        def hold(*numbers: int) -> bool:
            values = dict(zip(terms.values(), map(sympy.Integer, numbers), strict=True))
            if any(term.is_Integer and term != number for term, number in zip(terms.values(), numbers, strict=True)):
                return False
            if not all(known.lower <= values[term] <= known.upper for term, known in ranges.items()):
                return False
            return all(guard.xreplace(values) == sympy.true for guard in guards)

        return lambda sizes: hold(*sizes.values())


class SharedForMany(Shared):
    """A step in pieces, for all sizes that the compiler treats like those that it is first called with.

    A piece takes the program's symbols and then its tensors, whose sizes the program tells. Strides of what comes of an
    earlier piece are the program's too; where they are not, the piece takes a contiguous copy.
    """

    _ran = False

    @cached_property
    def _symbols(self) -> FreshSymbols:
        return FreshSymbols(self.program, self._sizes)

    @cached_property
    def _read(self) -> Symbols:
        return Symbols(self.program)

    def __call__(self, *inputs: Any) -> Any:
        outputs = self._run(*self._read.of(inputs).values(), *inputs)
        self._ran = True
        return outputs

    def serves(self, sizes: Sizes) -> bool:
        """Whether it may be called with such sizes, once all pieces are compiled."""
        return self._ran and self._assumptions(sizes)

    @cached_property
    def _assumptions(self) -> Callable[[Sizes], bool]:
        return self._symbols.assumptions()

    def _lower(self, pieces: Sequence[Sequence[fx.Node]], sizes: Sizes) -> fx.GraphModule:
        return lower_pieces(self.program, pieces, {}, self._piece, tuple(sizes))

    def _layouts(self, body: Body, inputs: Sequence[Any]) -> Iterator[tuple[Any, torch.Tensor, bool]]:
        """Each tensor that a body takes: its value in the program, itself, and whether it has the same strides."""
        tensors = inputs[len(inputs) - len(body.taken) :]
        for node, x in zip(body.taken, tensors, strict=True):
            yield value(node), x, self._symbols.are_now(value(node).stride(), x.stride())

    def _kinds(self, body: Body, inputs: Sequence[Any]) -> Iterator[Any]:
        for val, x, same in self._layouts(body, inputs):
            stride = val.stride() if same else ()
            yield (*described(x), *(tuple(map(self.program.expression, sizes)) for sizes in (val.shape, stride)))

    def _compile(self, body: Body, inputs: Sequence[Any]) -> Callable[..., Any]:
        given = self._symbols.inputs
        copied = []
        for val, x, same in self._layouts(body, inputs):
            if not same:
                copied.append(len(given))
            laid_out = x if same else as_leaf(x.contiguous())
            given.append(self._symbols.tensor(val.shape, val.stride() if same else None, laid_out))
        try:
            compiled = self._symbols.compile(body.module, given, self.inner, self.recompute)
        except RuntimeError as error:
            raise CannotOptimize(
                f"{self.inner} cannot compile a layer for batches of other shapes: {first_line(error)}",
                hint="pad batches to one shape, or pass outline_layers=False",
            ) from error
        if not copied:
            return compiled
        return lambda *tensors: compiled(*(x.contiguous() if i in copied else x for i, x in enumerate(tensors)))


def _contiguous(shape: Sequence[Any]) -> list[Any]:
    strides = list(accumulate(reversed(shape[1:]), mul, initial=1))
    return strides[::-1] if shape else []
