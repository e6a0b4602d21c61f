"""Float64 definitions of the router's cheap heads, a row at a time."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

IGNORED = -100


def operands(
    rows: int = 9, width: int = 8, classes: int = 13, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (classes, width), (classes,))
    )
    return hidden, weight, bias, torch.randint(0, classes, (rows,), generator=generator)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale=1.0, divisor=1.0, softcap=0.0) -> Tensor:
    """float64 logits by definition."""
    x = hidden.double() @ weight.double().T
    x = (x + (0.0 if bias is None else bias.double())) * scale / divisor
    return softcap * (x / softcap).tanh() if softcap else x


def statistics_of(x: Tensor, own: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """[4, N] float64 of logits x [N, C] that count `weight` [N, C] times; `own` [N] are the targets' logits."""
    columns = []
    for row, mine, times, label in zip(x.tolist(), own.tolist(), weight.tolist(), target.tolist(), strict=True):
        if label == ignore_index:
            columns.append([0.0] * 4)
            continue
        peak = max(row)
        lse = peak + math.log(math.fsum(w * math.exp(a - peak) for a, w in zip(row, times, strict=True)))
        p = [w * math.exp(a - lse) for a, w in zip(row, times, strict=True)]
        first, second = (*sorted(p, reverse=True), 0.0)[:2]
        entropy = lse - math.fsum(q * a for q, a in zip(p, row, strict=True))
        columns.append([lse - mine, entropy, 1 - (first - second), first])
    return torch.tensor(columns, dtype=torch.float64).reshape(-1, 4).T


def sampled_truth(args: tuple, columns: Tensor, column_weight: Tensor, options: tuple = (1.0, 1.0, 0.0)) -> Tensor:
    """Z is the target's exponential plus the weighted ones of the other columns that were read."""
    hidden, weight, bias, target = args
    x = logits(hidden, weight, bias, *options)
    own = x.gather(1, target.clamp(min=0).unsqueeze(1))
    others = torch.where(columns == target.unsqueeze(1), 0.0, column_weight).double()
    classes = torch.cat([own, x[:, columns]], 1)
    times = torch.cat([torch.ones_like(own), others], 1)
    return statistics_of(classes, own[:, 0], times, target, IGNORED)[:2]


def quantised(x: Tensor) -> Tensor:
    """float64 [R, D] of rows whose entries are rounded to the nearest of the 253 finite float8 numbers, ties to the
    even code, times the row's scale."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scale = (x.abs().amax(1, keepdim=True).float() / 448).double()
    scale = torch.where(scale == 0, 1.0, scale)
    gap = (x.float() / scale.float()).double().unsqueeze(-1) - codes
    odd = torch.arange(256) % 2
    rank = torch.where(codes.isfinite(), gap.abs(), math.inf) + odd * 1e-12
    return codes[rank.argmin(-1)] * scale


def fp8_truth(args: tuple, options: tuple = (1.0, 1.0, 0.0)) -> Tensor:
    """The exact statistics of quantised rows."""
    hidden, weight, bias, target = args
    x = logits(quantised(hidden), quantised(weight), bias, *options)
    own = x.gather(1, target.clamp(min=0).unsqueeze(1))[:, 0]
    return statistics_of(x, own, torch.ones_like(x), target, IGNORED)


OPTIONS = st.tuples(st.sampled_from([1.0, 0.3]), st.sampled_from([1.0, 4.0]), st.sampled_from([0.0, 1.5, 30.0]))
