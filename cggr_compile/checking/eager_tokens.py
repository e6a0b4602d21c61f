"""The eager side of `check` on the token route: layers that run on some tokens of each sequence.

Nothing of the compiler is used here. What a layer is given holds tokens along each dimension of the sequence's size:
the residual [batch, sequence, …] along its second, attention's masks along their last two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cggr_compile.checking.eager_layers import forwards_wrapped, residual_of, with_residual


class TokensNotTold(ValueError):
    """The eager side cannot run a layer on some tokens: something that it is given holds tokens in a way that its shape
    does not tell, it is a part of a layer, or it numbers its tokens itself."""


_CUTS = (torch.Tensor.__getitem__, torch.Tensor.narrow, torch.narrow)


class Counting(TorchFunctionMode):
    """Watches for what a layer may number its tokens by: `torch.arange` over `kept` places, and so many places of
    something longer."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= func is torch.arange and result.numel() == self.kept
        if func in _CUTS and args and isinstance(result, torch.Tensor) and result.dim() == args[0].dim():
            pairs = zip(args[0].shape, result.shape, strict=True)
            self.seen |= any(after == self.kept < before for before, after in pairs)
        return result


@contextmanager
def on_tokens(
    stack: list[nn.Module], middle: range, positions: torch.Tensor, length: int, counting: set[str]
) -> Iterator[None]:
    """While it holds, the `middle` calls of the stack run on the tokens at `positions` [B, k] of sequences of `length`
    tokens, and their result is put back; the other tokens pass on the residual.

    The names of layers that count k places, which may be to number their tokens, are added to `counting`.

    Raises, in a call of the model:
        TokensNotTold: as it says.
    """
    calls = itertools.count()
    rows = torch.arange(len(positions)).unsqueeze(1)
    left: torch.Tensor | None = None

    def around(layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        if next(calls) not in middle:
            output = forward(*args, **kwargs)
        else:
            entry, name = residual_of((*args, *kwargs.values())), type(layer).__name__
            if entry is None or left is None or not torch.equal(entry, left):
                raise TokensNotTold(f"{name}: what enters it is not what the layer before gave out: a part of a layer")
            if entry.shape[:2] != (len(positions), length):
                raise TokensNotTold(f"{name}: its residual of shape {tuple(entry.shape)} is not [batch, sequence, …]")
            with Counting(positions.shape[1]) as watched:
                output = forward(*_at(positions, entry, args), **_at(positions, entry, kwargs))
            if watched.seen:
                counting.add(name)
            short = residual_of(output)
            if short is None:
                raise TokensNotTold(f"{name}: it returns no tensor")
            output = with_residual(output, entry.index_put((rows, positions), short))
        left = residual_of(output)
        return output

    with forwards_wrapped(set(stack), around):
        yield


def _at(positions: torch.Tensor, entry: torch.Tensor, given: Any) -> Any:
    """What a layer that `entry` [batch, sequence, …] enters is given, for the tokens at the positions."""
    if isinstance(given, Mapping):
        return {name: _at(positions, entry, item) for name, item in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(_at(positions, entry, item) for item in given)
    if not isinstance(given, torch.Tensor) or not given.dim():
        return given
    if given is entry:
        return _taken(given, positions, [1])
    batch, length = entry.shape[:2]
    dims = [dim for dim, size in enumerate(given.shape) if size == length]
    flat = given.shape[0] == batch * length
    if flat and set(dims) <= {0}:
        return _taken(given.unflatten(0, (batch, length)), positions, [1]).flatten(0, 1)
    if not dims:
        return given
    if given.dim() == 4 and given.shape[0] == batch:
        dims = [dim for dim in dims if dim]
    if flat or (len(dims) > 1 and not _is_of_pairs(given, dims)):
        raise TokensNotTold(
            f"a layer is given a tensor of shape {tuple(given.shape)}: which of its dimensions is the sequence cannot "
            f"be told while that has {length} tokens; check it with a batch of another length, or on the sequence route"
        )
    if given.shape[0] in (1, batch):
        return _taken(given, positions, dims)
    if dims[0] == 0 or given.shape[0] % batch:
        raise TokensNotTold(f"a layer is given a tensor of shape {tuple(given.shape)}, whose batch cannot be told")
    return _taken(given.unflatten(0, (batch, -1)), positions, [dim + 1 for dim in dims]).flatten(0, 1)


def _is_of_pairs(x: torch.Tensor, dims: list[int]) -> bool:
    """Whether a tensor of three dimensions or more says something of each pair of tokens, along its last two: a mask,
    or a bias [.., heads, sequence, sequence]."""
    if x.dim() < 3 or dims != [x.dim() - 2, x.dim() - 1]:
        return False
    masks = not x.is_floating_point() or bool(((x == 0) | (x < -1e4)).all())
    return masks or (x.dim() == 4 and x.shape[1] > 1)


def _taken(x: torch.Tensor, positions: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """`x` [B or 1, …] at each sequence's positions along `dims`."""
    x = x.expand(len(positions), *x.shape[1:])
    for dim in dims:
        shape = [1] * x.dim()
        shape[0], shape[dim] = positions.shape
        x = torch.take_along_dim(x, positions.view(shape), dim)
    return x
