"""Leaves the layers behind the first `depth_layers` out of the step: what trains is the router, with its gradients.

As in `build_router`, the final hidden state with `residual[L-1]` replaced by `residual[n-1]` is the model of the first
n layers, with its final norm, its head and its loss. Parameters of the other layers are read by nothing, so they get
no gradient, and an optimiser passes them by.

Before::

    %add_3 = … layers 0–1 …, %add_9 = … layers 2–5 …, %norm = … the final norm of %add_9

After::

    %add_3 = … layers 0–1 …, %norm = … the final norm of %add_3
"""

from __future__ import annotations

import dataclasses

from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.dataflow import ancestors, clone, descendants
from cggr_compile.ir.names import modules_of
from cggr_compile.ir.program import Analysed, Layers
from cggr_compile.ir.roles import changes_of, is_state, main_roots


def truncate_layers(program: Analysed, config: RoutingConfig) -> Analysed:
    """The step of the first `config.depth_layers` layers, an int. Outputs that read other layers are not computed.

    Raises:
        CannotOptimize: there are no more layers, the loss or a change of state reads others than the last, or one
            that is left out changes state.
    """
    layers, count = program.stack, config.depth_layers
    if not isinstance(count, int) or count >= len(layers):
        raise CannotOptimize(
            f"depth_layers={count} and the model has {len(layers)} layers ({layers.path or 'found by repetition'})",
            hint=f"choose depth_layers between 1 and {len(layers) - 1}",
        )
    cut, last = layers.residuals[count - 1], layers.residuals[-1]
    left_out = descendants([cut]) - descendants([last]) - {cut}
    reads = {root: _first(ancestors([root], stop=[cut, last]) & left_out) for root in main_roots(program)}
    # What is made of parameters alone, as a penalty on them, is of the layers left out where their own are among these.
    own = _own_states(program, layers, count)
    for out in program.outputs:
        if isinstance(out, fx.Node) and reads[out] is None:
            reads[out] = _first(ancestors([out], stop=[cut, last]) & own)
    outputs = tuple(out if reads.get(out) is None else None for out in program.outputs)
    loss = program.outputs[program.loss_output]
    effects = [root for root in reads if root not in program.outputs and root not in left_out]
    # A parameter that only the layers left out read, once changed, does not change, nor does what they alone change.
    effects = [root for root in effects if not root.users or not left_out.issuperset(root.users)]
    effects = [root for root in effects if not _is_own(root, layers, count)]
    for root in (loss, *effects):
        if reads[root] is not None:
            raise CannotOptimize(
                "the loss, or a buffer that the forward changes, reads more of the layers than what the last one "
                "passes on",
                node=reads[root],
                hint="switch auxiliary losses (output_router_logits=False) and penalties on all layers off, or train "
                "without route='depth'",
            )
    kept_by_model = [program.outputs[index] for index in program.stored]
    changes = [change for change in changes_of(program) if change in effects or reads.get(change) is not None]
    for state in filter(None, (*changes, *kept_by_model)):
        if reads.get(state) is not None or any(_behind(state, layers, count)):
            raise CannotOptimize(
                "a layer that does not train yet changes state of the model's",
                node=state,
                hint="train without route='depth', or use layers that keep no statistics and count nothing",
            )
    builder = Builder(program)
    builder.copy_inputs()
    inputs = dict(builder.env)
    prefix = clone(builder, [cut], inputs)
    roots = [*effects, *(out for out in outputs if isinstance(out, fx.Node))]
    builder.env = clone(builder, roots, {**prefix, last: prefix[cut]})
    builder.output(fx.map_arg(outputs, lambda old: builder.env[old]))
    residuals = tuple(builder.env[residual] for residual in layers.residuals[:count])
    kept = dataclasses.replace(layers, entry=builder.env[layers.entry], residuals=residuals)
    return builder.finish("truncate_layers", layers=kept)


def _own_states(program: Analysed, layers: Layers, count: int) -> set[fx.Node]:
    """Parameters and buffers of the layers behind the first `count` alone: by their paths, where modules tell the
    layers, else what these read and no earlier one does."""
    cut, last = layers.residuals[count - 1], layers.residuals[-1]
    states = {node for node in program.placeholders if is_state(program, node)} - ancestors([cut])
    if layers.path:
        return {node for node in states if program.path(node).startswith(_left_out(layers, count))}
    return states & ancestors([last], stop=[cut])


def _left_out(layers: Layers, count: int) -> tuple[str, ...]:
    """How the paths of what belongs to the layers behind the first `count` begin."""
    return tuple(f"{layers.path}.{index}." for index in range(count, len(layers)))


def _is_own(state: fx.Node, layers: Layers, count: int) -> bool:
    """Whether modules tell that layers behind the first `count` make a new value of the model's state by themselves."""
    behind = _behind(state, layers, count) if layers.path else []
    return bool(behind) and all(behind)


def _behind(state: fx.Node, layers: Layers, count: int) -> list[bool]:
    """Of each node that makes a new value of the model's state, whether it was traced in a layer behind the first
    `count`, whatever it reads; where modules do not tell the layers, whether it is in their place. (Clones in front of
    what was in place belong to no module.)"""
    nodes = [node for node in ancestors([state]) if node.op != "placeholder"]
    if not layers.path:
        return [layers.residuals[count - 1] < node < layers.residuals[-1] for node in nodes]
    left_out = _left_out(layers, count)
    modules = filter(None, map(modules_of, nodes))
    return [any(f"{path}.".startswith(left_out) for path in paths) for paths in modules]


def _first(nodes: set[fx.Node]) -> fx.Node | None:
    return min(nodes, default=None)
