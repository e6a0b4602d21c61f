"""torch's flash attention of variable lengths, written out for the CPU: what the step calls, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, ...]


@contextmanager
def flash_on_the_cpu() -> Iterator[None]:
    """Gives `aten._flash_attention_forward` and its backward an implementation on the CPU, in any dtype."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def forward(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *rest: Any, **options: Any) -> Result:
    weights, sums = _weights(query, key, ends, rest[4], options)
    nothing = torch.zeros(2, dtype=torch.uint64)
    out = _as_laid_out(_apply(weights, value, query), query)
    return out, sums, nothing, nothing[0].clone(), query.new_empty(0)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, ends: Tensor, *rest: Any,
    **options: Any,
) -> Result:  # fmt: skip
    weights, _ = _weights(query, key, ends, rest[4], options)
    of_weights = torch.einsum("qhd,khd->hqk", gradient, _grouped(value, query))
    of_scores = weights * (of_weights - (gradient * out).sum(-1).T.unsqueeze(-1)) * _scale(query, options)
    of_key = torch.einsum("hqk,qhd->khd", of_scores, query)
    of_value = torch.einsum("hqk,qhd->khd", weights, gradient)
    tokens, heads, width = key.shape
    of_key, of_value = (x.reshape(tokens, heads, -1, width).sum(2) for x in (of_key, of_value))
    pairs = ((_apply(of_scores, key, query), query), (of_key, key), (of_value, value))
    return tuple(_as_laid_out(gradient, like) for gradient, like in pairs)


def _as_laid_out(result: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(result)


def _apply(weights: Tensor, held: Tensor, query: Tensor) -> Tensor:
    return torch.einsum("hqk,khd->qhd", weights, _grouped(held, query))


def _grouped(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _scale(query: Tensor, options: dict[str, Any]) -> float:
    return query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]


def _weights(query: Tensor, key: Tensor, ends: Tensor, causal: bool, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    assert ends.dtype == torch.int32
    assert (int(ends[0]), int(ends[-1])) == (0, len(query))
    left, right = options["window_size_left"], options["window_size_right"]
    assert causal == ((left, right) == (-1, 0))
    places = torch.arange(len(query))
    row, behind = torch.searchsorted(ends.long(), places, right=True), places[:, None] - places[None, :]
    seen = (row[:, None] == row[None, :]) & ((-behind <= right) | (right == -1)) & ((behind <= left) | (left == -1))
    scores = torch.einsum("qhd,khd->hqk", query, _grouped(key, query)) * _scale(query, options)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)
