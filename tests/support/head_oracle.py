"""What the loss and the scores of a head are, in float64 by their definitions, and how far from that one may be.

The measure is that of Apple's cut-cross-entropy (arXiv 2411.09009, its tests): an implementation may be as far from
the truth as plain torch is in the same dtype, with the logits in that dtype and the loss of them in fp32 as models do.

What is allowed beyond that is a few units of fp32 roundoff of the *size* of a result: the sum of the absolute values of
the terms that make it up, where a logit off by a rounding of its own terms moves a probability in proportion. fp32 sums
taken in two orders differ by that much, so no implementation in fp32 can promise less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from cggr_compile.kernels.triton import blocks as block_kernels
from cggr_compile.kernels.triton import loss as loss_kernels
from cggr_compile.kernels.triton import rows as row_kernels
from cggr_compile.kernels.triton import score as score_kernels
from cggr_compile.kernels.triton import tiles
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (300, 150, 700) if DEVICE.type == "cuda" else (37, 39, 41)
"""Rows, width and classes of three tiles each (see `shrink_tiles`), the last of them ragged."""
IGNORED = -100
ROUNDINGS = 4
FLOOR = ROUNDINGS * torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """The tensors of a masked loss; the shapes and dtypes are those of `reference.masked_loss`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    row_weight: Tensor | None = None
    rows: Tensor | None = None
    num_items: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Copies to differentiate by, with the layout of the originals."""
        named = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "row_weight")}
        return {name: x.detach().requires_grad_() for name, x in named.items() if x is not None}


class Truth(NamedTuple):
    """Results by name in float64 on the CPU.

    Attributes:
        values: the results.
        terms: the sums of the absolute values of the terms of each.
        sizes: the same with each probability times the size of its logits, which is how far their rounding moves it.
    """

    values: dict[str, Tensor]
    terms: dict[str, Tensor]
    sizes: dict[str, Tensor]


def draw(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    ignored: float = 0.3,
    bias: bool = True,
    weighted: bool = False,
    seed: int = 0,
) -> Case:
    """Normal operands whose logits have a deviation of about 2, and uniform targets, a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) * (2 / max(width, 1) ** 0.5)
    offset = torch.randn(classes, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1:][torch.rand(max(rows - 1, 0), generator=generator) < ignored] = IGNORED
    per_row = torch.rand(rows, generator=generator) * 2 + 0.1
    return Case(
        hidden.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        offset.to(DEVICE, dtype) if bias else None,
        target.to(DEVICE),
        per_row.to(DEVICE) if weighted else None,
    )


class _Logits:
    """Float64 logits x [R, V] of some rows, their log-sum-exp, and the size of each row's logits [R]."""

    def __init__(self, hidden: Tensor, case: Case, scale: float, divisor: float, softcap: float) -> None:
        self.hidden, self.weight = hidden, double(case.weight)
        bias = torch.zeros(len(self.weight), dtype=torch.float64) if case.bias is None else double(case.bias)
        self.factor = scale / divisor
        x = (hidden @ self.weight.T + bias) * scale / divisor
        self.slope = torch.ones_like(x)
        if softcap:
            self.slope = 1 - torch.tanh(x / softcap) ** 2
            x = softcap * torch.tanh(x / softcap)
        self.x, self.lse = x, x.logsumexp(-1)
        terms = (hidden.abs() @ self.weight.abs().T + bias.abs()) * abs(self.factor)
        self.size = 1 + terms.masked_fill(terms.isinf(), 0).amax(-1)


