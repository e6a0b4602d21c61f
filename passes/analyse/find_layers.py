"""Finds the layer stack and proves that a single tensor leaves each layer.

The proof is dataflow and always the same: a tensor on *every* path from the token embedding to the head's input (a
cut vertex) is all that crosses at that point; whatever else later layers read cannot depend on the activations, so it
is loop-invariant (masks, rotary tables, sizes). What is computed in front of the first layer and read by every layer
(per-layer embeddings) is loop-invariant too: where module metadata names the layers, a tensor through which every path
from *their* nodes leads is a cut as well. Which cut vertices end a layer is read from module-stack metadata, or, where
that is missing or names a single module, from repetition: the longest run of equal segments between cuts.

Of an encoder and a decoder, the decoder's layers are cut: what the encoder makes of the input ids is loop-invariant to
them, since the decoder's embedding, of ids made from the labels, is not upstream of it.

Before::

    %add_4, %add_9, … on every path from the embedding to the head

After::

    layers: model.layers, 30; residuals: %add_4, %add_9, …
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import Refusal
from cggr_compile.ir.dataflow import ancestors, cut_vertices
from cggr_compile.ir.names import modules_of
from cggr_compile.ir.program import Analysed, Head, Layers, is_tensor, value
from cggr_compile.ir.roles import is_state

aten = torch.ops.aten


def find_layers(program: Analysed, config: RoutingConfig) -> Analysed:
    """Sets `layers`; where no stack can be proved, `no_layers`, which whatever needs a stack will raise."""
    found = _layers(program, config)
    if isinstance(found, Refusal):
        return dataclasses.replace(program, no_layers=found)
    return dataclasses.replace(program, layers=found)


def _layers(program: Analysed, config: RoutingConfig) -> Layers | Refusal:
    """The stack. Refused: no stack, a layer that more than one tensor leaves, or, on the token route, layers that run
    on other positions than those of the call."""
    hidden = program.head.hidden
    embeddings = _embeddings(program, program.head, config)
    if isinstance(embeddings, Refusal):
        return embeddings
    streams = [
        stream
        for carries in (_carries_tokens, _carries_rows)
        if (stream := _stream(program, hidden, embeddings, carries)) is not None
    ]
    if not streams:
        return Refusal(
            "the head's input does not depend on a token embedding",
            hidden,
            hint="pass input_ids; inputs_embeds alone cannot be routed",
        )
    layers = next((found for stream in streams if (found := _by_metadata(program, stream)) is not None), None)
    if layers is None:
        refusal = _misled(program, streams[-1])
        if refusal is not None:
            return refusal
        layers = next((found for stream in streams if (found := _by_repetition(program, stream)) is not None), None)
    if layers is None:
        return Refusal(
            "no layer stack: no equal blocks make up the graph between the embedding and the head",
            hidden,
            hint="the model needs at least two layers with one residual stream",
        )
    if "token" in config.routes and not _carries_tokens(program, layers.residuals[0]):
        return Refusal(
            "the layers run on other positions than the call's tokens",
            layers.residuals[0],
            hint="route whole sequences: route='sequence'",
        )
    return layers


@dataclass(frozen=True)
class _Stream:
    """An embedding, the cuts that lead from it to the head, and what is asked of a cut."""

    entry: fx.Node
    cuts: list[fx.Node]
    carries: Callable[[Analysed, fx.Node], bool]


def _stream(
    program: Analysed, hidden: fx.Node, embeddings: list[fx.Node], carries: Callable[[Analysed, fx.Node], bool]
) -> _Stream | None:
    """The embedding from which the most cuts that carry rows or tokens lead to the head; None without one."""
    streams = [
        _Stream(node, [cut for cut in cut_vertices(node, hidden) if carries(program, cut)], carries)
        for node in embeddings
        if carries(program, node)
    ]
    return max((stream for stream in streams if stream.cuts), key=lambda stream: len(stream.cuts), default=None)


def _embeddings(program: Analysed, head: Head, config: RoutingConfig) -> list[fx.Node] | Refusal:
    """The token embeddings that reach the head as numbers; where some embed ids that are made from the labels, those.
    Refused: tokens of a decoder would be dropped."""
    every = sorted(
        node
        for node in _stream_of(head.hidden)
        if node.target == aten.embedding.default and _carries_rows(program, node)
    )
    decoding = [embedding for embedding in every if _embeds_labels(program, embedding)]
    if decoding and len(decoding) < len(every) and "token" in config.routes:
        return Refusal(
            "the decoder's layers read the encoder's states, of which none belongs to a token of the decoder",
            decoding[0],
            hint="route an encoder-decoder model by sequences or by the tokens of its loss",
        )
    return decoding or every


def _embeds_labels(program: Analysed, embedding: fx.Node) -> bool:
    ids = ancestors([embedding.args[1]], through=is_tensor)
    return any(node.op == "placeholder" and program.path(node) == "labels" for node in ids)


def _stream_of(hidden: fx.Node) -> set[fx.Node]:
    """What reaches the head as numbers: a model in front whose output is compared, counted or indexed with, to cut the
    text into patches, say, is no part of the stream."""
    return ancestors([hidden], through=lambda node: isinstance(value(node), (tuple, list)) or _is_floating(node))


def _is_floating(node: fx.Node) -> bool:
    return is_tensor(node) and (value(node).is_floating_point() or value(node).is_complex())


def _carries_tokens(program: Analysed, node: fx.Node) -> bool:
    """Whether the tensor is floating and has a batch, a sequence and a further dimension, in any order."""
    if not is_tensor(node) or value(node).dim() < 3 or not value(node).is_floating_point():
        return False
    sizes = value(node).shape
    batch = {dim for dim, size in enumerate(sizes) if program.same_size(size, program.batch)}
    sequence = {dim for dim, size in enumerate(sizes) if program.same_size(size, program.sequence)}
    return bool(batch) and bool(sequence - batch)


def _carries_rows(program: Analysed, node: fx.Node) -> bool:
    """Whether the tensor is floating and has a batch and two further dimensions, in any order: positions that are not
    those of the call (prompts in front of them, latents) route sequences as well."""
    if not is_tensor(node) or value(node).dim() < 3 or not value(node).is_floating_point():
        return False
    return any(program.same_size(size, program.batch) for size in value(node).shape)


def _layer_indices(node: fx.Node) -> dict[tuple[str, ...], int]:
    """For each indexed container around the node: which of its members the node is in."""
    found: dict[tuple[str, ...], int] = {}
    for path in (tuple(path.split(".")) for path in modules_of(node)):
        for depth, component in enumerate(path):
            if component.isdigit():
                found.setdefault(path[:depth], int(component))
    return found


def _by_metadata(program: Analysed, stream: _Stream) -> Layers | None:
    placed, _ = _stacks(program, stream)
    hidden = stream.cuts[-1]
    found = {path: residuals for path, inside in placed.items() if (residuals := _residuals(inside, stream.cuts))}
    if not found:
        found = {
            path: residuals
            for path, inside in placed.items()
            if (residuals := _residuals(inside, _cuts_behind(program, inside, hidden, stream.carries)))
        }
    if not found:
        return None
    # A model without layer modules keeps one list for each part of a layer; the last part ends the layer.
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    most = max(len(residuals) for residuals in found.values())
    longest = [path for path, residuals in found.items() if len(residuals) == most]
    path = max(longest, key=lambda path: (order[found[path][-1]], -len(path)))
    return Layers(".".join(path), "metadata + single-residual cut", stream.entry, found[path])


def _stacks(program: Analysed, stream: _Stream) -> tuple[dict[tuple[str, ...], dict[fx.Node, int]], set[fx.Node]]:
    """The indexed containers with several members, most members first, and in which member each node is; and the nodes
    in front of the stream's last cut, of which alone they consist."""
    placed: dict[tuple[str, ...], dict[fx.Node, int]] = defaultdict(dict)
    upstream = ancestors([stream.cuts[-1]])
    for node in program.graph.nodes:
        if node in upstream:
            for container, index in _layer_indices(node).items():
                placed[container][node] = index
    streamed = _stream_of(stream.cuts[-1])
    members = {path: set(found.values()) for path, found in placed.items() if not streamed.isdisjoint(found)}
    stacks = sorted(
        (path for path, found in members.items() if len(found) > 1 and found == set(range(len(found)))),
        key=lambda path: (-len(members[path]), len(path)),
    )
    return {path: placed[path] for path in stacks}, upstream


