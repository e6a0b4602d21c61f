"""The operator `cggr::draw`: the selection rules that read scores and noise, and weigh what they select.

Registered as `cggr::select` is (`ops`); the semantics are those of the rules in `selection`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from cggr_compile.kernels import ops, selection
from torch import Tensor

DRAWING = tuple(name for name, rule in selection.RULES.items() if rule.needs_scores and rule.needs_noise)
"""The rules that `draw` knows."""


def options_of(rule: str) -> dict[str, float]:
    """The options of a registered rule with their defaults."""
    parameters = inspect.signature(selection.RULES[rule].function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def drawn(
    scores: Tensor,
    valid: Tensor,
    k: int,
    rule: str,
    noise: Tensor,
    names: Sequence[str] = (),
    values: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """`selection.RULES[rule]` with options `names` of `values`: index int64 [..., k], sorted, and weight float32 [...,
    k].

    `scores` and `noise` are float32 [..., N], `valid` is bool [..., N]. Raises ValueError by argument.
    """
    defaults = options_of(rule)
    given = {name: type(defaults[name])(value) for name, value in zip(names, values, strict=True)}
    return selection.RULES[rule].function(scores, valid, k, noise, **given)


def _check(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor, names: Sequence[str]) -> None:
    torch._check_value(scores.dim() >= 1, lambda: "cggr::draw: scores has shape (), expected [..., N]")
    ops._check_dtype("draw", "scores", scores, (torch.float32,))
    ops._check_shape("draw", "valid", valid, scores.shape, "[..., N] as scores")
    ops._check_dtype("draw", "valid", valid, (torch.bool,))
    ops._check_shape("draw", "noise", noise, scores.shape, "[..., N] as scores")
    ops._check_dtype("draw", "noise", noise, (torch.float32,))
    torch._check_value(rule in DRAWING, lambda: f"cggr::draw: rule is {rule!r}, expected one of {list(DRAWING)}")
    known = list(options_of(rule))
    torch._check_value(
        set(names) <= set(known), lambda: f"cggr::draw: options are {list(names)}, {rule!r} knows {known}"
    )


@torch.library.custom_op(
    "cggr::draw",
    mutates_args=(),
    schema=(
        "(Tensor scores, Tensor valid, SymInt k, str rule, Tensor noise, str[] names, float[] values) "
        "-> (Tensor, Tensor)"
    ),
)
def draw(
    scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor, names: Sequence[str], values: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """`drawn`, not differentiable."""
    _check(scores, valid, k, rule, noise, names)
    return drawn(scores, valid, k, rule, noise, names, values)


@draw.register_fake
def _draw_fake(
    scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor, names: Sequence[str], values: Sequence[float]
) -> tuple[Tensor, Tensor]:
    _check(scores, valid, k, rule, noise, names)
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


draw.register_autograd(ops._no_gradient_backward, setup_context=ops._no_gradient)
