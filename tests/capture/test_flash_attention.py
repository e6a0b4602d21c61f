"""`attn_implementation="flash_attention_2"`: captured where it is an operator, refused by name where it reads the mask.

The package needs a GPU to install. Here its function is an operator as it has one, which computes by the definition.
"""

from __future__ import annotations

from typing import Any

import flash
import pytest
import torch
from architectures import build, token_batch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as utils

import cggr_compile as cggr
from cggr_compile.errors import CannotOptimize

FLAT = (None, 0, 0, 0.0, True)  # ends of the keys, most queries and keys, dropout, causal
WINDOW = {"window_size_left": -1, "window_size_right": 0}


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] as all tokens, and where the rows end."""
    rows, length = tensors[0].shape[:2]
    return [*(x.flatten(0, 1) for x in tensors), torch.arange(rows + 1, dtype=torch.int32) * length]


@torch.library.custom_op("cggr_tests::flash", mutates_args=())
def operator(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, S, H, D], and the logarithms of its sums [H, B · S]."""
    out, sums, *_ = flash.forward(*_flat(query, key, value), *FLAT, **WINDOW)
    return out.view_as(query), sums


@torch.library.custom_op("cggr_tests::flash_backward", mutates_args=())
def backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor) -> list[Tensor]:
    *tensors, ends = _flat(gradient, query, key, value, out)
    found = flash.backward(*tensors, sums, ends, *FLAT, **WINDOW)
    return [x.view_as(like) for x, like in zip(found, (query, key, value), strict=True)]


@operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[2], query.shape[0] * query.shape[1])


@backward.register_fake
def _(gradient: Tensor, *saved: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in saved[:3]]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(backward(gradient.contiguous(), *ctx.saved_tensors))


operator.register_autograd(_differentiate, setup_context=_save)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    assert causal
    return operator(q, k, v)[0]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    made = build("llama")
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **_more: (flash_attn_func, *4 * [flash_attn_func]))
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    utils.lazy_import_flash_attention("flash_attention_2")
    made.config._attn_implementation = "flash_attention_2"
    return made


def batch(seed: int, *names: str) -> dict[str, Any]:
    made = token_batch(4, 9, seed=seed)
    return {name: made[name] for name in ("input_ids", "labels", *names)}


def test_rows_are_routed_exactly(model: nn.Module) -> None:
    assert cggr.check(model, batch(0), batch(1), ratio=0.5).exact


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "names", "reason"),
    [
        ({}, ["attention_mask"], r"flash_attention.*attn_implementation='sdpa'"),
        ({"route": "token", "ratio": 0.5}, [], r"what cggr_tests.flash.default does along the sequence is not known"),
    ],
)
def test_what_no_graph_proves_is_refused_by_name(
    model: nn.Module, options: dict[str, Any], names: list[str], reason: str
) -> None:
    cggr.optimize(model, inner="eager", **options)
    with pytest.raises(CannotOptimize, match=reason):
        model(**batch(0, *names))
