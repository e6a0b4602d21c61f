"""What a report says of a plan, as plain data, and how it is read off the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from cggr_compile.errors import Refusal
from cggr_compile.inspection.graph_text import GraphText
from cggr_compile.ir.cost import Cost
from cggr_compile.ir.dataflow import ancestors, descendants
from cggr_compile.ir.names import module_of
from cggr_compile.ir.program import Analysed, is_tensor, value
from cggr_compile.ir.router_head import describe
from cggr_compile.run.graph_memory import Pool
from cggr_compile.run.plan import Plan

aten = torch.ops.aten


@dataclass(frozen=True)
class Stack:
    """The layer stack: module path, number of layers, which proof found it, type of each residual."""

    path: str
    layers: int
    proof: str
    residual: str


@dataclass(frozen=True)
class Router:
    """The cut and what runs in front of it: `layers` of the stack, then `tail` (modules after the last layer) and the
    `head`, in words; `body` is how the products in front of the head are made. `parameters` counts
    distinct elements, all shared with the model; `flops_share` is of a plain forward."""

    layers: int
    cut: str
    cut_type: str
    tail: tuple[str, ...]
    parameters: int
    flops_share: float
    body: str
    head: str


@dataclass(frozen=True)
class HeadFacts:
    """The head, `linear(hidden, weight, bias) * scale / divisor`, soft-capped where `softcap` > 0, and the objective
    it is trained by; `tied` where its weight is also the token embedding."""

    objective: str
    label_shift: int
    reduction: str
    ignore_index: int
    weight: str
    weight_shape: tuple[int, ...]
    bias: bool
    scale: float
    divisor: float
    softcap: float
    tied: bool


@dataclass(frozen=True)
class Sizes:
    """The captured batch: rows, tokens a row, and rows kept once the warm-up is over."""

    batch: int
    sequence: int
    kept: int


def stack_of(plan: Plan, analysed: Analysed) -> Stack | None:
    layers = analysed.layers
    if layers is None:
        return None
    return Stack(layers.path, len(layers), layers.proof, GraphText(plan).shape(value(layers.residuals[0])))


def router_of(plan: Plan, analysed: Analysed, predicted: Cost) -> Router | None:
    routing = plan.program.routing
    if not routing.router_layers or analysed.layers is None or analysed.head is None:
        return None
    cut = analysed.layers.residuals[routing.router_layers - 1]
    assert routing.router_hidden is not None
    float8 = routing.quantized_router
    head = [node for node in (analysed.head.weight, analysed.head.bias) if node is not None]
    read = {node.name for node in ancestors([routing.router_hidden]) | ancestors(head) if node.op == "placeholder"}
    counted = read & _parameters(plan)
    return Router(
        layers=routing.router_layers,
        cut=cut.name,
        cut_type=GraphText(plan).shape(value(cut)),
        tail=_tail(analysed.layers.residuals[-1], analysed.head.hidden),
        parameters=sum(value(node).numel() for node in plan.captured.placeholders if node.name in counted),
        flops_share=predicted.router_share,
        body="exact body" if float8 is None else f"fp8 body ({float8})",
        head=describe(plan.owner.config, value(analysed.head.weight).shape[0]),
    )


def _parameters(plan: Plan) -> set[str]:
    """The captured inputs that are parameters of the model; where a function was compiled, all floating state."""
    model = plan.owner.model
    if model is None:
        state = (node for node in plan.captured.placeholders if plan.captured.kind(node) == "state")
        return {node.name for node in state if is_tensor(node) and value(node).is_floating_point()}
    paths = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    return {entry.name for entry in plan.captured.inputs if entry.path in paths}


def _tail(residual: fx.Node, hidden: fx.Node) -> tuple[str, ...]:
    """Modules that run between the last layer and the head, outermost name of each."""
    between = [n for n in ancestors([hidden], stop=[residual]) if n in descendants([residual], is_tensor)]
    paths = dict.fromkeys(module_of(node) for node in sorted(between) if module_of(node))
    return tuple(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))


def head_of(analysed: Analysed) -> HeadFacts:
    head = analysed.head
    sources = [node for node in ancestors([head.weight]) if node.op == "placeholder" and is_tensor(node)]
    embeddings = analysed.graph.find_nodes(op="call_function", target=aten.embedding.default)
    return HeadFacts(
        objective=head.objective,
        label_shift=head.shift,
        reduction=head.reduction,
        ignore_index=head.ignore_index,
        weight=" + ".join(analysed.path(node) for node in sources),
        weight_shape=tuple(int(size) for size in value(head.weight).shape),
        bias=head.bias is not None,
        scale=head.scale,
        divisor=head.divisor,
        softcap=head.softcap,
        tied=any(source in ancestors([node.args[0]]) for node in embeddings for source in sources),
    )


def compilations_of(plan: Plan) -> dict[str, int]:
    several = len(plan.owner.choices) > 1 or plan.owner.config.selection_scope == "global"
    return {
        name if several or name == "unrouted" else "routed": variant.compilations
        for name, variant in plan.variants.items()
    }


def outlined_of(plan: Plan) -> str:
    variants = list(plan.variants.values())
    outlines = [variant.outline for variant in variants if variant.outline is not None]
    if not plan.owner.config.outlines:
        return "off"
    if not outlines:
        return f"off: the {plan.inner} backend compiles nothing"
    pieces, compiled = sum(variant.pieces for variant in variants), sum(variant.bodies for variant in variants)
    reasons = dict.fromkeys(outline.reason for outline in outlines if isinstance(outline, Refusal))
    return "; ".join([f"{pieces} pieces, {compiled} compiled", *(f"not divided: {reason}" for reason in reasons)])


def cuda_graphs_of(plan: Plan, pool: Pool | None) -> str:
    if not plan.owner.config.cuda_graphs:
        return "off"
    variants = plan.variants.values()
    replays = [variant.replays for variant in variants if variant.replays is not None]
    obstacles = dict.fromkeys(text for each in replays for text in each.obstacles)
    recorded = f"{sum(each.recordings for each in replays)} recorded"
    copied = ["gradients copied: one was held over a step"] if pool is not None and pool.lending.copies else []
    return "; ".join([recorded, *copied, *(f"not recorded: {text}" for text in obstacles)])


def unpadded_of(plan: Plan) -> str | None:
    if not plan.owner.config.unpad:
        return None
    found = plan.unpadded
    if isinstance(found, Refusal):
        return f"nothing: {found.reason}"
    attention = f"{found.varlen} attentions of variable lengths" if found.varlen else "attention under a mask"
    return f"{found.batch}; {attention}"
