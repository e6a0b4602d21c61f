"""Chooses an implementation for every cggr operator and records the choice, with why the others were passed over.

Up to here the operators only say what is computed. A provider is chosen by device, dtype (under autocast, its own) and
length, or by `config.kernels`. The reference provider is plain torch, which autograd and the inner backend see
through; a Triton provider is an operator of its own, opaque to them like the one that it replaces.

Before::

    loss    %loss = cggr.masked_loss(…)

After::

    loss    %loss = cggr_triton.masked_loss(…)    # its meta names the provider
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from cggr_compile.kernels.providers import PROVIDERS, Place, Provider, choose, passed_over
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import PROVIDER, REGION, Analysed, Region, value


def operator_name(node: fx.Node) -> str | None:
    """`score` for a call of `torch.ops.cggr.score`, None for every other node."""
    namespace, _, name = str(node.target).partition(".")
    operator = name.partition(".")[0]
    return operator if namespace == "cggr" and operator in PROVIDERS else None


def lower_kernels(program: Analysed, config: RoutingConfig) -> Analysed:
    """Replaces each `cggr` operator by its provider's implementation; fills `routing.providers` and
    `routing.passed_over`.

    Raises:
        CannotOptimize: a provider that `config.kernels` asks for cannot run there.
    """
    builder = Builder(program)
    builder.copy_rest()
    # Of each operator, in order: one that is called in several places may have several.
    providers: defaultdict[str, dict[str, None]] = defaultdict(dict)
    reasons: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for node in builder.graph.nodes:
        name = operator_name(node)
        if name is None:
            continue
        place = _place(node, node.target)
        forced = forced_provider(config.kernels, name)
        provider = _provider(node, name, place, config)
        node.target = provider.implementation
        chosen = provider.name if provider.algorithm is None else f"{provider.name} ({provider.algorithm(place.dtype)})"
        node.meta[PROVIDER] = f"cggr.{name}: {chosen}"
        providers[name][chosen] = None
        if forced is None and provider.name == "reference" and (words := _in_words(passed_over(name, place))):
            reasons[name][words] = None
    routing = dataclasses.replace(
        builder.routing(),
        providers=tuple((name, ", ".join(found)) for name, found in providers.items()),
        passed_over=tuple((name, "; ".join(found)) for name, found in reasons.items()),
    )
    return builder.finish("lower_kernels", routing=routing)


def lowered_for(device: torch.device, program: Analysed, config: RoutingConfig) -> Analysed:
    """A lowered program with the implementations that its operators would have on another device; raises as
    `lower_kernels`."""
    builder = Builder(program)
    builder.copy_rest()
    for node in builder.graph.nodes:
        if PROVIDER in node.meta:
            name = node.meta[PROVIDER].partition(":")[0].removeprefix("cggr.")
            place = dataclasses.replace(_place(node, getattr(torch.ops.cggr, name).default), device=device)
            node.target = _provider(node, name, place, config).implementation
    return builder.finish(lowered_for.__name__, routing=builder.routing())


def forced_provider(kernels: str | Mapping[str, str], operator: str) -> str | None:
    """The provider that `RoutingConfig.kernels` asks for; a name alone is for every operator that has it, and one for
    `masked_loss` is for `measured_loss` too, which takes its place."""
    if isinstance(kernels, str):
        return kernels if kernels in PROVIDERS[operator] else None
    return kernels.get(operator, kernels.get("masked_loss") if operator == "measured_loss" else None)


def _provider(node: fx.Node, operator: str, place: Place, config: RoutingConfig) -> Provider:
    try:
        return choose(operator, place.device, place.dtype, forced_provider(config.kernels, operator), place.length)
    except ValueError as error:
        raise CannotOptimize(
            str(error), node=node, hint=f"leave kernels={config.kernels!r} out, or name another provider"
        ) from error


def _in_words(passed_over: Mapping[str, str]) -> str:
    """Each reason once, with the providers that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(providers)}: {reason}" for reason, providers in names.items())


def _place(node: fx.Node, operator: Any) -> Place:
    first = value(node.args[0])
    length = first.shape[-1] if first.dim() else 1
    hint = length.node.hint if isinstance(length, torch.SymInt) else length
    # An operator without a kernel of its own for autocast does not follow it.
    follows = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.AutocastCPU)
    dtype = _computed_in(first, node.meta.get(REGION, Region())) if follows else first.dtype
    return Place(first.device, dtype, hint)


def _computed_in(x: torch.Tensor, region: Region) -> torch.dtype:
    """The dtype that autocast turns `x` into where the node runs."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        return x.dtype
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    for cast in region.autocasts:
        if cast.device_type == device_type:
            enabled, dtype = cast.enabled, cast.dtype or dtype
    casts = enabled and x.is_floating_point() and x.dtype != torch.float64
    return dtype if casts else x.dtype
