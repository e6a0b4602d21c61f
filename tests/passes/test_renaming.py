"""What a copied call gives, told from the original, is what a run of it gives."""

from __future__ import annotations

import plans
import pytest
import torch
from small import small
from torch import fx
from toys import toy_batch

from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Program, describe
from cggr_compile.ir.renaming import Renaming


@pytest.fixture(scope="module")
def program() -> Program:
    batch = toy_batch(4, 9)
    return plans.captured(small(dropout=0.1), {**batch, "attention_mask": torch.ones_like(batch["labels"])})


@pytest.mark.parametrize("route", ["sequence", "token"])
def test_what_is_told_is_what_a_run_gives(program: Program, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    evaluate, result = Builder.evaluate, Renaming.result

    def counted(self: Renaming, original: fx.Node, copy: fx.Node, *arguments: object) -> object:
        found = result(self, original, copy, *arguments)
        told.extend([] if found is None else [copy.meta["cggr_part"]])
        return found

    def compared(self: Builder, node: fx.Node, original: fx.Node | None = None) -> None:
        evaluate(self, node, original)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        assert describe(node.meta["val"]) == describe(self._run(node, args, kwargs)), node.format_node()

    monkeypatch.setattr(Renaming, "result", counted)
    monkeypatch.setattr(Builder, "evaluate", compared)
    plans.Routed(small(), program, route=route)
    assert {"router", "main" if route == "sequence" else "middle"} <= set(told)
    assert len(told) > 30
