"""The original CGGR's flash attention: which implementation there is, and transformers' own switch for it."""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.torch_internals.transformers import attention_of

BACKENDS = ("auto", "flash_attention_2", "sdpa", "eager")


def get_flash_attention_info() -> dict[str, Any]:
    """What attention there is here.

    Keys: sdpa_available (bool), flash_attn_available (bool, whether flash-attn is installed), flash_attn_version (str
    or None), cuda_available (bool), recommended_backend (`"flash_attention_2"` where transformers can run it, else
    `"sdpa"`).
    """
    from transformers.utils import is_flash_attn_2_available

    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "sdpa_available": True,  # in every torch that this package runs with
        "flash_attn_available": version is not None,
        "flash_attn_version": version,
        "cuda_available": torch.cuda.is_available(),
        "recommended_backend": "flash_attention_2" if is_flash_attn_2_available() else "sdpa",
    }


def enable_flash_attention(model: nn.Module, backend: str = "auto", verbose: bool = True) -> nn.Module:
    """The same model, with `backend` as its attention, set by transformers' `set_attn_implementation`.

    Args:
        model: a model of transformers.
        backend: `"flash_attention_2"`, `"sdpa"`, `"eager"`, or `"auto"` for the recommended one.
        verbose: prints which one it is.

    Raises ValueError for another name, a model that is none of transformers', and one that cannot change its attention;
    what transformers raises for a backend that is not installed or that the model lacks.
    """
    backend = _chosen(backend)
    _set(model, backend)
    if verbose:
        print(f"{type(model).__name__} uses {backend} attention")
    return model


def load_model_with_flash_attention(
    model_name_or_path: str,
    backend: str = "auto",
    torch_dtype: torch.dtype | None = None,
    device_map: Any = "auto",
    **kwargs: Any,
) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained` with a backend of attention.

    Args:
        model_name_or_path: name on the hub, or folder.
        backend: as in `enable_flash_attention`.
        torch_dtype: None is bfloat16 with `"flash_attention_2"`, which needs 16 bits, and else the checkpoint's own.
        device_map: as in transformers; `"auto"` needs accelerate.
        kwargs: further arguments of `from_pretrained`.

    Raises ValueError for another backend; what transformers raises.
    """
    from transformers import AutoModelForCausalLM

    backend = _chosen(backend)
    dtype: Any = torch.bfloat16 if backend == "flash_attention_2" else "auto"
    return AutoModelForCausalLM.from_pretrained(
        model_name_or_path,
        attn_implementation=backend,
        dtype=dtype if torch_dtype is None else torch_dtype,
        device_map=device_map,
        **kwargs,
    )


def benchmark_attention_backends(
    model: nn.Module, input_ids: Tensor, warmup_steps: int = 3, benchmark_steps: int = 10
) -> dict[str, dict[str, Any]]:
    """Times a forward without gradient by each backend: `"eager"`, `"sdpa"` and, where recommended, flash attention.

    Returns `{backend: {"avg_time_ms": float, "throughput": calls a second}}`, or `{backend: {"error": message}}` for
    one that the model or the device refuses. The model gets its own attention back. Raises ValueError for fewer than
    one timed step and for a model that is none of transformers'.
    """
    if benchmark_steps < 1:
        raise ValueError(f"benchmark_steps is {benchmark_steps}, expected at least 1")
    before = attention_of(_of_transformers(model))
    recommended = get_flash_attention_info()["recommended_backend"]
    try:
        return {
            backend: _measured(model, backend, input_ids, warmup_steps, benchmark_steps)
            for backend in dict.fromkeys(("eager", "sdpa", recommended))
        }
    finally:
        _of_transformers(model).set_attn_implementation(before)


def _chosen(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    return get_flash_attention_info()["recommended_backend"] if backend == "auto" else backend


def _of_transformers(model: nn.Module) -> Any:
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is no model of transformers, whose attention could be set")
    return model


def _set(model: nn.Module, backend: str) -> None:
    _of_transformers(model).set_attn_implementation(backend)
    found = attention_of(model)[""]
    if found != backend:  # transformers only logs it
        raise ValueError(f"{type(model).__name__} cannot change its attention, which is {found}, to {backend}")


def _measured(model: nn.Module, backend: str, input_ids: Tensor, warmup_steps: int, steps: int) -> dict[str, Any]:
    try:
        _set(model, backend)
        _time(model, input_ids, warmup_steps)
        seconds = _time(model, input_ids, steps) / steps
    except (ImportError, RuntimeError, ValueError) as error:
        return {"error": str(error)}
    return {"avg_time_ms": 1000 * seconds, "throughput": 1 / seconds}


def _time(model: nn.Module, input_ids: Tensor, steps: int) -> float:
    """Seconds of so many forwards."""
    wait = torch.cuda.synchronize if input_ids.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            model(input_ids)
    wait()
    return time.perf_counter() - start
