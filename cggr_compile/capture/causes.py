"""What a capture stops at, in the user's terms.

Dynamo and the passes report lines of code. Where such a line belongs to a library, its user can do nothing about it;
but the libraries' features that cannot be captured are few, and a line or the model's modules and hooks tell which.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from traceback import FrameSummary
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cggr_compile.errors import CannotOptimize, first_line
from cggr_compile.torch_internals.dynamo import why_not_compiled
from cggr_compile.torch_internals.dynamo_errors import InternalTorchDynamoError, TorchRuntimeError

_FROM_DATA = re.compile(r"\b(?:zuf|u)\d+\b")
_SIZE = re.compile(r"\b(?:zf|s)\d+\b")
_CONSTANT = re.compile(r"\[?ConstantVariable\(\w+: ('[^']*'|[^)]*)\)\]?")
"""What an exception was made of, as Dynamo of torch 2.11 prints it."""
_REWRITES = _REWRITE, _BOTH_CASES = ("rewrite that line", "compute both cases and choose by torch.where")
_ELSE = "or pass fallback='eager' to train without routing"


@dataclass(frozen=True)
class Cause:
    """A library's feature that a capture stops at, told by the line that it stops at: `where` is part of its file's
    path, or of its text."""

    where: str
    name: str
    remedy: str


CAUSES = (
    Cause(
        "/integrations/neftune.py",
        "NEFTune adds noise to the embeddings by a hook that reads a number back",
        "train without neftune_noise_alpha",
    ),
    Cause("/peft/tuners/adalora/", "AdaLoRA reads its ranks from tensors", "use another adapter, such as LoRA"),
    Cause(
        "/modeling_rope_utils.py",
        "the rotary embedding recomputes its frequencies where positions, which are data, pass a limit",
        "train with a rope type that is neither 'dynamic' nor 'longrope'",
    ),
    Cause(
        "/transformers/masking_utils.py",
        "the model's attn_implementation makes masks that no graph holds, as 'flex_attention' does, and "
        "'flash_attention_2' of an attention_mask",
        "load the model with attn_implementation='sdpa'",
    ),
    Cause(
        "/accelerate/hooks.py",
        "Accelerate's hooks move the model's tensors between devices (device_map, offloading)",
        "load the model onto one device (device_map={'': 0}), or take the hooks off by "
        "accelerate.hooks.remove_hook_from_module(model, recurse=True)",
    ),
    Cause(
        "/bitsandbytes/",
        "the quantized layers of bitsandbytes cannot be traced here",
        "train without gradient checkpointing, or on a model that is not quantized",
    ),
    Cause(
        "/liger_kernel/",
        "Liger's kernels stand in for the model's own operators, where no graph shows what they compute",
        "train without Liger (use_liger_kernel=False): a step of this package never stores logits either",
    ),
    Cause(
        "for expert_idx in expert_hit",
        "the experts run one by one, those that the data chooses",
        "call model.set_experts_implementation('grouped_mm')",
    ),
)


def recognised(error: CannotOptimize) -> CannotOptimize:
    """The same error, its cause named where it is one of `CAUSES`. No advice to rewrite a library's line is left. (What
    names a node was captured, and has reasons of its own.)"""
    source = (error.source or "").replace(os.sep, "/")
    for cause in CAUSES:
        if cause.where in source and error.node is None:
            reason = f"{cause.name} ({error.reason})"
            return CannotOptimize(reason, source=error.source, hint=f"{cause.remedy}, {_ELSE}")
    library = re.search(r"/site-packages/(\w+)/", source)
    if library and error.hint and any(advice in error.hint for advice in _REWRITES):
        hint = f"the line belongs to {library[1]}: do without the feature that runs it, {_ELSE}"
        return CannotOptimize(error.reason, source=error.source, hint=hint)
    return error


def refusal_of(error: Exception, model: nn.Module) -> CannotOptimize:
    """What to tell the user about an error of Dynamo's, or of torch's symbols, in a capture."""
    words = in_words(first_line(error))
    if isinstance(error, GuardOnDataDependentSymNode):
        return CannotOptimize(
            f"the model decides by numbers that it reads from data ({words})",
            source=_line_of(list(getattr(error, "real_stack", None) or [])),
            hint=f"{_BOTH_CASES}, {_ELSE}",
        )
    if isinstance(error, TorchRuntimeError):
        root = _root(error)
        return CannotOptimize(
            f"the model fails while Dynamo traces it ({type(root).__name__}: {in_words(first_line(root))})",
            source=_line_of(list(getattr(error, "real_stack", None) or [])),
            hint="check that the same call works without cggr, and that all inputs are on one device",
        )
    if isinstance(error, InternalTorchDynamoError):
        return CannotOptimize(
            f"Dynamo itself fails while it traces the model ({words})",
            hint="report it to PyTorch if torch.compile fails alike; fallback='eager' trains without routing",
        )
    stack = list(getattr(error, "real_stack", None) or [])
    raised = re.search(r"raised exception (\w+\(.*\))", _CONSTANT.sub(r"\1", str(error)))
    if raised is not None:
        hint = f"check that the same call works without cggr, {_ELSE}"
        return CannotOptimize(f"the model raises {raised[1]} where Dynamo traces it", source=_line_of(stack), hint=hint)
    return _graph_break(words, stack, model)


def _root(error: BaseException) -> BaseException:
    """What Dynamo's error, which says no more than that there was one, was raised for."""
    while type(error).__module__.startswith("torch._dynamo") or str(error).startswith("Dynamo failed"):
        cause = error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    return error


