"""Chooses an implementation for every cggr operator and records the choice.

Up to here the operators only say what is computed. A provider is chosen by device and dtype; the reference provider
is plain torch, which autograd and the inner backend see through.
"""

from __future__ import annotations

import dataclasses

from cggr_compile.kernels.providers import PROVIDERS, choose
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.program import Builder, Program, value

PROVIDER = "cggr_provider"


def operator_name(node: fx.Node) -> str | None:
    """`score` for a call of `torch.ops.cggr.score`, None for every other node."""
    namespace, _, name = str(node.target).partition(".")
    operator = name.partition(".")[0]
    return operator if namespace == "cggr" and operator in PROVIDERS else None


def lower_kernels(program: Program, config: RoutingConfig) -> Program:
    """Replaces each `cggr` operator by its provider's implementation; fills `routing.providers`."""
    builder = Builder(program)
    builder.copy_rest()
    providers = []
    for node in builder.graph.nodes:
        name = operator_name(node)
        if name is None:
            continue
        first = value(node.args[0])
        provider = choose(name, first.device, first.dtype)
        node.target = provider.implementation
        node.meta[PROVIDER] = f"cggr.{name}: {provider.name}"
        providers.append((name, provider.name))
    routing = dataclasses.replace(builder.routing(), providers=tuple(dict.fromkeys(providers)))
    return builder.finish("lower_kernels", routing=routing)