def double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def loss_truth(
    case: Case,
    grad: float = 1.0,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
) -> Truth:
    """The loss and its derivatives by hidden, weight, bias and row_weight, multiplied out by hand.

    With p = softmax(x): d l / d x = p - onehot; the soft-cap x = c·tanh(a / c) multiplies by 1 - tanh²(a / c),
    a = (h·W + b)·scale / divisor by scale / divisor.
    """
    every = torch.arange(len(case.hidden)) if case.rows is None else case.rows.cpu().long()
    labels = case.target.cpu().long()[every]
    counted = labels != ignore_index
    taken, labels = every[counted], labels[counted]
    per_row = torch.ones(len(every)) if case.row_weight is None else case.row_weight
    per_row = double(per_row)[counted]
    head = _Logits(double(case.hidden)[taken], case, scale, divisor, softcap)
    classes = len(head.weight)
    amount = {"mean": per_row.sum().item(), "sum": 1.0}.get(reduction)
    if amount is None:
        amount = double(case.num_items).item()
    share = 1 / amount if amount else 0.0

    onehot = F.one_hot(labels, classes).double()
    own = head.x.gather(1, labels[:, None])[:, 0]
    losses = head.lse - own
    loss = (per_row * losses).sum() * share
    p = (head.x - head.lse[:, None]).exp()
    factor = (per_row * share * grad * head.factor)[:, None]
    by_output = (p - onehot) * head.slope * factor

    terms_of_x = (p + onehot) * factor.abs()
    # d (Σ w·l / Σ w) / d w_i = (l_i - loss) / Σ w.
    by_weights = (losses - (loss if reduction == "mean" else 0.0)) * share * grad
    total_size = (per_row.abs() * abs(share) * head.size).sum()
    values, terms, sizes = {}, {}, {}
    by_rows, by_place = torch.zeros_like(double(case.hidden)), torch.zeros(len(every), dtype=torch.float64)
    place = counted.nonzero()[:, 0]
    weights_size = (head.size + (total_size if reduction == "mean" else 0.0)) * abs(share * grad)
    absolute = head.weight.abs(), head.hidden.abs(), total_size, weights_size
    for into, by_logits, weight, hidden, in_loss, of_weights in (
        (values, by_output, head.weight, head.hidden, loss, by_weights),
        (terms, terms_of_x, *absolute),
        (sizes, terms_of_x * head.size[:, None], *absolute),
    ):
        into["loss"] = in_loss
        into["hidden"] = by_rows.index_add(0, taken, by_logits @ weight)
        into["weight"] = by_logits.T @ hidden
        into["bias"] = by_logits.sum(0)
        into["row_weight"] = by_place.index_put((place,), of_weights)
    return Truth(values, terms, sizes)


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    rows: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    """The loss as a model computes it: logits in the dtype of its weights, the cross-entropy of them in fp32."""
    if rows is not None:
        hidden, target = hidden[rows.long()], target[rows.long()]
    x = F.linear(hidden, weight, bias) * scale / divisor
    if softcap:
        x = torch.tanh(x / softcap) * softcap
    x, target = x.float(), target.long()
    counted = (target != ignore_index).float()
    losses = F.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
    per_row = counted if row_weight is None else counted * row_weight.float()
    total = (per_row * losses).sum()
    amount = {"mean": per_row.sum(), "sum": 1.0, "num_items": num_items}[reduction]
    return (total / amount).float()


def step(function: Callable[..., Tensor], case: Case, grad: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """The loss of `function` and its gradients by every leaf of `case`, by name."""
    leaves = case.leaves
    loss = function(
        leaves["hidden"],
        leaves["weight"],
        leaves.get("bias"),
        case.target,
        leaves.get("row_weight"),
        rows=case.rows,
        num_items=case.num_items,
        **options,
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, grad))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_no_worse(
    found: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor], truth: Truth, roundings: int = 0
) -> None:
    """The error of each result is at most that of plain torch plus the floor (see the module).

    That holds of the root mean square. The largest error may exceed plain torch's by half a unit in the last place of
    the largest result: the truth itself, rounded to the dtype of the result, is that far off.

    A case of few elements, where plain torch's own roundings may cancel, allows each term `roundings` roundings to the
    dtype of the result: those that an implementation makes of its factors and sums.
    """
    assert found, "nothing to compare"
    for name, x in found.items():
        expected = truth.values[name]
        assert x.shape == expected.shape, name
        assert x.dtype == same_dtype[name].dtype, name
        assert x.isfinite().all(), f"{name} is not finite"
        unit = torch.finfo(x.dtype).eps / 2
        floor = FLOOR * truth.sizes[name] + roundings * unit * truth.terms[name]
        error = ((double(x) - expected).abs() - floor).clamp(min=0)
        allowed = (double(same_dtype[name]) - expected).abs()
        for norm, of, more in (
            ("root mean square", _root_mean_square, 0.0),
            ("largest", _largest, unit * _largest(expected)),
        ):
            assert of(error) <= of(allowed) + more, (
                f"{name}: {norm} error beyond the floor {of(error):.3e}, plain torch's {of(allowed):.3e}, "
                f"largest value {_largest(expected):.3e}"
            )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return (x**2).mean().sqrt().item() if x.numel() else 0.0


