"""What the layers of a model that grows start from: copies of the layers that trained so far, made in place.

What a layer is, dataflow says, as far as a step reads it. The rest (an adapter that is not active, a gate that is off)
lies beside that in the model: where what is read is copied between `layers.0.…` and `layers.2.…`, all that the model
saves below `layers.2` is. Buffers that are not saved are made with the model, and stay as a checkpoint would find them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.roles import is_state
from cggr_compile.run.notices import notice

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=^)\d+(?=\.)")
_HINT = "choose depth_layers so that these are alike (a multiple of the pattern's length), or grow='random'"
_PLAIN = (torch.Tensor, nn.Parameter)


class Copies:
    """Layer i of a stack as a copy of layer i mod `count`: what of a model is copied into what, by paths.

    What is copied are the parameters and buffers that a layer reads and none of the first `count` does, each from the
    one whose path differs in numbers only; several of those (experts) go by these numbers, in order. So does what the
    model holds beside them and the layer does not read.

    Raises:
        CannotOptimize: the layer it would be a copy of has none of that shape and dtype, or two layers share it, or it
            is not known what else belongs to the layer.
    """

    def __init__(self, program: Analysed, count: int, model: nn.Module | None) -> None:
        self._places = {entry.path: place for place, entry in enumerate(program.inputs)}
        self._stack = program.stack.path or "the stack"
        saved = _saved(model)
        states_of = _states(program)
        trained = {node for states in states_of[:count] for node in states}
        readers = Counter(node for states in states_of for node in states)
        layers = [_by_path(program, states) for states in states_of]
        self._read: dict[str, str] = {}
        self._missing: dict[str, tuple[int, int]] = {}
        for index in range(count, len(layers)):
            like = index % count
            new_states = [
                node for node in states_of[index] if node not in trained and program.path(node) not in saved.remade
            ]
            for name, states in _by_path(program, new_states).items():
                partners = layers[like].get(name, [])
                shared = [node for node in states if readers[node] > 1]
                if shared:
                    raise _shared(program.path(shared[0]))
                paths = list(map(program.path, states))
                if [_kind(value(node)) for node in states] == [_kind(value(node)) for node in partners]:
                    self._read |= zip(paths, map(program.path, partners), strict=True)
                else:
                    self._missing |= dict.fromkeys(paths, (index, like))
        self._roots = dict(_roots(new, old) for new, old in self._read.items())
        overwritten = [saved.tensors.get(path) for path in self._all(saved)]
        frozen = sum(isinstance(each, nn.Parameter) and not each.requires_grad for each in overwritten)
        if frozen:
            notice(
                f"grow='copy' will overwrite {frozen} frozen parameters, which an adapter's checkpoint does not hold; "
                "save the whole model, or give grow='random'"
            )

    @torch.no_grad()
    def make(
        self, model: nn.Module | None, inputs: Sequence[Any], held: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    ) -> None:
        """Copies the values, of the model and of the inputs of a call, as far as this rank has them (`held`)."""
        saved = _saved(model)
        pairs = self._all(saved)
        values = {**saved.tensors, **{path: inputs[place] for path, place in self._places.items()}}
        new, old = (held(tuple(values[path] for path in paths)) for paths in (pairs.keys(), pairs.values()))
        for each, like in zip(new, old, strict=True):
            each.copy_(like)

    def refuse_trained(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Raises `CannotOptimize` where an optimizer remembers gradients of what would be overwritten: it has trained,
        in the run that is resumed say. Reads the optimizer's state back."""
        if optimizer is None:
            return
        saved = _saved(model)
        for path in self._all(saved):
            tensor = saved.tensors.get(path)
            if any(_is_nonzero(x, tensor) for x in optimizer.state.get(tensor, {}).values()):
                raise CannotOptimize(
                    f"growing would overwrite {path}, which has trained: the optimizer remembers its gradients",
                    hint="where a run is resumed, first call model.cggr.load_state_dict(…) with what "
                    "model.cggr.state_dict() gave; where it is not, give grow='random'",
                )

    def _all(self, saved: _Saved) -> dict[str, str]:
        """By the path of what is written to, that of what is copied there.

        Raises:
            CannotOptimize: something cannot be copied.
        """
        unknown = min(self._roots.keys() - saved.prefixes, default=None)
        if unknown is not None:
            raise CannotOptimize(
                f"{unknown} is no module of a model that is known, so not all that belongs to this layer is",
                hint="call cggr.optimize(model), whose layers are in an nn.ModuleList, or choose grow='random'",
            )
        found = dict(self._read)
        for path in saved.tensors:
            if path not in found and (root := self._root_of(path)) is not None:
                found[path] = self._roots[root] + path[len(root) :]
        for path, layers in self._missing.items():
            if path not in found:
                raise self._no_such(path, *layers)
        return {new: old for new, old in found.items() if new not in saved.tensors or self._differs(saved, new, old)}

    def _differs(self, saved: _Saved, new: str, old: str) -> bool:
        """Whether what the model saves as `new` is another tensor than `old`, which can be copied into it."""
        tensor, like = saved.tensors[new], saved.tensors.get(old)
        if tensor is like:
            return False
        if like is None or _kind(tensor) != _kind(like):
            raise self._no_such(new, *self._missing.get(new, ()))
        if saved.places(tensor) - saved.places(like):
            raise _shared(new)
        owner = new.rpartition(".")[0] + "."
        if new not in self._read and type(tensor) not in _PLAIN and not any(x.startswith(owner) for x in self._read):
            raise CannotOptimize(
                f"{new} is a {type(tensor).__name__} that the step does not read, and what belongs to it is not known",
                hint="activate its module before the model grows, or choose grow='random'",
            )
        return True

    def _root_of(self, path: str) -> str | None:
        parts = path.split(".")
        roots = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((root for root in roots if root in self._roots), None)

    def _no_such(self, path: str, *layers: int) -> CannotOptimize:
        if layers:
            new, old = (f"layer {index}" for index in layers)
        else:
            root = self._root_of(path)
            new, old = str(root), self._roots[str(root)]
        return CannotOptimize(
            f"{new} of {self._stack} cannot become a copy of {old}, which has no such {path}", hint=_HINT
        )