def _graph_break(words: str, stack: list[FrameSummary], model: nn.Module) -> CannotOptimize:
    source = _line_of(stack)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        reason = f"FSDP2 (fully_shard) gathers parameters in hooks that break Dynamo's graph ({words})"
        hint = f"route by cggr.optimize(model), and shard the whole model: fully_shard(model), {_ELSE}"
        return CannotOptimize(reason, source=source, hint=hint)
    hook = next(_hooks_in(stack, words, model), None)
    if hook is not None:
        reason = f"{hook} breaks Dynamo's graph ({words})"
        return CannotOptimize(reason, source=source, hint=f"remove the hook for training, {_ELSE}")
    reason = f"the model breaks Dynamo's graph ({words})"
    return CannotOptimize(reason, source=source, hint=f"{_REWRITE}, {_ELSE}")


def _line_of(stack: list[FrameSummary]) -> str | None:
    """The innermost line outside torch."""
    inside_torch = os.path.dirname(torch.__file__)
    frame = next((frame for frame in reversed(stack) if not frame.filename.startswith(inside_torch)), None)
    return f"{frame.filename}:{frame.lineno}: {frame.line}" if frame else None


def _hooks_in(stack: Iterable[FrameSummary], words: str, model: nn.Module) -> Iterator[str]:
    """The hooks of the model that Dynamo was in, or would not go into."""
    frames = {(frame.filename, frame.name) for frame in stack}
    for name, module in model.named_modules():
        where = name or "the model"
        if "backwards hooks" in words and (module._backward_hooks or module._backward_pre_hooks):
            yield f"the backward hook on {where}"
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            code: Any = getattr(hook, "__code__", None)
            if code is not None and (code.co_filename, code.co_name) in frames:
                yield f"the forward hook {code.co_name} on {where}"


def passed_over() -> CannotOptimize:
    """What to tell the user about a call that Dynamo did not compile."""
    refusal = why_not_compiled()
    return CannotOptimize(refusal.reason, hint=f"{refusal.hint}, {_ELSE}")


def in_words(text: str) -> str:
    """A message of torch's, without its names of symbols."""
    return _SIZE.sub("a size", _FROM_DATA.sub("a number read from data", text))
