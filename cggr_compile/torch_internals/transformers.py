"""Private corners of transformers: hooks that its models install to record what layers put out, their attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_INSTALLED = "_output_capturing_hooks_installed"


def asks_for_outputs(options: Mapping[str, Any]) -> bool:
    """Whether the options of a config, or the arguments of a call, ask for recorded outputs: router logits, say."""
    return any(name.startswith("output_") and flag is not None and flag is not False for name, flag in options.items())


def install_output_hooks(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    """Installs transformers' output-recording hooks where a call's arguments or a model's config ask for recorded
    outputs, and in models of several parts, which ask each other for theirs; transformers installs them at the first
    such forward, under a lock that Dynamo cannot trace.

    Returns the hooks' keys by the name of their module, none for a module that is only marked, for
    `remove_output_hooks`.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # transformers without lazily installed hooks
        return {}
    from transformers import PreTrainedModel

    asked = bool(getattr(getattr(model, "config", None), "sub_configs", None)) or asks_for_outputs(arguments)
    before = {name: (set(module._forward_hooks), _INSTALLED in vars(module)) for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (asked or asks_for_outputs(vars(module.config))):
            maybe_install_capturing_hooks(module)
    installed = {}
    owner_marked: dict[str, bool] = {}
    for name, module in model.named_modules():
        hooks, marked = before[name]
        added = [key for key in module._forward_hooks if key not in hooks]
        owns = isinstance(module, PreTrainedModel)
        owner_marked[name] = marked if owns else bool(name) and owner_marked[name.rpartition(".")[0]]
        # A part that ran before has its hooks, and was given them again with those around it.
        if owner_marked[name]:
            for key in added:
                del module._forward_hooks[key]
            added = []
        if added or (_INSTALLED in vars(module) and not marked):
            installed[name] = added
    return installed


def remove_output_hooks(model: nn.Module, installed: Mapping[str, list[int]]) -> None:
    """Takes away what `install_output_hooks` put there, from the modules that are still there."""
    for name, module in model.named_modules():
        if name in installed:
            for key in installed[name]:
                module._forward_hooks.pop(key, None)
            vars(module).pop(_INSTALLED, None)


def attention_of(model: nn.Module) -> dict[str, str]:
    """A model's attention, as `set_attn_implementation` takes it: its own by "", that of its parts by their names."""
    config: Any = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation} | {
        name: part._attn_implementation for name, part in parts.items() if part is not None
    }
