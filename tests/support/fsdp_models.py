"""What two ranks that train with FSDP2 share: how a model is sharded and routed, and how a step compares with eager's.

The eager model is one that nobody sharded; gradients are the mean over the ranks of those on each rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import oracle
import token_oracle
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, token_batch
from small import small
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import cggr_compile as cggr

RTOL, ATOL = 1e-6, 1e-8


def shard(model: nn.Module, layers: str = "layers", **options: Any) -> nn.Module:
    """The same model after `fully_shard`, of its layers and of the whole."""
    for layer in model.get_submodule(layers):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def routed(model: nn.Module, **options: Any) -> nn.Module:
    return cggr.optimize(model, **{"ratio": 0.5, "router_layers": 1, "inner": "eager", "seed": 0, **options})


def rows_for(rank: int, rows: int = 6, length: int = 12, masked: bool = True) -> dict[str, Tensor]:
    """A batch of a `Small` that is another on each rank."""
    found = token_batch(rows, length, seed=rank, masked=masked)
    vocabulary = small().config.vocab_size
    return {name: torch.where(x < 0, x, x % vocabulary) for name, x in found.items()}


def own_rows() -> dict[str, Tensor]:
    return rows_for(dist.get_rank())


def mean_over_ranks(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    for gradient in gradients.values():
        if gradient is not None:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return dict(gradients)


LAYERS = 2
"""Of the models that `on_each_route` checks."""


def on_each_route(check: Callable[[str, str], None]) -> dict[str, Callable[[], None]]:
    """`check(name, route)` of four architectures on two routes, by its name."""
    names = ("llama", "gpt2", "mixtral", "gemma3")
    return {f"{name}, {route}": partial(check, name, route) for name in names for route in ("sequence", "token")}


def routed_on(model: nn.Module, route: str) -> nn.Module:
    """Routed so that `expected_on` says what a step gives."""
    return routed(model, route=route, selection="topk", **({"last_layers": 0} if route == "token" else {}))


def expected_on(
    eager: nn.Module, name: str, batch: dict[str, Tensor], route: str
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """What an eager router selects, and eager's loss and gradients on that, the mean over the ranks."""
    architecture = ARCHITECTURES[name]
    if route == "sequence":
        wanted = oracle.expected_rows(eager, architecture, batch, 0.5, 1)
        loss, gradients = oracle.step(eager, oracle.rows_of(batch, wanted))
    else:
        wanted = token_oracle.expected_positions(eager, architecture, batch, 0.5, 1)
        loss, gradients = token_oracle.step(eager, architecture, batch, range(1, LAYERS), wanted)
    return wanted, loss, mean_over_ranks(gradients)


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.grad is None or isinstance(parameter.grad, DTensor), name
        found[name] = None if parameter.grad is None else parameter.grad.full_tensor()
    return found


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


def forget(model: nn.Module) -> None:
    """No gradients; also where a forward has left whole parameters in the model, as FSDP2 does with its last unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.zero_grad()


def assert_step_on_rows(model: nn.Module, eager: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """One routed step of `model` is the mean over ranks of eager's steps on the rows that it selected."""
    forget(model)
    loss = model(**batch).loss
    loss.backward()
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=RTOL, atol=0)
    oracle.assert_same_gradients(whole_gradients(model), mean_over_ranks(expected), RTOL, ATOL)
