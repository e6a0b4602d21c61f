"""What the kernels over a language model's head share: tiles of logits, none of which leaves the chip.

A program holds a tile of BLOCK_M rows by BLOCK_N columns of `hidden @ weight.T` in fp32 accumulators, turns it into
logits (bias, scale, soft-cap) and reduces it at once. Logits are in units of log 2, so that exp is one `exp2`.

Soundness of the tails: descriptors read zeros beyond the tensors' ends, which a dot product over the width ignores;
columns beyond the vocabulary become -inf, and rows beyond the last are never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    # 1 - 2 / (1 + exp(2x)) is exact at both ends, where exp overflows or vanishes, but off by a rounding of 1 near 0;
    # there the Taylor series, whose next term is below a rounding of x for |x| < 1/4.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E))))


@triton.jit
def products(
    hidden, weight, row, column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden[row : row + BLOCK_M] @ weight[column : column + BLOCK_N].T` in fp32."""
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        products = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, products, input_precision=PRECISION)
    return products


@triton.jit
def capped(x, factor, softcap, SOFTCAP: tl.constexpr):
    """Logits of head outputs `x`, in nats: scaled by `factor`, then `softcap * tanh(x / softcap)`."""
    x = x * factor
    if SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def place_of(program, rows, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, COLUMN_PROGRAMS):
    """Row tile and column program of a program: GROUP row tiles share the columns that they read, in the L2 cache."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    group = program // (GROUP * COLUMN_PROGRAMS)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program - group * GROUP * COLUMN_PROGRAMS
    return first + inside % size, inside // size


@triton.jit
def target_logits_kernel(
    hidden, weight, bias, target, row_scale, class_scale, count, logit, shift,
    rows, classes, width, stride_hidden, stride_weight, factor, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The logit of each row's own label, fp32 [N]: in nats in `logit`, 0 from row `count` on, and in units of log 2 in
    `shift`, inf from row `count` on and 0 for a logit of -inf. NaN where the label is out of range."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    counted = row < tl.load(count)
    label = tl.load(target + row, inside, -1)
    valid = counted & (label >= 0) & (label < classes)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (k < width)[None, :]
        h = tl.load(hidden + row[:, None] * stride_hidden + k[None, :], mask, 0.0).to(tl.float32)
        w = tl.load(weight + label[:, None] * stride_weight + k[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(h * w, 1)
    if SCALED:
        total *= tl.load(row_scale + row, inside, 0.0) * tl.load(class_scale + label, valid, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + label, valid, 0.0).to(tl.float32)
    x = tl.where(valid, capped(total, factor, softcap, SOFTCAP), float("nan"))
    x = tl.where(x == float("inf"), float("nan"), x)  # as inf - inf is: a row with such a logit has no softmax
    tl.store(logit + row, tl.where(counted, x, 0.0), inside)
    # A shift of -inf would make NaN of every other -inf.
    finite = tl.where(x == NEGATIVE_INFINITY, 0.0, x * LOG2_E)
    tl.store(shift + row, tl.where(counted, finite, float("inf")), inside)
