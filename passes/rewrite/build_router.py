"""Cuts the router out: the model's own first layers, final norm and head input, sharing every parameter.

The router is the final hidden state with `residual[L-1]` replaced by `residual[n-1]`. `find_layers` proved that
nothing else that depends on the activations crosses either cut, so the copy contains layers 0 … n-1, whatever follows
the last layer, and loop-invariant values, and nothing of the layers between.

It runs without gradients, without autocast's weight cache (a cast made under no_grad and then reused by the main pass
would cut the weights off from their gradient) and without dropout.

Before::

    main    %add_9 = … layers 0–1 …, %norm = … the final norm

After::

    router  %add_9 = … layers 0–1 on all B rows, no gradient
    router  %norm = … the final norm
    main    as before
"""

from __future__ import annotations

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import clone
from cggr_compile.ir.program import Analysed, Region
from cggr_compile.ir.roles import layers_in_words, quiet_region, router_layers

aten = torch.ops.aten

_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


def build_router(program: Analysed, config: RoutingConfig) -> Analysed:
    """Inserts the router in front of the main pass and sets `routing.router_hidden` (the head's input, [B, S, D]).

    Raises:
        CannotOptimize: more router layers than layers, or randomness other than dropout inside the router.
    """
    layers = program.stack
    count = router_layers(config, len(layers))
    if count > len(layers):
        raise CannotOptimize(
            f"router_layers={count} but the model has {layers_in_words(program)}",
            hint=f"choose router_layers between 1 and {len(layers)}",
        )
    builder = Builder(program)
    builder.copy_inputs()
    builder.part, builder.region = "router", quiet_region(program)
    inputs = dict(builder.env)
    prefix = clone(builder, [layers.residuals[count - 1]], inputs, _without_dropout)
    env = clone(
        builder,
        [program.head.hidden],
        {**prefix, layers.residuals[-1]: prefix[layers.residuals[count - 1]]},
        _without_dropout,
    )
    builder.part, builder.region = "main", Region()
    builder.copy_rest()
    routing = builder.routing(router_layers=count, router_hidden=env[program.head.hidden])
    return builder.finish("build_router", routing=routing)


def _without_dropout(builder: Builder[Analysed], node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The router's version of one node: dropout is the identity, attention has no dropout."""
    if node.target in _DROPOUTS:
        return env[node.args[0]]
    if node.target == aten.scaled_dot_product_attention.default:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda old: env[old])
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        kwargs = {name: arg for name, arg in kwargs.items() if name != "dropout_p"}
        return builder.copy_call(node, env, args=args, kwargs=kwargs)
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise CannotOptimize(
            f"the router would run the random operator {node.target}",
            node=node,
            hint="switch that randomness off in the model's configuration; only dropout can be left out of the router",
        )
    return None
