"""A training call's arguments by name, and the calls that cannot be routed whatever the model does with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from cggr_compile.errors import CannotOptimize

_ACTIVATIONS = ("output_hidden_states", "output_attentions")


def named_arguments(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, those left out that are None where nothing else is the default.

    Raises:
        CannotOptimize: an argument has no name to be given by.
    """
    signature = inspect.signature(forward)
    parameters = signature.parameters
    bound = signature.bind_partial(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, arg in bound.items():
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(arg)
        elif parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise CannotOptimize(
                f"the forward takes {name} by position only, and a routed step gives every argument by its name",
                hint=f"give {name} a name in the forward's signature, or leave it out of training calls",
            )
        else:
            named[name] = arg
    if "use_cache" in parameters:
        named["use_cache"] = False
    unset = (None, inspect.Parameter.empty)
    return {
        name: arg
        for name, arg in named.items()
        if arg is not None or (name in parameters and parameters[name].default not in unset)
    }


def check_call(arguments: dict[str, Any], model: nn.Module) -> None:
    """Raises `CannotOptimize` for calls of a model that cannot be routed."""
    config = getattr(model, "config", None)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    _check_ids(arguments, decodes)
    _check_labels(arguments, decodes)
    _check_cache(arguments)
    _check_activations(arguments, config)


def check_entries(arguments: dict[str, Any]) -> None:
    """Raises `CannotOptimize` for as many numbers as there are rows that are in no tensor, where rows are selected."""
    rows = len(arguments["input_ids"])
    for name, arg in _entries(arguments):
        array = _is_array(arg) and tuple(arg.shape[:1]) == (rows,)
        entries = tree_leaves(arg) if isinstance(arg, (list, tuple)) and len(arg) == rows else []
        if array or (entries and all(_is_array(each) or isinstance(each, (int, float)) for each in entries)):
            raise CannotOptimize(
                f"{name} is a {type(arg).__name__} with as many entries as the batch has rows, and only tensors are "
                "reduced to the selected rows",
                hint=f"pass torch.as_tensor({name})",
            )


def _entries(arguments: Mapping[Any, Any], of: str = "") -> Iterator[tuple[str, Any]]:
    """The arguments by name, and what mappings among them hold."""
    for key, arg in arguments.items():
        name = f"{of}[{key!r}]" if of else key
        if isinstance(arg, Mapping):
            yield from _entries(arg, name)
        else:
            yield name, arg


def _is_array(arg: Any) -> bool:
    return hasattr(arg, "__array__") and hasattr(arg, "shape") and not isinstance(arg, torch.Tensor)


def _check_ids(arguments: dict[str, Any], decodes: bool) -> None:
    ids = arguments.get("input_ids")
    if ids is not None and "inputs_embeds" in arguments:
        raise CannotOptimize(
            "the call has input_ids and inputs_embeds, which say the same tokens twice",
            hint="pass input_ids alone: the router reads token ids",
        )
    if ids is None:
        raise CannotOptimize(
            "the call has no input_ids" + (", only inputs_embeds" if "inputs_embeds" in arguments else ""),
            hint="pass input_ids: the router reads token ids",
        )
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise CannotOptimize(
            f"input_ids of shape {tuple(getattr(ids, 'shape', ()))} is not [batch, sequence]",
            hint="pass a two-dimensional tensor of token ids",
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise CannotOptimize(f"input_ids are {ids.dtype}, not token ids", hint="pass integers, e.g. input_ids.long()")
    if ids.numel() == 0:
        raise CannotOptimize(
            f"the batch is empty: input_ids of shape {tuple(ids.shape)}", hint="skip batches without rows or tokens"
        )
    if ids.shape[1] == 1 and not decodes:
        raise CannotOptimize(
            f"sequences of one token (input_ids of shape {tuple(ids.shape)}) hold no token to predict from another",
            hint="skip such batches, or pad them to two tokens with labels of -100",
        )


def _check_labels(arguments: dict[str, Any], decodes: bool) -> None:
    """Labels are as long as the ids, unless a decoder has its own."""
    ids, labels = arguments["input_ids"], arguments.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dtype.is_floating_point:
        raise CannotOptimize(
            f"labels are {labels.dtype}, not token ids",
            hint="pass integers, e.g. labels.long(); losses of regression and of several labels are not routed",
        )
    if isinstance(labels, torch.Tensor) and labels.shape == ids.shape[:1]:
        raise CannotOptimize(
            f"labels of shape {tuple(labels.shape)} are one for each row: sequence classification is not routed",
            hint="train it without cggr; losses of tokens are routed, of language models and of token classification",
        )
    compared = slice(0, 1) if decodes else slice(0, 2)
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.shape[compared] != ids.shape[compared]:
        raise CannotOptimize(
            f"labels of shape {tuple(getattr(labels, 'shape', ()))} do not match input_ids of shape {tuple(ids.shape)}",
            hint="pass one row of labels for each row of input_ids, and one label a token, -100 where none counts",
        )
    given = [name for name in ("decoder_input_ids", "decoder_inputs_embeds") if name in arguments]
    if given:
        raise CannotOptimize(
            f"the call has {given[0]}: what the decoder reads must be made from the labels",
            hint="pass labels only; the model shifts them itself",
        )


def _check_cache(arguments: dict[str, Any]) -> None:
    """A filled cache of transformers'; whatever else has that name is an argument like others."""
    length = getattr(arguments.get("past_key_values"), "get_seq_length", None)
    if length is not None and length() > 0:
        raise CannotOptimize(
            "the call has past_key_values, and the keys and values in it fix the batch size of a capture",
            hint="train without a cache; of PEFT's prefix tuning optimize the PEFT model, not the one inside",
        )


def _check_activations(arguments: dict[str, Any], config: Any) -> None:
    """A routed step has no activations of every row, whether the call asks for them or the model's configuration."""
    for name in _ACTIVATIONS:
        if arguments.get(name):
            raise CannotOptimize(
                f"{name}=True in a training step: a routed step returns no activations",
                hint="drop it, or call the model in eval() mode for inspection",
            )
        text_config = getattr(config, "get_text_config", lambda: None)()
        if getattr(config, name, False) or getattr(text_config, name, False):
            raise CannotOptimize(
                f"{name}=True in the model's config: a routed step returns no activations",
                hint=f"set config.{name} = False while training",
            )
