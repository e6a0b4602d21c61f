"""Which implementations each `cggr` operator has, in order of preference, and where each can run.

The operators fix the semantics (`reference`); a provider computes them. Choosing is a table look-up that never falls
back silently: a provider asked for by name and not available raises, and says why and what is.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cggr_compile.kernels.op import fp8_linear, grouped_mm
from cggr_compile.kernels.op import selection as selection_ops
from cggr_compile.kernels.op import tokens as token_ops
from cggr_compile.kernels.reference import documents, experts, router_heads
from cggr_compile.kernels.reference import rows as reference

LONGEST_SELECT = 2**17
"""Rows longer than this are left to the reference, whose sorts use the whole device where one program of the Triton
`select` ranks a row. With many rows the limit errs towards the reference."""

Condition = Callable[["Place"], "str | None"]


@dataclass(frozen=True)
class Place:
    """Where an operator runs: its device, the dtype and the length of its main input (hidden, scores or x), the length
    being that of the last dimension, or None where it is unknown.

    Nothing runs on the meta device: there it is said what a CUDA device of compute capability 9.0 would run."""

    device: torch.device
    dtype: torch.dtype
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.device} for {self.dtype}"


def _never(place: Place) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    Attributes:
        name: what options and reports call it.
        unavailable: gives the reason why it cannot run at a place, or None where it can.
        load: imports the implementation, which takes the arguments of the reference function.
        unsuited: gives the reason why it is chosen by name only there, or None.
        algorithm: which of its algorithms it takes for a dtype, where it has several.
    """

    name: str
    unavailable: Condition
    load: Callable[[], Callable[..., Any]]
    unsuited: Condition = _never
    algorithm: Callable[[torch.dtype], str] | None = None

    @property
    def implementation(self) -> Callable[..., Any]:
        """What computes the operator."""
        return self.load()


def _reference(implementation: Callable[..., Any]) -> dict[str, Provider]:
    return {"reference": Provider("reference", _never, lambda: implementation)}


def _without_triton(place: Place) -> str | None:
    """Why the Triton kernels cannot run there, or None."""
    device = place.device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the CPU needs Triton's interpreter, for tests only"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"the Triton kernels are for CUDA, not {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are not tested on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0"
    return None


