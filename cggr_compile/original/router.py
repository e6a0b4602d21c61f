"""The original CGGR's router: a model's own forward with its layer list cut to the first layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cggr_compile.errors import warn

ARCHITECTURES = ("auto", "llama", "gpt", "bert", "mamba", "passthrough")
# By which names configurations and modules count the layers they loop over.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class TruncatedRouter(nn.Module):
    """A model's own forward with its layer list cut to the first `num_layers`; every parameter is the model's.

    The list is the longest `nn.ModuleList` of one class that lies in no other such list; names do not matter.
    `router(input_ids, **kwargs)` returns logits [B, S, V], or the last hidden state of a model without a head. During
    the call the model holds the shorter list, and counts of layers on modules and configurations say so, with
    `use_cache` off; all of it is put back, also after an error. One thread at a time may run the model.

    Args:
        model: any module that is called with input_ids.
        num_layers: how many layers run, at least 1.
        architecture: `"passthrough"` runs the whole model; `"auto"` does that too, with a warning, where there is
            nothing to cut: no such list, several of the same length, or one that is no longer than `num_layers`. The
            other names, which the original CGGR looked attributes up by, insist on a list.

    Attributes:
        passthrough: whether the whole model runs; `"auto"` also sets it, with a warning, where a forward pass asks
            the cut list for a layer it no longer has.

    Raises ValueError for a missing model, num_layers below 1, an unknown architecture, and one that insists in vain.
    """

    def __init__(self, model: nn.Module, num_layers: int = 2, architecture: str = "auto") -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, expected at least 1")
        self.model = checked_module("model", model)
        self.num_layers = num_layers
        self.architecture = architecture
        self.passthrough = architecture == "passthrough"
        self._path = ""
        if self.passthrough:
            return
        lists = sorted(layer_lists(model), key=lambda path: -len(model.get_submodule(path)))
        lengths = [len(model.get_submodule(path)) for path in lists]
        if not lists:
            obstacle = "it has no list of layers of one class"
        elif lengths.count(lengths[0]) > 1:
            obstacle = f"{' and '.join(lists[: lengths.count(lengths[0])])} are equally long"
        elif lengths[0] <= num_layers:
            obstacle = f"{lists[0]} has no more than num_layers={num_layers} layers"
        else:
            self._path = lists[0]
            return
        if architecture != "auto":
            raise ValueError(f"{type(model).__name__} cannot be cut: {obstacle}; use architecture='passthrough'")
        self._pass_through(obstacle)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits of the cut model."""
        if self.passthrough:
            return logits_of(self.model(input_ids, **kwargs))
        try:
            with self._cut_model():
                return logits_of(self.model(input_ids, **kwargs))
        except IndexError as error:
            # Where it was not the list that was too short, the whole model raises it again.
            logits = logits_of(self.model(input_ids, **kwargs))
            if self.architecture != "auto":
                raise ValueError(f"{self._path} cannot be cut: {error}; use architecture='passthrough'") from error
            self._pass_through(f"its forward indexes {self._path} ({error})")
            return logits

    def _pass_through(self, obstacle: str) -> None:
        self.passthrough = True
        warn(
            f"{type(self.model).__name__} cannot be cut: {obstacle}; the whole model is the router, which costs a full "
            "forward pass; give a custom router for speed"
        )

    @contextlib.contextmanager
    def _cut_model(self) -> Iterator[None]:
        parent, _, name = self._path.rpartition(".")
        owner = self.model.get_submodule(parent)
        layers = self.model.get_submodule(self._path)
        changes = [
            (holder, key, value)
            for holder in _holders(self.model)
            for key, value in vars(holder).items()
            if (key in _LAYER_COUNTS and value == len(layers)) or (key == "use_cache" and value is True)
        ]
        try:
            setattr(owner, name, nn.ModuleList(list(layers)[: self.num_layers]))
            for holder, key, _ in changes:
                setattr(holder, key, False if key == "use_cache" else self.num_layers)
            yield
        finally:
            setattr(owner, name, layers)
            for holder, key, value in changes:
                setattr(holder, key, value)


def create_truncated_router(model: nn.Module, num_layers: int = 2) -> nn.Module:
    """`TruncatedRouter(model, num_layers)`: a router of the model's first layers that shares its weights."""
    return TruncatedRouter(model, num_layers)


def checked_module(name: str, module: Any) -> nn.Module:
    """`module`; ValueError, naming the argument, for what is no module."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} is {type(module).__name__}, expected a torch.nn.Module")
    return module


def logits_of(output: Any) -> Tensor:
    """The logits, or else the last hidden state, of what a model returned."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, tuple) else output


def cache_holders(model: nn.Module) -> list[Any]:
    """Modules and configurations whose `use_cache` is on."""
    return [holder for holder in _holders(model) if vars(holder).get("use_cache") is True]


def _holders(model: nn.Module) -> list[Any]:
    """The model's modules and their configurations, which hold its options."""
    holders: list[Any] = [*model.modules()]
    configs = (vars(holder).get("config") for holder in holders)
    return [*holders, *{id(config): config for config in configs if hasattr(config, "__dict__")}.values()]


def layer_lists(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of the lists of two or more modules of one class that lie in no other such list."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(entry) for entry in child}) == 1:
            yield prefix + name
        else:
            yield from layer_lists(child, f"{prefix}{name}.")
