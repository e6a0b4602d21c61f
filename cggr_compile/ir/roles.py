"""What passes and plans ask of a program: its token ids, the layers that route, what the main pass must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.program import PART, TRAINED_PARTS, Analysed, Autocast, Program, Region, value
from cggr_compile.torch_internals.distributed import Ranks, all_ranks

aten = torch.ops.aten
PADDING = "attention_mask"
"""The argument that is 0 at padding."""


def router_layers(config: RoutingConfig, layers: int) -> int:
    """Layers the router runs: the configured number, or max(2, L // 8), at most L - 1 and at least 1."""
    if isinstance(config.router_layers, int):
        return config.router_layers
    return max(1, min(max(2, layers // 8), layers - 1))


def ranks_of(config: RoutingConfig) -> Ranks | None:
    """The ranks that select together, where they do."""
    return all_ranks() if config.selection_scope == "global" else None


def quiet_region(program: Analysed) -> Region:
    """No gradients; under the caller's autocast, no weight cache either."""
    device = value(program.head.weight).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return Region(grad=False)
    return Region(False, (Autocast(device, torch.get_autocast_dtype(device), True, False),))


def layers_in_words(program: Analysed) -> str:
    """How many layers a program has, where they are, and whether they are but the first of the model's."""
    cut = any(snapshot.name == "truncate_layers" for snapshot in program.snapshots)
    count, where = len(program.stack), program.stack.path or "found by repetition"
    return f"{count} layers that train first, by depth_layers ({where})" if cut else f"{count} layers ({where})"


def middle_layers(program: Analysed, config: RoutingConfig) -> range:
    """The layers that run on the kept tokens.

    Raises:
        CannotOptimize: none is left between the first and the last layers.
    """
    middle = range(config.first_layers, len(program.stack) - config.last_layers)
    if not middle:
        raise CannotOptimize(
            f"first_layers={config.first_layers} and last_layers={config.last_layers} leave none of the "
            f"{layers_in_words(program)} to run on fewer tokens",
            hint="lower them, or choose another route",
        )
    return middle


def token_ids(program: Program) -> fx.Node:
    """The placeholder of the token ids [B, S]."""
    return next(node for node in program.placeholders if is_token_argument(program, node))


def token_argument(program: Program, path: str) -> fx.Node | None:
    """The placeholder of an argument of that name, integers or booleans [B, S]; None where there is no such one."""
    found = (node for node in program.placeholders if program.path(node) == path)
    return next((node for node in found if is_token_argument(program, node)), None)


def is_token_argument(program: Program, node: fx.Node) -> bool:
    """Whether a node is an argument of the call, integers or booleans [B, S]."""
    return node.op == "placeholder" and program.kind(node) == "batch" and is_by_token(program, value(node))


def is_by_token(program: Program, val: Any) -> bool:
    """Whether a value is an integer or boolean tensor [B, S]."""
    return has_tokens(program, val) and not val.is_floating_point()


def has_tokens(program: Program, val: Any) -> bool:
    """Whether a value is a tensor [B, S]."""
    if not isinstance(val, torch.Tensor) or val.dim() != 2:
        return False
    shape = (program.batch, program.sequence)
    return all(program.same_size(size, wanted) for size, wanted in zip(val.shape, shape, strict=True))


def is_state(program: Program, node: fx.Node) -> bool:
    """Whether a node is a parameter or buffer of the model."""
    return node.op == "placeholder" and program.kind(node) == "state"


def changes_of(program: Program) -> list[fx.Node]:
    """The nodes that write into inputs of the graph: what a forward changes in place, as batch norm its statistics."""
    copies = program.graph.find_nodes(op="call_function", target=aten.copy_.default)
    return [node for node in copies if node.args[0].op == "placeholder"]


def main_roots(program: Analysed) -> list[fx.Node]:
    """What the main pass must compute: the outputs, and nodes that act by side effect."""
    outputs = [out for out in program.outputs if isinstance(out, fx.Node)]
    effects = [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta[PART] in TRAINED_PARTS and node.is_impure()
    ]
    return outputs + effects