def check_loss(
    function: Callable[..., Tensor], case: Case, grad: float = 1.0, roundings: int = 0, **options: Any
) -> None:
    """`function`'s loss and gradients are no worse than plain torch's in the same dtype."""
    found, same_dtype = (step(f, case, grad, **options) for f in (function, plain_loss))
    assert_no_worse(found, same_dtype, loss_truth(case, grad, **options), roundings)


def score_truth(
    case: Case, scale: float = 1.0, divisor: float = 1.0, softcap: float = 0.0, ignore_index: int = IGNORED
) -> Truth:
    """Each quantity [N] by its definition: nll, entropy, margin, confidence; 0 where the label is ignored."""
    labels = case.target.cpu().long()
    counted = labels != ignore_index
    head = _Logits(double(case.hidden)[counted], case, scale, divisor, softcap)
    p = (head.x - head.lse[:, None]).exp()
    best = F.pad(p, (0, 1)).topk(2, -1).values
    entropy = torch.where(p > 0, p * (head.lse[:, None] - head.x), 0.0).sum(-1)
    of_counted = {
        "nll": head.lse - head.x.gather(1, labels[counted][:, None])[:, 0],
        "entropy": entropy,
        "margin": 1 - (best[:, 0] - best[:, 1]),
        "confidence": best[:, 0],
    }
    everywhere = torch.zeros(len(labels), dtype=torch.float64)
    values = {name: everywhere.masked_scatter(counted, x) for name, x in of_counted.items()}
    # A logit's rounding moves log p by as much as itself, p by p times that, and the entropy by that times log p.
    depth = {"nll": 1.0, "entropy": 1 + entropy, "margin": 2 * best[:, 0], "confidence": best[:, 0]}
    sizes = {name: everywhere.masked_scatter(counted, head.size * x) for name, x in depth.items()}
    return Truth(values, {name: x.abs() for name, x in values.items()}, sizes)


def plain_score(
    case: Case, scale: float = 1.0, divisor: float = 1.0, softcap: float = 0.0, ignore_index: int = IGNORED
) -> dict[str, Tensor]:
    """The quantities by torch's functions: logits in the dtype of the weights, the rest in fp32."""
    x = F.linear(case.hidden, case.weight, case.bias) * scale / divisor
    if softcap:
        x = torch.tanh(x / softcap) * softcap
    logs = F.log_softmax(x.float(), -1)
    ignored = case.target == ignore_index
    best = F.pad(logs.exp(), (0, 1)).topk(2, -1).values
    label = case.target.long().masked_fill(ignored, 0)
    values = {
        "nll": -logs.gather(1, label[:, None])[:, 0],
        "entropy": -(logs.exp() * logs.masked_fill(logs.isinf(), 0)).sum(-1),
        "margin": 1 - (best[:, 0] - best[:, 1]),
        "confidence": best[:, 0],
    }
    return {name: value.masked_fill(ignored, 0.0) for name, value in values.items()}


def shrink_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, tiles of 16 and several slices of the vocabulary; everywhere, blocks of a single tile.

    SHAPE then has three tiles in each dimension, the last of them ragged, on either device.
    """
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass", 1)
    monkeypatch.setattr(loss_kernels, "RECOMPUTE_BYTES", 1)
    if DEVICE.type == "cuda":
        return
    small = (tiles.Tile(16, 16, 16, 4, 2),)
    monkeypatch.setattr(tiles, "HALF", small)
    monkeypatch.setattr(tiles, "FULL", small)
    monkeypatch.setattr(tiles, "processors", lambda device: 9)
    monkeypatch.setattr(row_kernels, "BLOCK", 16)
    for module in (block_kernels, score_kernels):
        monkeypatch.setattr(module, "GROUP", 2)
    _emulate_bfloat16(monkeypatch)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """`shrink_tiles` for every test of a module that imports it."""
    shrink_tiles(monkeypatch)


def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the small blocks of `shrink_tiles`: all rows, or all columns, are one block of several tiles."""
    monkeypatch.setitem(loss_kernels.ONE_PASS_BYTES, "one_pass", 2**30)
    monkeypatch.setattr(loss_kernels, "RECOMPUTE_BYTES", 2**30)


def _emulate_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter compute with bfloat16 as GPUs do.

    It keeps such numbers as their 16 bits, multiplies those bits as integers in a dot product, and rounds to them by
    cutting off.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(builder: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return widened(source)
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        return cast(builder, source, to)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(builder, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
