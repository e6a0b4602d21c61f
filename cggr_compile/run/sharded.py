"""Parameters that FSDP2 shards, in a routed step: captured whole, run on shards.

FSDP2 gathers parameters in hooks of the modules, which break a graph. So a routed step is traced with stand-ins in
their place: parameters of the whole shape without memory. What the step is given is each one's shard, as a function of
the DTensor, so that gradients are accumulated there; `unshard_parameters` gathers it within the graph. Calls that are
not routed are FSDP2's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.program import Input
from cggr_compile.ir.shards import Shard, Unit
from cggr_compile.torch_internals import fsdp

Routes = Callable[[tuple[Any, ...], dict[str, Any]], bool]


class Sharded:
    """The parameters of one model that was given to `fully_shard`.

    `routes(args, kwargs)` says whether a call of the model will be routed.

    Raises:
        CannotOptimize: only parts of the model were given to `fully_shard`, or a model around it.
    """

    def __init__(self, model: nn.Module, routes: Routes) -> None:
        refusal = fsdp.why_no_root(model)
        if refusal is not None:
            raise refusal.error()
        self.root = fsdp.Root(model, routes)
        self._settings = self.root.settings()
        members = [(group, member) for group in self.root.described() for member in group.members]
        parameters = zip(self.root.parameters, members, strict=True)
        self._stand_ins = [_stand_in(each.sharded_param, member) for each, (_, member) in parameters]
        self._places = {id(stand_in): place for place, stand_in in enumerate(self._stand_ins)}
        self._units = [_unit(group, member) for group, member in members]

    @property
    def is_current(self) -> bool:
        """Whether the policies and dtypes are those that the stand-ins were made for."""
        return self._settings == self.root.settings()

    def call(self, step: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Any:
        """`step(arguments)` with stand-ins in the model, and with the casts of the root's policy."""
        with self._stood_in():
            output = step(self.root.inputs_cast(arguments))
        return self.root.output_cast(output)

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        for stand_in, each in zip(self._stand_ins, self.root.parameters, strict=True):
            if stand_in.requires_grad != each.sharded_param.requires_grad:
                stand_in.requires_grad_(each.sharded_param.requires_grad)
        with self.root.stood_in(self._stand_ins):
            yield

    def shards(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """A step's inputs, shards in the place of the stand-ins."""
        shards = self.root.shards()
        places = (self._places.get(id(x)) for x in inputs)
        return tuple(x if place is None else shards[place] for x, place in zip(inputs, places, strict=True))

    def described(self, example_inputs: Sequence[Any], inputs: Sequence[Input]) -> dict[str, Shard]:
        """What a captured program is given in the place of its inputs, by their names."""
        found = {}
        for example, entry in zip(example_inputs, inputs, strict=True):
            place = self._places.get(id(example))
            if place is not None:
                parameter = self.root.parameters[place].sharded_param
                local = parameter.to_local()
                found[entry.name] = Shard(self._units[place], local.shape[0], local.dtype)
        return found


def _stand_in(parameter: torch.Tensor, member: fsdp.Member) -> nn.Parameter:
    whole = torch.empty(member.shape, dtype=member.dtype, device=parameter.device)
    whole.untyped_storage().resize_(0)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _unit(group: fsdp.Group, member: fsdp.Member) -> Unit:
    how = (group.reduce_dtype or member.dtype, group.divisor, group.reshards)
    return Unit(group.name, group.process_group, group.ranks, member.dtype, *how)


def refuse_undistributable(model: nn.Module, config: RoutingConfig) -> None:
    """Raises `CannotOptimize` for a model that is distributed in a way that cannot be routed."""
    refusal = fsdp.why_not_distributed(model)
    if refusal is not None:
        raise refusal.error()
    if config.cuda_graphs and fsdp.is_sharded(model):
        raise CannotOptimize(
            "cuda_graphs=True with fully_shard: a step's collectives are not recorded",
            hint="leave cuda_graphs out, or train by DistributedDataParallel",
        )


def sharded_parameters(model: nn.Module, config: RoutingConfig, routes: Routes) -> Sharded | None:
    """The sharded parameters of a model, None where there are none.

    Raises:
        CannotOptimize: it is distributed in a way that cannot be routed.
    """
    refuse_undistributable(model, config)
    return Sharded(model, routes) if fsdp.is_sharded(model) else None
