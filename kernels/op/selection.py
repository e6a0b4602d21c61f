"""The operator `cggr::draw`: the selection rules that read scores and noise, and weigh what they select.

Registered as `cggr::select` is (`ops`); the semantics are those of the rules in `selection`. A user's function is a
rule under a key: graphs hold strings, so the function itself stays in a table of this process.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from cggr_compile.kernels.op.checks import check_dtype, check_shape, no_gradient, no_gradient_backward
from cggr_compile.kernels.op.define import operator
from cggr_compile.kernels.reference import selection
from torch import Tensor

DRAWING = tuple(name for name, rule in selection.RULES.items() if rule.needs_scores and rule.needs_noise)
"""The registered rules that `draw` knows."""

_FUNCTIONS: WeakValueDictionary[str, selection.RuleFunction] = WeakValueDictionary()
_NUMBERS = itertools.count(1)


def register(rule: str | selection.RuleFunction) -> str:
    """What `draw` calls a rule: a registered one's name, or a key of this process for a user's function.

    The same function has the same key while it lives; the table does not keep it alive, the caller must. Raises
    TypeError for a callable that cannot be weakly referenced.
    """
    if isinstance(rule, str):
        return rule
    for key, known in _FUNCTIONS.items():
        if known is rule:
            return key
    # No other function gets the key, not even once this one is gone.
    key = f"{selection.rule_name(rule)}#{next(_NUMBERS)}"
    _FUNCTIONS[key] = rule
    return key


def drawn(
    scores: Tensor,
    valid: Tensor,
    k: int,
    rule: str,
    noise: Tensor,
    names: Sequence[str] = (),
    values: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """The rule with options `names` of `values`: index int64 [..., k], sorted, and weight float32 [..., k].

    `scores` and `noise` are float32 [..., N], `valid` is bool [..., N]; a user's function takes [N] alone. A whole
    number is handed on as an int, except where the option's default is a float. Where no valid row's score is known, a
    user's function is not followed: the first valid rows train, as by every rule. Raises ValueError by argument, and
    ValueError or TypeError that name a user's function which returns anything else.
    """
    function = _rule(rule)
    defaults = selection.options_of(function)
    options = {
        name: value if isinstance(defaults[name], float) or not value.is_integer() else int(value)
        for name, value in zip(names, values, strict=True)
    }
    if isinstance(function, str):
        index, weight = selection.rule_of(function).function(scores, valid, k, noise, **options)
    else:
        # What a user's function writes to is its own.
        own = scores.clone(), valid.clone(), k, noise.clone()
        index, weight = selection.rule_of(function).function(*own, **options)
        # A user's rule may return any order, and views of what it was given, which an operator must not.
        index, order = index.sort(stable=True)
        weight = weight.gather(0, order)
        # A diverged model must show in the loss, whatever the function makes of NaN.
        known = selection.known_rows(scores, valid).any()
        first = selection.topk(scores, valid, k)
        index, weight = torch.where(known, index, first[0]), torch.where(known, weight, first[1])
    return index, weight


def opaquely_drawn(scores: Tensor, valid: Tensor, k: int, rule: str, *rest: Any) -> tuple[Tensor, Tensor]:
    """`drawn`, of which no tracer sees a user's function: it stays one operator."""
    function = drawn if rule in DRAWING else torch.ops.cggr.draw.default
    return function(scores, valid, k, rule, *rest)


def _rule(rule: str) -> str | selection.RuleFunction:
    return rule if rule in DRAWING else _FUNCTIONS[rule]


def _check(scores: Tensor, valid: Tensor, k: int, rule: str, noise: Tensor, names: Sequence[str]) -> None:
    torch._check_value(scores.dim() >= 1, lambda: "cggr::draw: scores has shape (), expected [..., N]")
    check_dtype("draw", "scores", scores, (torch.float32,))
    check_shape("draw", "valid", valid, scores.shape, "[..., N] as scores")
    check_dtype("draw", "valid", valid, (torch.bool,))
    check_shape("draw", "noise", noise, scores.shape, "[..., N] as scores")
    check_dtype("draw", "noise", noise, (torch.float32,))
    torch._check_value(
        rule in DRAWING or rule in _FUNCTIONS,
        lambda: f"cggr::draw: rule is {rule!r}, expected one of {list(DRAWING)} or the key of a function that lives",
    )
    known = list(selection.options_of(_rule(rule)))
    torch._check_value(
        set(names) <= set(known), lambda: f"cggr::draw: options are {list(names)}, {rule!r} knows {known}"
    )


@operator("cggr::draw")
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


draw.register_autograd(no_gradient_backward, setup_context=no_gradient)
