"""Which implementations each `cggr` operator has, in order of preference, and where each can run.

The operators fix the semantics (`reference`); a provider computes them. Choosing is a table look-up that never falls
back silently: a provider asked for by name and not available raises, and says why and what is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cggr_compile.kernels import reference


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    `unavailable(device, dtype)` gives the reason why it cannot run there, or None where it can; `dtype` is that of
    the operator's main input (hidden, scores or x). `implementation` takes the arguments of the reference function.
    """

    name: str
    unavailable: Callable[[torch.device, torch.dtype], str | None]
    implementation: Callable[..., Any]


def _runs_everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _reference(implementation: Callable[..., Any]) -> dict[str, Provider]:
    return {"reference": Provider("reference", _runs_everywhere, implementation)}


PROVIDERS: dict[str, dict[str, Provider]] = {
    "score": _reference(reference.score),
    "select": _reference(reference.select),
    "gather": _reference(reference.gather),
    "masked_loss": _reference(reference.masked_loss),
}


def choose(op: str, device: torch.device, dtype: torch.dtype, forced: str | None = None) -> Provider:
    """The provider named `forced`, or else the first available one, for `op` on `device` with `dtype`.

    Raises ValueError, naming the operator, the provider, the reason and the available ones, for an unknown operator,
    an unknown provider, or one that cannot run there.
    """
    if op not in PROVIDERS:
        raise ValueError(f"no operator {op!r}; the operators are {', '.join(PROVIDERS)}")
    providers = PROVIDERS[op]
    reasons = {name: provider.unavailable(device, dtype) for name, provider in providers.items()}
    available = [name for name, reason in reasons.items() if reason is None]
    if forced is None:
        if not available:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"{op}: no provider is available on {device} for {dtype} ({why})")
        return providers[available[0]]
    reason = reasons.get(forced, "no provider of this operator has that name")
    if reason is not None:
        raise ValueError(
            f"{op}: provider {forced!r} is unavailable on {device} for {dtype}: {reason}; "
            f"available: {', '.join(available) or 'none'}"
        )
    return providers[forced]
