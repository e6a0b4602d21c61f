"""Private corners of FSDP2: the units that `fully_shard` made of a model, their parameters, and the hooks that gather
them when the model is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, TrainingState
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from cggr_compile.errors import Refusal

_ELSE = "or pass fallback='eager' to train without routing"


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_root(model: nn.Module) -> bool:
    """Whether the model itself was given to `fully_shard`."""
    return isinstance(model, FSDPModule)


def why_not_distributed(model: nn.Module) -> Refusal | None:
    """What of the way that a model is distributed cannot be routed; None where it is not distributed, or by
    `fully_shard` in a way that can."""
    if isinstance(model, nn.DataParallel):
        return Refusal("torch.nn.DataParallel runs replicas of a model", hint="use DistributedDataParallel (torchrun)")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return Refusal(
            "FSDP1 (FullyShardedDataParallel) hides the parameters in flat ones",
            hint="shard by torch.distributed.fsdp.fully_shard (Accelerate: fsdp_version: 2), or train by "
            "DistributedDataParallel",
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return Refusal(
            "DeepSpeed ZeRO-3 keeps the parameters elsewhere",
            hint="use ZeRO stage 0 to 2, or shard by torch.distributed.fsdp.fully_shard",
        )
    groups = list(_groups(model))
    own = {id(each.sharded_param) for group in groups for each in group.fsdp_params}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in own:
            return Refusal(
                f"{name} is a DTensor that fully_shard did not make (a tensor parallel plan)",
                hint="train without tp_plan, by fully_shard or DistributedDataParallel",
            )
    return next((Refusal(*problem) for group in groups if (problem := _problem(group))), None)


def why_no_root(model: nn.Module) -> Refusal | None:
    """Why the hooks of a model that was given to `fully_shard` do not gather all of it; None where they do."""
    if not is_root(model):
        return Refusal("fully_shard was called on parts of the model only", hint="call fully_shard(model) as well")
    state: Any = model._get_fsdp_state()
    if state._is_root is False:
        return Refusal(
            "the model is a part of one that was given to fully_shard as a whole",
            hint="optimize that one, or give fully_shard the optimized model",
        )
    return None


def _problem(group: Any) -> tuple[str, None, str] | None:
    mesh, after = group.mesh_info, group.post_forward_mesh_info
    found = None
    if isinstance(mesh, HSDPMeshInfo):
        found = "a mesh of two dimensions (HSDP)", "shard over a mesh of one dimension"
    elif not isinstance(mesh, FSDPMeshInfo):
        found = "a mesh that replicates the parameters", "use DistributedDataParallel"
    elif isinstance(group.offload_policy, CPUOffloadPolicy):
        found = "CPUOffloadPolicy", "leave offload_policy out"
    elif after is not None and after.shard_mesh_size != mesh.shard_mesh_size:
        found = "reshard_after_forward as a number of ranks", "give True or False"
    elif any(each.is_dtensor for each in group.fsdp_params):
        found = "parameters that are DTensors already (a tensor parallel plan)", "train without tp_plan"
    elif any(each.fsdp_placement != Shard(0) or each.mesh_info is not mesh for each in group.fsdp_params):
        found = "shard_placement_fn", "leave it out: parameters are sharded along their first dimension"
    elif any(type(each.sharded_param.to_local().detach()) is not torch.Tensor for each in group.fsdp_params):
        found = "parameters of a tensor subclass", "train on plain weights"
    elif any(not type(comm).__module__.startswith("torch.") for comm in _communication(group)):
        found = "collectives of the user's (set_custom_all_gather, set_custom_reduce_scatter)", "leave them out"
    elif group._all_reduce_hook is not None:
        found = "set_all_reduce_hook", "leave it out"
    return None if found is None else (f"fully_shard with {found[0]} cannot be routed", None, f"{found[1]}, {_ELSE}")


def _communication(group: Any) -> list[Any]:
    return [getattr(group, name) for name in ("_all_gather_comm", "_reduce_scatter_comm") if hasattr(group, name)]


def _groups(model: nn.Module) -> Iterator[Any]:
    """The groups of parameters that are gathered at once, in the order of the modules."""
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # Several groups to a state came with torch 2.12.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group


@dataclass(frozen=True)
class Group:
    """One group of parameters: its module, the name of its ranks' process group, the dtypes, the gradient's divisor,
    whether it is gathered anew for the backward, and its `members`."""

    name: str
    process_group: str
    ranks: int
    reduce_dtype: torch.dtype | None
    divisor: float
    reshards: bool
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Member:
    """One parameter of a group: the shape of the whole, and the dtype that it is gathered in."""

    shape: torch.Size
    dtype: torch.dtype


class Root:
    """A model that was given to `fully_shard` as a whole, after its layers.

    Its hooks gather nothing in a call that `routes`; they are put back by `release`.
    """

    def __init__(self, model: nn.Module, routes: Callable[[tuple[Any, ...], dict[str, Any]], bool]) -> None:
        self.model = model
        self.state: Any = model._get_fsdp_state()
        self.state._lazy_init()
        self.groups = list(_groups(model))
        self.parameters = [each for group in self.groups for each in group.fsdp_params]
        self._routes = routes
        self._routed = False
        self._hooks = [*_hooks(self.state)]
        self._before, self._after = (hooks[key] for hooks, key in self._hooks)
        self._casts = [cast for state in self._states() for cast in _casts(state)]
        for (hooks, key), hook in zip(self._hooks, (self._enter, self._leave), strict=True):
            hooks[key] = hook

    def release(self) -> None:
        """Puts the root's own hooks back."""
        for (hooks, key), hook in zip(self._hooks, (self._before, self._after), strict=True):
            hooks[key] = hook

    def begun(self) -> None:
        """Takes back what the root's hook has done for the call under way, which it was not known to route."""
        self._routed = True
        self.state._training_state = TrainingState.IDLE
        for group in self.groups:
            group._training_state = TrainingState.IDLE
        self.state._state_ctx.iter_forward_root = None

    @torch.compiler.disable(reason="FSDP2's hooks are not traced")
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._routed = self._routes(args, kwargs)
        return None if self._routed else self._before(module, args, kwargs)

    @torch.compiler.disable(reason="FSDP2's hooks are not traced")
    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self._routed else self._after(module, args, output)

    def plainly(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the forward as FSDP2 does, within a call that was to be routed."""
        args, kwargs = self.state._pre_forward(self.model, args, kwargs)
        return self.state._post_forward(self.model, args, forward(*args, **kwargs))

    def shards(self) -> list[torch.Tensor]:
        """What the rank has of each parameter, as functions of the DTensors, where gradients are accumulated; those of
        a group are one function, which spares the host `DTensor.to_local` and its backward for each."""
        return [x for group in self.groups for x in _Shards.apply(group.fsdp_params, *_sharded(group))]

    def described(self) -> tuple[Group, ...]:
        """The groups as they are."""
        return tuple(map(_described, self.groups))

    def settings(self) -> tuple[Any, ...]:
        """What of the groups may be changed between steps."""
        return tuple(
            (group._reduce_dtype, group.gradient_divide_factor, group.post_forward_mesh_info is None)
            for group in self.groups
        ) + tuple(each.sharded_param.dtype for each in self.parameters)

    def inputs_cast(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the root in the dtype of its policy."""
        policy = self.state._mp_policy
        return _to(policy.param_dtype, kwargs) if policy.cast_forward_inputs and policy.param_dtype else kwargs

    def output_cast(self, output: Any) -> Any:
        """The root's output in the dtype of its policy."""
        dtype = self.state._mp_policy.output_dtype
        return output if dtype is None else _to(dtype, output)

    def _states(self) -> list[Any]:
        return [state for state in self.state._state_ctx.all_states if state is not self.state]

    @contextmanager
    def stood_in(self, stand_ins: list[nn.Parameter]) -> Iterator[None]:
        """Puts the stand-ins into the place of the parameters, and casts into that of the hooks of the parts."""
        for group in self.groups:
            if not group.is_sharded:
                group.reshard()
        own = [hooks[key] for hooks, key, _ in self._casts]
        try:
            for each, stand_in in zip(self.parameters, stand_ins, strict=True):
                each._setattr_on_modules(stand_in)
            for hooks, key, cast in self._casts:
                hooks[key] = cast
            yield
        finally:
            for (hooks, key, _), hook in zip(self._casts, own, strict=True):
                hooks[key] = hook
            for each in self.parameters:
                each._setattr_on_modules(each.sharded_param)


def _sharded(group: Any) -> list[DTensor]:
    return [each.sharded_param for each in group.fsdp_params]


class _Shards(torch.autograd.Function):
    """The shards of the parameters of a group."""

    @staticmethod
    def forward(ctx: Any, parameters: list[Any], *sharded: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        found = tuple(each._local_tensor.view_as(each._local_tensor) for each in sharded)
        ctx.mark_non_differentiable(*(x for x, each in zip(found, sharded, strict=True) if not each.requires_grad))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        pairs = zip(ctx.parameters, gradients, strict=True)
        return None, *(None if gradient is None else each.to_sharded_dtensor(gradient) for each, gradient in pairs)


def _described(group: Any) -> Group:
    mesh = group.mesh_info
    members = tuple(Member(each._orig_size, each.param_dtype or each.orig_dtype) for each in group.fsdp_params)
    return Group(
        name=group._module_fqn or "",
        process_group=mesh.shard_process_group.group_name,
        ranks=mesh.shard_mesh_size,
        reduce_dtype=group._reduce_dtype,
        divisor=float(group.gradient_divide_factor or mesh.shard_mesh_size),
        reshards=group.post_forward_mesh_info is not None,
        members=members,
    )


def _hooks(state: Any) -> Iterator[tuple[dict[int, Any], int]]:
    """Where the hooks of a state are registered: those that run before, then those that run after."""
    seen: set[int] = set()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for each in getattr(handle, "handles", (handle,)):
            if each.id not in seen:
                seen.add(each.id)
                yield each.hooks_dict_ref(), each.id


def _casts(state: Any) -> Iterator[tuple[dict[int, Any], int, Any]]:
    """What is left of a state's hooks where nothing is gathered: its policy's casts."""
    policy, before = state._mp_policy, len(state._modules)
    inputs = policy.param_dtype if policy.cast_forward_inputs else None
    for place, (hooks, key) in enumerate(_hooks(state)):
        yield hooks, key, _inputs_to(inputs) if place < before else _output_to(policy.output_dtype)


def _inputs_to(dtype: torch.dtype | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if dtype is None else (_to(dtype, args), _to(dtype, kwargs))

    return hook


def _output_to(dtype: torch.dtype | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return None if dtype is None else _to(dtype, output)

    return hook


def _to(dtype: torch.dtype, item: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x, item)
