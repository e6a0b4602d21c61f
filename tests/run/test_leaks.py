"""What goes with a model that is deleted, and with a parameter that is replaced: everything."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from toys import AS_IT_IS, WIDTH, WORDS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.program import Program


@pytest.fixture
def nothing_before() -> None:
    """What is alive already does not count, and is not gone through."""
    gc.collect()
    gc.freeze()


def alive() -> Counter[str]:
    gc.collect()
    gc.collect()  # what Dynamo lets go of when the compiled function goes
    kinds = (FakeTensor, ShapeEnv, Program)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


def trained(**options: Any) -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, **options)
    for rows in (8, 6):
        model(**toy_batch(rows))[0].backward()


def refused() -> None:
    model = Toy().train()
    model.layers = torch.nn.ModuleList()
    with pytest.raises(cggr.CannotOptimize):
        cggr.optimize(model, inner="eager")(**toy_batch())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "use",
    [
        lambda: trained(inner="eager"),
        lambda: trained(inner=AS_IT_IS, selection="random", warmup_steps=3),
        lambda: cggr.explain(Toy(), toy_batch(), ratio=0.5),
        refused,
    ],
    ids=["eager", "compiled", "explained", "refused"],
)
def test_a_model_that_is_deleted_leaves_nothing(nothing_before: None, use: Callable[[], Any]) -> None:
    for _ in range(2):
        use()
    assert not alive()


@pytest.mark.parametrize("inner", ["eager", AS_IT_IS])
def test_parameters_that_are_replaced_are_freed(inner: str) -> None:
    """As `resize_token_embeddings` replaces them."""
    model = cggr.optimize(Toy().train(), ratio=0.5, inner=inner)
    model(**toy_batch())[0].backward()
    model.cggr.step()
    model.zero_grad()
    replaced = weakref.ref(model.embed.weight)
    model.embed = torch.nn.Embedding(WORDS + 2, WIDTH)
    model(**toy_batch())[0].backward()
    gc.collect()
    assert replaced() is None
