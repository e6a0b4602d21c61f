"""How a schema is read off an annotated function."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from cggr_compile.kernels.op.define import by_fields, operator, schema_of
from cggr_compile.kernels.reference.rows import LossArguments
from torch import Tensor


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None = None
    factor: float = 2.0


def last(names: Sequence[str], pair: Pair) -> Tensor:
    return pair.left * pair.factor * len(names)


def first(pair: Pair, wanted: Sequence[bool], k: int = 3) -> tuple[Tensor, Tensor]:
    return pair.left * k, pair.left


def test_a_record_stands_for_its_fields_and_keeps_the_defaults_that_a_schema_can_say() -> None:
    assert schema_of(last) == "(str[] names, Tensor left, Tensor? right=None, float factor=2.0) -> Tensor"
    assert schema_of(first) == (
        "(Tensor left, Tensor? right, float factor, bool[] wanted, SymInt k=3) -> (Tensor, Tensor)"
    )


def test_a_function_gets_its_record_and_a_default_for_what_is_left_out() -> None:
    x = torch.ones(2)
    assert torch.equal(by_fields(last)(["a", "b"], x), 4 * x)
    assert torch.equal(by_fields(first)(x, None, 1.0, [True], 5)[0], 5 * x)
    op = operator("cggr_test::last")(last)
    assert torch.equal(op(["a"], x, factor=3.0), 3 * x)


@pytest.mark.parametrize("name", ["cggr::masked_loss", "cggr::masked_loss_backward", "cggr_triton::masked_loss"])
def test_every_layer_of_the_masked_loss_takes_the_record_in_its_order(name: str) -> None:
    pytest.importorskip("triton")
    importlib.import_module("cggr_compile.kernels.triton.ops")
    namespace, op = name.split("::")
    schema = getattr(getattr(torch.ops, namespace), op).default._schema
    names = [argument.name for argument in schema.arguments]
    start = names.index("hidden")
    assert tuple(names[start : start + len(LossArguments._fields)]) == LossArguments._fields