class _Saved(NamedTuple):
    """What a model saves, by path, a tensor under each of its `names`; and the paths of buffers that are `remade` with
    it instead."""

    tensors: dict[str, torch.Tensor]
    names: dict[int, list[str]]
    remade: set[str]

    @property
    def prefixes(self) -> set[str]:
        """The paths, and those of what they are in."""
        parts = (path.split(".") for path in (*self.tensors, *self.remade))
        return {".".join(each[:end]) for each in parts for end in range(1, len(each) + 1)}

    def places(self, tensor: torch.Tensor) -> Counter[str]:
        """Its names without their numbers."""
        return Counter(_NUMBERS.sub("#", name) for name in self.names[id(tensor)])


def _saved(model: nn.Module | None) -> _Saved:
    if model is None:
        return _Saved({}, {}, set())
    remade = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    tensors = {
        name: tensor
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
        if name not in remade
    }
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return _Saved(tensors, names, remade)


def _shared(path: str) -> CannotOptimize:
    return CannotOptimize(
        f"{path} belongs to several of the layers that do not train yet, or to something beside them",
        hint="choose more depth_layers, or grow='random'",
    )


def _roots(new: str, old: str) -> tuple[str, str]:
    """Two paths without what they end in alike."""
    news, olds = new.split("."), old.split(".")
    while news[-1] == olds[-1]:
        del news[-1], olds[-1]
    return ".".join(news), ".".join(olds)


def _by_path(program: Analysed, states: list[fx.Node]) -> dict[str, list[fx.Node]]:
    """States by their path without its numbers, each group in the order of these."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in sorted(states, key=lambda node: list(map(int, _NUMBERS.findall(program.path(node))))):
        found[_NUMBERS.sub("#", program.path(node))].append(node)
    return found


def _states(program: Analysed) -> list[list[fx.Node]]:
    """The parameters and buffers that each layer reads; with the first, what is read in front of it."""
    stack = program.stack
    found = []
    for before, after in zip((stack.entry, *stack.residuals), stack.residuals, strict=False):
        inside = ancestors([after], stop=[before])
        read = [source for node in program.graph.nodes if node in inside for source in node.all_input_nodes]
        found.append([node for node in dict.fromkeys(read) if is_state(program, node)])
    return found


def _is_nonzero(state: Any, tensor: torch.Tensor | None) -> bool:
    """Whether an entry of a tensor's optimizer state is like it and not all zeros."""
    return isinstance(state, torch.Tensor) and tensor is not None and state.shape == tensor.shape and bool(state.any())


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, *tensor.shape