def _without_head_kernels(place: Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the head kernels take bfloat16, float16 and float32, not {place.dtype}"
    return _without_triton(place)


def _only_bfloat16(place: Place) -> str | None:
    if place.dtype != torch.bfloat16:
        return "it was measured in bfloat16 alone (benchmarks/results/experts-h200.md)"
    return _interpreted(place)


def _without_fp8(place: Place) -> str | None:
    obstacle = _without_head_kernels(place)
    if obstacle is None and place.device.type == "cuda" and torch.cuda.get_device_capability(place.device) < (8, 9):
        return "fp8 tensor cores need compute capability 8.9"
    return obstacle


def _without_scaled_mm(place: Place) -> str | None:
    """Why torch's product of float8 rows with a scale each cannot run there, or None."""
    device = place.device
    if device.type not in ("cuda", "meta"):
        return f"torch's fp8 product is for CUDA, not {device.type}"
    if place.dtype != torch.bfloat16:
        return f"torch's fp8 product gives bfloat16, not {place.dtype}"
    if device.type == "meta":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "torch's fp8 product is not tested on ROCm"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "torch's fp8 product with a scale a row needs compute capability 9.0"
    return None


def _interpreted(place: Place) -> str | None:
    return "the interpreter is for tests" if place.device.type == "cpu" else None


def _long_row(place: Place) -> str | None:
    if place.length is not None and place.length > LONGEST_SELECT:
        return f"a sort is faster on more than {LONGEST_SELECT} entries (benchmarks/results/selection-h100.md)"
    return _interpreted(place)


def _integers(place: Place) -> str | None:
    if not place.dtype.is_floating_point:
        return "integers have no gradient to gather back, and torch's index_select fuses with its neighbours"
    return _interpreted(place)


def _by_name_only(place: Place) -> str | None:
    return "another algorithm is the default"


def _loss_algorithm(dtype: torch.dtype) -> str:
    from cggr_compile.kernels.triton.loss import default_algorithm

    return default_algorithm(dtype)


def _triton(attribute: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from cggr_compile.kernels.triton import ops

        implementation = getattr(ops, attribute)
        # A graph calls overloads; a function stands for itself.
        return getattr(implementation, "_opoverload", implementation)

    return load


def launches_triton(implementation: Any) -> bool:
    """Whether it is the implementation of a Triton provider."""
    return getattr(implementation, "__module__", "") in ("torch._ops.cggr_triton", "cggr_compile.kernels.triton.ops")


def scratch_bytes(implementation: Any, args: Sequence[Any]) -> int:
    """Bytes that an operator of a Triton provider holds at most beside its arguments and its results; 0 for all else,
    of which that is not known."""
    if not launches_triton(implementation):
        return 0
    from cggr_compile.kernels.triton.ops import scratch_bytes as of_triton

    return of_triton(implementation, args)


def _losses(operator: str, implementation: Callable[..., Any]) -> dict[str, Provider]:
    """The providers of `masked_loss`, or those of `measured_loss`, which are the same algorithms."""
    return {
        "triton": Provider("triton", _without_head_kernels, _triton(operator), _interpreted, _loss_algorithm),
        **{
            f"triton_{name}": Provider(
                f"triton_{name}", _without_head_kernels, _triton(f"{operator}_{name}"), _by_name_only
            )
            for name in ("one_pass", "one_pass_small", "recompute")
        },
        **_reference(implementation),
    }


PROVIDERS: dict[str, dict[str, Provider]] = {
    "score": {
        "triton": Provider("triton", _without_head_kernels, _triton("score"), _interpreted),
        **_reference(reference.score),
    },
    "select": {
        "triton": Provider("triton", _without_triton, _triton("select"), _long_row),
        **_reference(reference.select),
    },
    "gather": {
        "triton": Provider("triton", _without_triton, _triton("gather"), _integers),
        **_reference(reference.gather),
    },
    "gather_tokens": _reference(token_ops.gather_tokens),
    "scatter_tokens": _reference(token_ops.scatter_tokens),
    "masked_loss": _losses("masked_loss", reference.masked_loss),
    "measured_loss": _losses("measured_loss", reference.measured_loss),
    "draw": _reference(selection_ops.opaquely_drawn),
    "select_documents": _reference(documents.select_documents),
    "sample_columns": _reference(router_heads.sample_columns),
    "sampled_score": {
        "triton": Provider("triton", _without_head_kernels, _triton("sampled_score"), _interpreted),
        **_reference(router_heads.sampled_score),
    },
    "fp8_score": {
        "triton": Provider("triton", _without_fp8, _triton("fp8_score"), _interpreted),
        **_reference(router_heads.fp8_score),
    },
    "grouped_mlp": {
        "triton": Provider("triton", _without_head_kernels, _triton("grouped_mlp"), _only_bfloat16),
        "torch": Provider("torch", _never, lambda: grouped_mm.grouped_mlp),
        **_reference(experts.grouped_mlp),
    },
    "fp8_linear": {
        "scaled_mm": Provider("scaled_mm", _without_scaled_mm, lambda: fp8_linear.scaled_mm),
        **_reference(fp8_linear.fp8_linear),
    },
}


def choose(
    op: str, device: torch.device, dtype: torch.dtype, forced: str | None = None, length: int | None = None
) -> Provider:
    """The provider named `forced`, or else the first suited one, for `op` at a `Place`.

    Raises ValueError, naming the operator, the provider, the reason and the available ones, for an unknown operator,
    an unknown provider, or one that cannot run there.
    """
    if op not in PROVIDERS:
        raise ValueError(f"no operator {op!r}; the operators are {', '.join(PROVIDERS)}")
    providers, place = PROVIDERS[op], Place(device, dtype, length)
    if forced is None:
        why_not = passed_over(op, place)
        suited = [name for name in providers if name not in why_not]
        if not suited:
            why = "; ".join(f"{name}: {reason}" for name, reason in why_not.items())
            raise ValueError(f"{op}: no provider is available on {place} ({why})")
        return providers[suited[0]]
    reasons = {name: provider.unavailable(place) for name, provider in providers.items()}
    reason = reasons.get(forced, "no provider of this operator has that name")
    if reason is not None:
        available = [name for name, obstacle in reasons.items() if obstacle is None]
        raise ValueError(
            f"{op}: provider {forced!r} is unavailable on {place}: {reason}; "
            f"available: {', '.join(available) or 'none'}"
        )
    return providers[forced]


def passed_over(op: str, place: Place) -> dict[str, str]:
    """The providers of `op` that are not chosen by themselves at `place`, each with the reason."""
    reasons = {name: p.unavailable(place) or p.unsuited(place) for name, p in PROVIDERS[op].items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
