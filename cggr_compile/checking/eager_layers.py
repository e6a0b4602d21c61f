"""The eager side of `check`: the layers of a model, found by watching which modules run and exchanging their outputs.

Nothing of the compiler is used here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Batch = Mapping[str, torch.Tensor]
Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class LayerStackNotFound(ValueError):
    """No list of modules runs more than once in the eager model."""


def tensor_of(output: Any, name: str, dims: int) -> torch.Tensor | None:
    """What a call returns by that name, or else its first tensor, of so many dimensions; None where there is none."""
    named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    found = (x for x in (named, *pytree.tree_leaves(output)) if isinstance(x, torch.Tensor) and x.dim() == dims)
    return next(found, None)


def loss_of(output: Any) -> torch.Tensor:
    """The loss that a training call returns; a step without one is not routed."""
    loss = tensor_of(output, "loss", 0)
    assert loss is not None
    return loss


def logits_of(output: Any) -> torch.Tensor:
    """The logits [batch, sequence, vocabulary] that a call with `inputs_of` a batch returns."""
    logits = tensor_of(output, "logits", 3)
    assert logits is not None
    return logits


def inputs_of(model: nn.Module, batch: Batch) -> Batch:
    """What the model is given to return logits: the batch, without its labels where they make it return a loss alone.

    Raises:
        ValueError: it returns no logits either way.
    """
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        if tensor_of(model(**batch), "logits", 3) is not None:
            return batch
        with suppress(TypeError, AttributeError):  # of a forward that cannot do without labels
            if tensor_of(model(**unlabelled), "logits", 3) is not None:
                return unlabelled
    raise ValueError(
        f"check: {type(model).__name__} returns no logits [batch, sequence, vocabulary], with labels or without, to "
        "score rows by; let its forward return them beside the loss"
    )


@contextmanager
def outputs_replaced(stack: list[nn.Module], place: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it holds, the first tensor that the i-th call of the stack returns becomes `place(i, tensor)`."""
    calls = itertools.count()

    def replaced(_: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        own = residual_of(output)
        return output if own is None else with_residual(output, place(next(calls), own))

    with forwards_wrapped(stack, replaced):
        yield


@contextmanager
def forwards_wrapped(modules: Iterable[nn.Module], around: Around) -> Iterator[None]:
    """While it holds, `around(module, forward, args, kwargs)` is what each of the modules returns, also where a model
    calls a layer's `forward` itself, which passes forward hooks by."""
    own = {module: vars(module).get("forward") for module in modules}
    for module in own:
        vars(module)["forward"] = _wrapped(module, module.forward, around)
    try:
        yield
    finally:
        for module, forward in own.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _wrapped(module: nn.Module, forward: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return around(module, forward, args, kwargs)

    return run


def layer_calls(model: nn.Module, batch: Batch) -> list[nn.Module]:
    """The layers in the order in which they run; a layer that runs again is listed again.

    Candidates are the indexed containers (`layers.0`, `layers.1`, …) whose members run at least twice between them. A
    stack of layers is one where the output of the first decides everything behind it: put in its place in a run on
    other rows, it gives its own logits. Of several, the one with the most parameters, or else the last, is taken, or
    one that runs as often and later, since a layer ends with its last part; where there is none, the container with the
    most parameters.

    Raises:
        LayerStackNotFound: there is no candidate.
        ValueError: the model returns no logits.
    """
    inputs = inputs_of(model, batch)
    containers = {
        child: path.rpartition(".")[0] for path, child in model.named_modules() if path.rpartition(".")[2].isdigit()
    }
    calls: dict[str, list[nn.Module]] = {}

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if residual_of(output) is not None:
            run = calls.pop(containers[module], [])
            calls[containers[module]] = [*run, module]  # containers in the order of their last calls
        return output

    with forwards_wrapped(containers, record), torch.no_grad():
        model(**inputs)
    stacks = [run for run in calls.values() if len(run) > 1]
    if not stacks:
        raise LayerStackNotFound(f"{type(model).__name__} runs no list of modules more than once")

    def merit(position: int) -> tuple[bool, int, int]:
        size = sum(parameter.numel() for module in set(stacks[position]) for parameter in module.parameters())
        return _decides(model, inputs, stacks[position]), size, position

    best = max(range(len(stacks)), key=merit)
    last_parts = [
        stack
        for stack in stacks[best + 1 :]
        if len(stack) == len(stacks[best]) and _decides(model, inputs, stacks[best]) and _decides(model, inputs, stack)
    ]
    return [stacks[best], *last_parts][-1]


def _decides(model: nn.Module, inputs: Batch, stack: list[nn.Module]) -> bool:
    """Whether the output of the stack's first call, put into a run on other ids, gives the logits it came from.

    The other ids are those that the logits are made for: a decoder's come from the labels, and its encoder's stay.
    """
    taken: list[torch.Tensor] = []
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    ids = "labels" if decodes else "input_ids"
    others = {**inputs, ids: inputs[ids].roll(1, 0)}

    def take(call: int, output: torch.Tensor) -> torch.Tensor:
        taken.append(output.clone())
        return output

    with torch.no_grad():
        with outputs_replaced(stack, take):
            wanted = logits_of(model(**inputs))
        with outputs_replaced(stack, lambda call, output: taken[0].clone() if call == 0 else output):
            return torch.equal(logits_of(model(**others)), wanted)


def residual_of(output: Any) -> Any:
    """The first tensor that a layer returns, None where it returns none."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((part for part in output if isinstance(part, torch.Tensor)), None)
    return output if isinstance(output, torch.Tensor) else None


def with_residual(output: Any, residual: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return residual
    items = list(output.items() if isinstance(output, Mapping) else enumerate(output))
    place = next(key for key, part in items if isinstance(part, torch.Tensor))
    changed = [(key, residual if key == place else part) for key, part in items]
    return type(output)(changed if isinstance(output, Mapping) else (part for _, part in changed))
