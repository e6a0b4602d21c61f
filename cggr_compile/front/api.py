"""The front end: `optimize`, `restore`, `explain`, `handle`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn

from cggr_compile.capture.arguments import check_call
from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, PlanComplete
from cggr_compile.front.backend import Backend, runtimes_of
from cggr_compile.front.call import call_compiled, compiled_forward, optimized_parts, refuse_nested
from cggr_compile.front.guard import watch
from cggr_compile.front.handle import Handle
from cggr_compile.front.routed_forward import RoutedForward, is_routed
from cggr_compile.inspection.explanation import Explanation
from cggr_compile.run.runtime import Runtime
from cggr_compile.run.sharded import refuse_undistributable, sharded_parameters
from cggr_compile.torch_internals import dynamo, transformers
from cggr_compile.values import ConfigError

M = TypeVar("M", bound=nn.Module)


def optimize(model: M, config: RoutingConfig | None = None, **options: Any) -> M:
    """Routes the model's training steps; patches `forward` in place and returns the same object.

    Class, signature, parameters, state-dict keys, `eval()`, `generate()` and `save_pretrained` stay as they are; calls
    that do not train (eval mode, gradients disabled, no labels) run the original forward. A model that is optimised
    already is optimised anew with these options.

    Args:
        model: a model whose forward takes `input_ids` and `labels`, both [B, S], and returns its loss. Rows are the
            entries of dim 0: of a model that takes [S, B], tokens would be selected as if each were a row.
        config: all options at once, or
        **options: fields of `RoutingConfig`.

    Raises:
        ConfigError: an option is unknown or has a bad value.
        CannotOptimize: the model cannot be routed at all (its graph is captured at the first training step, which may
            raise it too).
    """
    resolved = resolve_config(config, options)
    check_module(model)
    check_model(model, resolved)
    before = vars(model).get("cggr")
    if isinstance(before, Handle):
        _restore([model])
    undo = {name: vars(model)[name] for name in ("forward",) if name in vars(model)}
    handle = Handle(model, Runtime(resolved), {**undo, **_prepare(model, {})})
    if isinstance(before, Handle):
        handle.runtime.follow(before.runtime)
    vars(model)["cggr"] = handle
    vars(model)["forward"] = RoutedForward(handle)
    handle.undo["hooks"] = watch(handle)
    return model


def restore(model: M) -> M:
    """Undoes `optimize`, of the model or of those inside a wrapper (PEFT, DistributedDataParallel); a model that is not
    optimised is returned as it is.

    Raises:
        RuntimeError: something patched `forward` again after `optimize`; undo that first. Nothing is changed.
        CannotOptimize: the model was compiled with `backend="cggr"`, which patches nothing.
    """
    check_module(model)
    inner = getattr(model, "_orig_mod", model)
    parts = [part for _, part in optimized_parts(inner)]
    if not parts and runtimes_of(model):
        raise CannotOptimize(
            "torch.compile(model, backend='cggr') patches nothing that could be undone",
            hint="go on with the model that was given to torch.compile",
        )
    _restore(parts)
    return model


def _restore(models: list[nn.Module]) -> None:
    for model in models:
        _refuse_patched(model, vars(model)["cggr"])
    for model in models:
        handle = vars(model)["cggr"]
        del vars(model)["forward"], vars(model)["cggr"]
        for hook in handle.undo["hooks"]:
            hook.remove()
        if handle.runtime.sharded is not None:
            handle.runtime.sharded.root.release()
        _put_back(model, handle.undo)
        if "forward" in handle.undo:
            vars(model)["forward"] = handle.undo["forward"]


def _refuse_patched(model: nn.Module, handle: Handle) -> None:
    if handle.model is not model:
        raise RuntimeError("cannot restore a shallow copy of an optimized model; copy it by copy.deepcopy")
    if not is_routed(vars(model).get("forward")):
        raise RuntimeError(
            f"cannot restore {type(model).__name__}: its forward was patched again after cggr.optimize; "
            "undo that patch first (for Accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )


def handle(model: nn.Module) -> Handle:
    """The handle of a model optimised by `optimize`, or of a wrapper around one (PEFT, DistributedDataParallel), or of
    a model compiled with `backend="cggr"` (after its first step).

    Raises:
        CannotOptimize: the model is none of these.
    """
    check_module(model)
    inner = getattr(model, "_orig_mod", model)
    for _, part in optimized_parts(inner):
        return vars(part)["cggr"]
    runtimes = runtimes_of(model)
    if not runtimes:
        raise CannotOptimize(
            f"{type(inner).__name__} has no handle",
            hint="call cggr.optimize(model), or run one step of torch.compile(model, backend='cggr')",
        )
    return Handle(inner, runtimes[-1])


def explain(
    model: nn.Module,
    batch: Mapping[str, Any],
    config: RoutingConfig | None = None,
    **options: Any,
) -> Explanation:
    """Captures a training step and rewrites it, without running or patching anything.

    Works on the meta device too, so a model can be explained from its configuration alone.

    Args:
        model: as for `optimize`; it may be optimised already.
        batch: keyword arguments of a training call, at least `input_ids`; labels default to the ids.
        config: all options at once, or
        **options: fields of `RoutingConfig`; without any, those of a model that is optimised.

    Returns:
        The plan: `report()`, `diff()`, the programs and their graphs.

    Raises:
        ConfigError: an option is unknown or has a bad value.
        CannotOptimize: the model or the batch cannot be routed.
    """
    check_module(model)
    check_batch(batch)
    optimized = vars(model).get("cggr")
    if config is None and not options and isinstance(optimized, Handle):
        config = optimized.config
    runtime = Runtime(resolve_config(config, options))
    check_model(model, runtime.config)
    arguments = {"use_cache": False, **{name: arg for name, arg in batch.items() if arg is not None}}
    if "use_cache" not in inspect.signature(model.forward).parameters:
        del arguments["use_cache"]
    if "labels" not in arguments and isinstance(arguments.get("input_ids"), torch.Tensor):
        arguments["labels"] = arguments["input_ids"].clone()  # the same tensor would be one input of the graph
    check_call(arguments, model)
    known = optimized.runtime.sharded if isinstance(optimized, Handle) else None
    runtime.sharded = known or sharded_parameters(model, runtime.config, lambda args, kwargs: False)
    temporary = Handle(model, runtime, optimized.undo if isinstance(optimized, Handle) else None)
    training = {module: module.training for module in model.modules()}
    prepared = _prepare(model, arguments)
    try:
        if not model.training:
            model.train()
        step = partial(call_compiled, compiled_forward(temporary.original(), _Explainer(runtime)), model=model)
        step(arguments) if runtime.sharded is None else runtime.sharded.call(step, arguments)
    except PlanComplete:
        pass
    finally:
        for module, flag in training.items():
            module.training = flag
        if runtime.sharded is not None and known is None:
            runtime.sharded.root.release()
        _put_back(model, prepared)
    return Explanation(runtime, model)


def _prepare(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Readies a model for being traced, in calls with these arguments; returns what `_put_back` takes."""
    return {"marks": dynamo.unmark_buffers(model), "recording": transformers.install_output_hooks(model, arguments)}


