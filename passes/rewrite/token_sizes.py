"""Sizes of a program whose middle layers run on k tokens, as nodes: each is written once, from the symbols of its
expression, with k in place of S where the kept tokens are meant."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed, Region, value
from cggr_compile.ir.roles import token_ids
from cggr_compile.ir.size_nodes import emit_size

aten = torch.ops.aten


class TokenSizes:
    """The sizes that are written with one builder."""

    def __init__(self, builder: Builder[Analysed]) -> None:
        self.builder = builder
        self.written: dict[tuple[Any, bool], Any] = {}

    def write(self, size: torch.SymInt, short: bool) -> Any:
        """A node of the size (or an int), of the kept tokens if `short`.

        Raises:
            CannotOptimize: it cannot be computed from the batch size and the sequence length.
        """
        expression = self.builder.program.expression(size)
        key = (expression, short)
        if key not in self.written:
            self.builder.part, self.builder.region = "middle" if short else "main", Region()
            self.written[key] = emit_size(self.builder, expression, self._symbols(short))
        return self.written[key]

    def _symbols(self, short: bool) -> dict[Any, fx.Node]:
        """The sizes that expressions are made of, as nodes."""
        builder, program = self.builder, self.builder.program
        known = {
            program.expression(value(node)): builder.env[node]
            for node in program.placeholders
            if isinstance(value(node), torch.SymInt)
        }
        ids = builder.env[token_ids(program)]
        for dim, size in enumerate(value(ids).shape):
            expression = program.expression(size)
            if expression not in known:
                known[expression] = builder.call(aten.sym_size.int, ids, dim)
        if short:
            assert program.routing.kept_tokens is not None
            known[program.expression(program.sequence)] = builder.env[program.routing.kept_tokens]
        return known
