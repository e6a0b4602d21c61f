"""Private corners of transformers: the hooks that its models install to record what layers put out."""

from __future__ import annotations

from torch import nn


def install_output_hooks(model: nn.Module) -> None:
    """Installs transformers' output-recording hooks where a model's config asks for recorded outputs (router logits,
    say), and in models of several parts, which ask each other for theirs; transformers installs them at the first such
    forward, under a lock that Dynamo cannot trace."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # transformers without lazily installed hooks
        return
    from transformers import PreTrainedModel

    composite = bool(getattr(getattr(model, "config", None), "sub_configs", None))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (
            composite or any(name.startswith("output_") and flag for name, flag in vars(module.config).items())
        ):
            maybe_install_capturing_hooks(module)