def _put_back(model: nn.Module, prepared: Mapping[str, Any]) -> None:
    transformers.remove_output_hooks(model, prepared["recording"])
    dynamo.mark_buffers(model, prepared["marks"])


class _Explainer(Backend):
    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        super().__call__(gm, example_inputs)
        raise PlanComplete


def resolve_config(config: RoutingConfig | None, options: Mapping[str, Any]) -> RoutingConfig:
    """The config object, or one built from keyword options."""
    if config is None:
        return RoutingConfig.from_options(options)
    if not isinstance(config, RoutingConfig):
        raise ConfigError(f"config={config!r} is not a RoutingConfig; pass options by keyword, e.g. ratio=0.25")
    if options:
        raise ConfigError(
            f"both a RoutingConfig and options were given ({', '.join(options)}); put them into the config"
        )
    return config


def check_module(model: object) -> None:
    """Raises `CannotOptimize` for what is no module."""
    if not isinstance(model, nn.Module):
        hint = "pass the model itself, or a Trainer to cggr.route"
        raise CannotOptimize(f"{type(model).__name__} is not a torch.nn.Module", hint=hint)


def check_batch(batch: object) -> None:
    """Raises `TypeError` for what is no mapping of the arguments of a call."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is a {type(batch).__name__}, expected the keyword arguments of a training call, "
            "{'input_ids': …, 'labels': …}"
        )


def check_model(model: nn.Module, config: RoutingConfig) -> None:
    """Raises `CannotOptimize` for models that can be refused without capturing them."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise CannotOptimize(
            "the model is wrapped by torch.compile already",
            hint="optimize the model before compiling it, or compile it with backend='cggr'",
        )
    if not isinstance(vars(model).get("cggr"), Handle | None):
        raise CannotOptimize(f"{type(model).__name__} has an attribute cggr of its own", hint="rename it")
    refuse_nested(model)
    refuse_undistributable(model, config)
    parameters = inspect.signature(model.forward).parameters
    if "labels" not in parameters:
        raise CannotOptimize(
            f"{type(model).__name__}.forward takes no labels, so there is no loss in its graph",
            hint="use the model class with a language-model head (…ForCausalLM or …ForMaskedLM); in one of your own "
            "name the arguments input_ids and labels; "
            "of a wrapper, optimize the model inside (PEFT: or give its config a task_type)",
        )
