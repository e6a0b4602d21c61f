"""Labels out of range raise as eager's do: in any row, selected or not, by every route and provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plans
import pytest
import torch
from architectures import ARCHITECTURES, eager_of, token_batch
from cggr_compile.kernels.op import labels as label_ops
from torch import Tensor, nn
from torch.library import opcheck
from toys import WORDS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.program import Program

OPTIONS: list[dict[str, Any]] = [
    *({"selection": rule} for rule in ("topk", "random", "trimmed", "importance")),
    {"selection": "topk", "kernels": "triton"},
    {"selection": "random", "kernels": "triton"},
    {"router_head": "sampled", "router_head_frequent": 8, "router_head_sampled": 8},
    {"route": "token"},
    {"route": "token", "selection": "random"},
    {"route": "loss"},
    {"route": "loss", "selection": "random", "kernels": "triton"},
    {"route": ("sequence", "loss")},
    {"ratio": 1.0},
    {"ratio": 1.0, "kernels": "triton"},
]


@pytest.fixture(scope="module", params=["llama", pytest.param("bert", marks=pytest.mark.long)])
def captured(request: pytest.FixtureRequest) -> tuple[nn.Module, Program, bool]:
    if request.param == "llama":
        return *request.getfixturevalue("llama"), True
    model = eager_of(ARCHITECTURES[request.param])
    return model, plans.captured(model, token_batch()), False


@pytest.mark.sample(9)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_label_out_of_range_raises_in_any_row(
    captured: tuple[nn.Module, Program, bool], options: dict[str, Any]
) -> None:
    model, program, causal = captured
    routed = plans.Routed(model, program, **{"ratio": 0.5, "seed": 0, **options})
    vocabulary = model.config.vocab_size
    for row, label in enumerate((-1, vocabulary, vocabulary + 10**6, -(2**40), -1, vocabulary)):
        batch = token_batch()
        batch["labels"][row, 3] = label
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            model(**batch)
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            routed.step(batch)
    if causal:  # nothing predicts the first token
        batch["labels"] = token_batch()["labels"]
        batch["labels"][:, 0] = -1
        assert routed.step(batch)[0].isfinite()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_what_an_inner_backend_compiles_raises(inner: str) -> None:
    model = cggr.optimize(Toy().train(), ratio=0.25, router_layers=2, inner=inner)
    model(**toy_batch())[0].backward()
    for row in range(4):
        batch = toy_batch()
        batch["labels"][row, 2] = WORDS
        with pytest.raises(IndexError, match=f"Target {WORDS} is out of bounds"):
            model(**batch)
    model(**toy_batch())[0].backward()


def test_scores_alone_and_given_ones_are_of_checked_labels() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.25, router_layers=2, inner="eager")
    batch = toy_batch()
    batch["labels"][3, 2] = WORDS

    def given(batch: dict[str, Tensor]) -> None:
        model.cggr.use_scores(torch.arange(4.0, 0, -1))
        model(**batch)

    calls: list[Callable[[dict[str, Tensor]], object]] = [model.cggr.score, given]
    for call in calls:
        with pytest.raises(IndexError, match="out of bounds"):
            call(batch)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_operator_gives_labels_back(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 4, 2, 7], dtype=dtype)
    assert torch.equal(torch.ops.cggr.checked_target(labels, 5, 7), labels)
    opcheck(label_ops.checked_target, (labels, 5, 7))
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        torch.ops.cggr.checked_target(labels, 5)


def test_the_operator_names_a_bad_argument() -> None:
    with pytest.raises(TypeError, match=r"cggr::checked_target: target is torch\.float32"):
        torch.ops.cggr.checked_target(torch.zeros(3), 5)
