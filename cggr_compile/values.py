"""What the value of an option may be, and the error that says so."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from cggr_compile.kernels.reference.selection import RULES, RuleFunction, is_number, options_of, rule_name


class ConfigError(ValueError):
    """An option of `RoutingConfig` is unknown, ill-typed or out of range."""


def nearest(name: str, names: list[str]) -> str:
    """`, did you mean 'x'?` or an empty string; the first of those that begin so, or the nearest."""
    begin = [each for each in names if name and each.startswith(name)]
    close = begin or difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def what_is_valid(name: object, names: list[str], what: str) -> str:
    """The end of a sentence about an unknown name: the nearest one, if any, and all of them."""
    return f"{nearest(str(name), names) or ';'} valid {what}: {', '.join(names) or 'none'}"


def is_int(value: Any, least: int) -> bool:
    """Whether it is an int, and no bool, of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def choice(name: str, value: object, valid: tuple[str, ...], more: str = "") -> None:
    """Raises `ConfigError` for a value that is none of the valid ones."""
    if value not in valid:
        raise ConfigError(f"{name}={value!r}{what_is_valid(value, list(valid), 'values')}{more}")


def signature_of(function: RuleFunction) -> inspect.Signature:
    """The signature of a rule of the user's; `ConfigError` where it has none, or cannot be referred to."""
    try:
        weakref.ref(function)  # what `kernels.selection_ops` keeps of it
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"selection={rule_name(function)}: {error}; wrap it in a function of your own") from error


def check_options(rule: str | RuleFunction, given: object) -> None:
    """Raises `ConfigError` for options that a rule does not have, or values that they cannot have."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"selection_options={given!r} is neither None nor a mapping from names to numbers")
    known = options_of(rule)
    for name, value in given.items():
        if name not in known:
            valid = what_is_valid(name, list(known), "options")
            raise ConfigError(f"selection_options: {rule_name(rule)!r} has no option {name!r}{valid}")
        if not is_number(value):
            raise ConfigError(f"selection_options[{name!r}]={value!r} is not a number")
        if isinstance(known[name], int) and not float(value).is_integer():
            raise ConfigError(f"selection_options[{name!r}]={value!r} is not an integer")
    if isinstance(rule, str) and given:
        _try(rule, {name: int(value) if isinstance(known[name], int) else value for name, value in given.items()})


def _try(rule: str, options: Mapping[str, float]) -> None:
    """Runs a rule on four rows: it says itself what its options may be."""
    scores = torch.zeros(4, dtype=torch.float32, device="cpu")
    try:
        RULES[rule].function(scores, torch.ones_like(scores, dtype=torch.bool), 2, scores, **options)
    except (ValueError, OverflowError, RuntimeError) as error:  # the last where a number is too large for a tensor
        raise ConfigError(f"selection_options: {error}") from error
