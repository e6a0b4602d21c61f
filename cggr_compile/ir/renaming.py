"""What a copied call gives, told from what the original gave.

A fake run with symbols is slow, and what it gives follows from what describes its arguments. Where those of a copy are
the original's, but that one symbol stands in another's place (k for B) or that no gradients are recorded, so is the
result: the operator need not run again.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from cggr_compile.ir.program import REGION, Program, value
from cggr_compile.torch_internals import symbols
from cggr_compile.torch_internals.fake_tensors import FakeTensor, NewFakes

# Which kernel computes attention depends on whether gradients are recorded, and its result's strides on the kernel.
_CHOOSES = torch.ops.aten.scaled_dot_product_attention.default


class Renaming:
    """The symbols of a program, and what stands in their place in a copy: nothing else unless `put` says so."""

    def __init__(self, program: Program) -> None:
        self._mode, self._shape_env = program.fake_mode, program.shape_env
        self._symbols: dict[sympy.Expr, sympy.Expr] = {}
        self._sizes: dict[sympy.Expr, Any] = {}

    def put(self, new: torch.SymInt, old: Any) -> None:
        """A symbol in the place of another; a number's place is not taken."""
        if isinstance(old, torch.SymInt):
            self._symbols[old.node.expr] = new.node.expr

    def result(self, original: fx.Node, copy: fx.Node, old: Any, new: Any) -> Any:
        """What the copy gives, whose arguments' values are `new` where the original's are `old`; None where only a run
        tells."""
        before, now = original.meta[REGION], copy.meta[REGION]
        recorded = now.grad is not False
        if before.autocasts != now.autocasts or (recorded and before.grad != now.grad):
            return None
        if not _is_plain(original.target) or (original.target is _CHOOSES and before.grad != now.grad):
            return None
        given = value(original)
        parts = given if isinstance(given, (tuple, list)) else (given,)
        if not all(map(_can_be_made, parts)) or not self._alike(old, new, recorded):
            return None
        with self._shape_env.suppress_guards(), torch.enable_grad():  # a fake tensor that is computed is made so
            made = [self._made(part, recorded) for part in parts]
        return type(given)(made) if isinstance(given, (tuple, list)) else made[0]

    def _alike(self, old: Any, new: Any, recorded: bool) -> bool:
        if isinstance(old, torch.Tensor):
            return (
                isinstance(new, torch.Tensor)
                and (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)
                and (not recorded or old.requires_grad == new.requires_grad)
                and self._alike((*old.shape, *old.stride()), (*new.shape, *new.stride()), recorded)
            )
        if isinstance(old, (tuple, list)):
            same = type(old) is type(new) and len(old) == len(new)
            return same and all(self._alike(*pair, recorded) for pair in zip(old, new, strict=True))
        if isinstance(old, dict):
            same = isinstance(new, dict) and old.keys() == new.keys()
            return same and all(self._alike(old[name], new[name], recorded) for name in old)
        if isinstance(old, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return type(old) is type(new) and self._renamed(old.node.expr) == new.node.expr
        return type(old) is type(new) and bool(old == new)

    def _renamed(self, expression: sympy.Expr) -> sympy.Expr:
        return expression.xreplace(self._symbols) if self._symbols else expression

    def _made(self, part: Any, recorded: bool) -> Any:
        if not isinstance(part, torch.Tensor):
            return self._size(part)
        elements = self._size(part.untyped_storage().nbytes() // part.itemsize)
        shape, stride = ([*map(self._size, sizes)] for sizes in (part.shape, part.stride()))
        requires_grad = part.requires_grad and recorded
        return NewFakes(elements, shape, stride, part.dtype, part.device, requires_grad).another(self._mode)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        renamed = self._renamed(size.node.expr)
        if renamed == size.node.expr:
            return size
        if renamed not in self._sizes:
            self._sizes[renamed] = self._shape_env.create_symintnode(renamed, hint=None)
        return self._sizes[renamed]


def _is_plain(target: Any) -> bool:
    """Whether a run does nothing but compute: no operator that has bodies, or is a function of Python."""
    return isinstance(target, torch._ops.OpOverload) or getattr(target, "__module__", "") == operator.__name__


def _can_be_made(part: Any) -> bool:
    if isinstance(part, torch.SymInt):
        return not symbols.data_symbols(part)
    if type(part) is not FakeTensor or part.layout != torch.strided:
        return False
    return part.constant is None and not (part.is_conj() or part.is_neg() or symbols.data_symbols(part))