def _misled(program: Analysed, stream: _Stream) -> Refusal | None:
    """Refuses a stack of named modules that no cuts end."""
    placed, upstream = _stacks(program, stream)
    for path, inside in placed.items():
        cutting = {inside[cut]: cut for cut in stream.cuts if cut in inside}
        refusal = _second_tensor(program, path, set(inside.values()), cutting)
        refusal = refusal or _uncut_majority(program, path, inside, upstream, stream.cuts)
        if refusal is not None:
            return refusal
    return None


def _residuals(placed: dict[fx.Node, int], cuts: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The last cut of each run through a member of a container, in the order of execution; a stack that runs again
    adds its layers again. Empty unless every member has one and they first run in the members' order."""
    runs = [(index, list(run)[-1]) for index, run in groupby((cut for cut in cuts if cut in placed), key=placed.get)]
    first = list(dict.fromkeys(index for index, _ in runs))
    return tuple(last for _, last in runs) if first == list(range(len(set(placed.values())))) else ()


def _cuts_behind(
    program: Analysed, placed: dict[fx.Node, int], hidden: fx.Node, carries: Callable[[Analysed, fx.Node], bool]
) -> list[fx.Node]:
    """The cuts of every path from the members' nodes: what is computed in front of the first member does not count."""
    inside = [node for node in placed if is_tensor(node) and node.op == "call_function"]
    return [cut for cut in cut_vertices(inside, hidden) if carries(program, cut)]


def _second_tensor(
    program: Analysed, path: tuple[str, ...], indices: set[int], cutting: dict[int, fx.Node]
) -> Refusal | None:
    """Refuses a stack whose layers are chained, but by more than one tensor."""
    missing = min(indices - set(cutting), default=None)
    if missing is None or len(cutting) > len(indices) // 2 or missing == max(indices):
        return None
    inside = [node for node in program.graph.nodes if _layer_indices(node).get(path) == missing]
    leaving = [
        node
        for node in inside
        if _carries_tokens(program, node) and any(_layer_indices(user).get(path) == missing + 1 for user in node.users)
    ]
    if len(leaving) < 2:
        return None
    names = " and ".join(f"%{node.name}" for node in leaving)
    return Refusal(
        f"{len(leaving)} tensors leave layer {missing} ({names}), so no single residual can be cut",
        leaving[-1],
        hint="only stacks with one residual stream can be routed",
    )


def _uncut_majority(
    program: Analysed, path: tuple[str, ...], placed: dict[fx.Node, int], upstream: set[fx.Node], cuts: list[fx.Node]
) -> Refusal | None:
    """Refuses numbered modules that run one after the other, read most parameters and are cut neither inside nor
    between two of them: they are the layers, and what repeats elsewhere is not."""
    ends = set(cuts)
    nodes = [node for node in program.graph.nodes if node in placed or node in ends]
    run = [placed[node] for node in nodes if node in placed]
    reading = [node for node in upstream if any(is_state(program, source) for source in node.all_input_nodes)]
    if run != sorted(run) or 2 * sum(node in placed for node in reading) <= len(reading):
        return None
    starts = [nodes.index(next(node for node in nodes if placed.get(node) == index)) for index in dict.fromkeys(run)]
    uncut = [nodes[there] for here, there in pairwise(starts) if ends.isdisjoint(nodes[here:there])]
    if not uncut:
        return None
    return Refusal(
        f"no single tensor leaves each layer of {'.'.join(path)}",
        uncut[0],
        hint="only stacks with one residual stream can be routed",
    )


def _by_repetition(program: Analysed, stream: _Stream) -> Layers | None:
    """The longest run of equal consecutive blocks of segments; a segment is what lies between two cuts.

    It ends where the repetition does, so that what is left of a block runs in front of it. What a block consists of is
    nowhere else: of layers A B A no two are blocks, even where a part of B is like one of A. It makes up most of the
    graph, and less than a block follows it on the same residual: of layers that differ, two norms in a row or equal
    attentions are no stack.
    """
    cuts = stream.cuts
    signatures = [_signature(program, before, after) for before, after in pairwise(cuts)]
    weights = [sum(count for _, count in signature) for signature in signatures]
    best: tuple[int, int, int, int] | None = None
    for period in range(1, len(signatures) // 2 + 1):
        run = 0
        for end in range(period, len(signatures) + 1):
            same = end < len(signatures) and signatures[end] == signatures[end - period]
            if same:
                run += 1
                continue
            repeats = run // period + 1
            first, start = end - period - run, end - repeats * period
            while start > first and weights[start + repeats * period - 1] == 0:
                start -= 1  # a conversion behind the last layer may look like one in front of the next
            weight = sum(weights[start : start + repeats * period])
            block = {signature for signature in signatures[start : start + period] if signature}
            elsewhere = block <= {*signatures[:first], *signatures[end:]}
            if repeats > 1 and not elsewhere and (best is None or weight > best[0]):
                best = (weight, start, period, repeats)
            run = 0
    if best is None:
        return None
    weight, start, period, repeats = best
    end = start + repeats * period
    shape = value(cuts[end]).shape
    behind = [
        w for w, cut in zip(weights[end:], cuts[end + 1 :], strict=True) if program.same_shape(value(cut).shape, shape)
    ]
    if 2 * weight <= sum(weights) or sum(behind) >= sum(weights[start : start + period]):
        return None
    residuals = tuple(cuts[start + period * (index + 1)] for index in range(repeats))
    return Layers("", "repetition + single-residual cut", stream.entry, residuals)


def _signature(program: Analysed, before: fx.Node, after: fx.Node) -> frozenset[tuple[str, int]]:
    """Which operators, with parameters of which shapes, lead from one cut to the next."""
    counted: Counter[str] = Counter()
    for node in ancestors([after], stop=[before]):
        if node.op != "call_function" or not is_tensor(node):
            continue
        shapes = [str(tuple(value(source).shape)) for source in node.all_input_nodes if is_state(program, source)]
        if shapes or node.target == aten.scaled_dot_product_attention.default:
            counted[f"{node.target} {' '.join(shapes)}"] += 1
    return frozenset(counted.items())
