"""Which operators depend on *where in the sequence* a token stands, and so change their meaning on k of S tokens.

Layers may mix tokens in two ways. As a set: attention weighs every key by its content and by a mask or bias that is
gathered with the tokens, sums and maxima take all of them; that is the same on any subset. Or by place: convolutions,
scans, shifts and blocks read the neighbour, and on the kept tokens the neighbour is another one. The second kind is
found by what an operator does to a dimension of the sequence's size: it runs along it (`_ALONG`), fixes a place in it
(`select`, an index), or makes it another size than S (padding, slicing, blocks), which only reading by place needs.
Causal attention and triangular masks depend on the order alone, which is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cggr_compile.program import Program, is_tensor, value

aten = torch.ops.aten

# Operators that run along one dimension, with the place of the dimension among their arguments and its default.
_ALONG: dict[Any, tuple[int, Any]] = {
    aten.cumsum: (1, None),
    aten.cumprod: (1, None),
    aten.cummax: (1, None),
    aten.cummin: (1, None),
    aten.logcumsumexp: (1, None),
    aten.diff: (2, -1),
    aten.flip: (1, None),
    aten.select: (1, None),
    aten._fft_r2c: (1, None),
    aten._fft_c2r: (1, None),
    aten._fft_c2c: (1, None),
    aten.cat: (1, 0),
    aten.roll: (2, None),
}
# Convolutions and poolings of c spatial dimensions read the last c.
_WINDOWS = {
    aten.conv1d: 1,
    aten.conv2d: 2,
    aten.conv3d: 3,
    aten.max_pool1d: 1,
    aten.avg_pool1d: 1,
    aten.max_pool2d: 2,
    aten.avg_pool2d: 2,
}
_STRIDES = {aten.as_strided, aten.unfold, aten._cudnn_rnn, aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu}
_TRIANGLES = {aten.tril: (0, -1), aten.triu: (0, 1)}  # diagonals that say before or after, and nothing about how far
_KNOWN_NAMESPACES = ("aten", "prims")


def order_dependence(program: Program, node: fx.Node) -> str | None:
    """Why the node's result at a token depends on the places of others, or None where it does not.

    `node` is a call of the captured graph, whose sizes still tell the sequence from everything else.
    """
    if node.op != "call_function":
        return None
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return _of_body(program, node)
    tensors = [source for source in node.all_input_nodes if _has_sequence(program, source)]
    if not tensors and not _has_sequence(program, node):
        return None
    if target.namespace not in _KNOWN_NAMESPACES:
        exact = [
            d for source in (*tensors, node) for v in _tensors(source) for d in v.shape if _is_sequence(program, d)
        ]
        return f"what {target} does along the sequence is not known" if exact else None
    packet = target.overloadpacket
    if packet in _STRIDES:
        return f"{packet} reads the sequence by place"
    if packet in _ALONG and _runs_along(program, node, *_ALONG[packet]):
        return f"{packet} runs along the sequence"
    if packet in _WINDOWS:
        shape = value(node.args[0]).shape[-_WINDOWS[packet] :]
        kernel = value(node.args[1]).shape[2:] if is_tensor(node.args[1]) else ()
        if any(program.mentions(size, _symbol(program)) for size in shape) and any(
            size != 1 for size in kernel or (0,)
        ):
            return f"{packet} reads neighbours along the sequence"
    if packet in _TRIANGLES and (node.args[1] if len(node.args) > 1 else 0) not in _TRIANGLES[packet]:
        return f"{packet} measures distances along the sequence"
    return _odd_size(program, node)


def _runs_along(program: Program, node: fx.Node, place: int, default: Any) -> bool:
    first = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", node.kwargs.get("dims", default))
    dims = given if isinstance(given, (list, tuple)) else range(value(first).dim()) if given is None else [given]
    shape = value(first).shape
    return bool(len(shape)) and any(
        isinstance(dim, int)
        and program.mentions(shape[dim], _symbol(program))
        and not _flattened(program, node, shape[dim])
        for dim in dims
    )


def _flattened(program: Program, node: fx.Node, size: Any) -> bool:
    """Whether a concatenation joins whole blocks of flattened tokens, as statistics over layers do."""
    return node.target == aten.cat.default and not _is_sequence(program, size)


def _odd_size(program: Program, node: fx.Node) -> str | None:
    """A dimension that mentions S and is not S, S times the batch, or a multiple of that."""
    for val in _tensors(node):
        for size in val.shape:
            if program.mentions(size, _symbol(program)) and not is_token_count(program, size):
                return f"a dimension of size {program.expression(size)} cuts, pads or splits the sequence"
    return None


def is_token_count(program: Program, size: Any) -> bool:
    """Whether a size is S, or a multiple of B · S: so many tokens, or so many for every token of the batch."""
    if _is_sequence(program, size):
        return True
    expression, sequence = program.expression(size), program.expression(program.sequence)
    batch = program.expression(program.batch)
    rest = (expression / (sequence * batch)).cancel()
    return bool(rest.is_Integer) and int(rest) >= 1


def _of_body(program: Program, node: fx.Node) -> str | None:
    """Python arithmetic has no tensors; a `torch.autograd.Function` is what its forward's operators are."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if not any(_has_sequence(program, source) for source in node.all_input_nodes):
        return None
    if node.target is not torch.ops.higher_order.autograd_function_apply:
        return f"what {node.target} does along the sequence is not known"
    forward, _, *inputs = node.args
    assert isinstance(forward, fx.Node)
    body = getattr(program.root, str(forward.target))
    with program.fake_mode, program.shape_env.suppress_guards():
        traced = make_fx(body, tracing_mode="real")(*(value(source) for source in inputs))
    reasons = (order_dependence(program, inner) for inner in traced.graph.nodes)
    return next((f"in {node.target}: {reason}" for reason in reasons if reason), None)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    val = value(node)
    values = val if isinstance(val, (list, tuple)) else [val]
    return [item for item in values if isinstance(item, torch.Tensor)]


def _has_sequence(program: Program, node: fx.Node) -> bool:
    return any(program.mentions(size, _symbol(program)) for val in _tensors(node) for size in val.shape)


def _is_sequence(program: Program, size: Any) -> bool:
    return program.same_size(size, _symbol(program))


def _symbol(program: Program) -> torch.SymInt:
    assert isinstance(program.sequence, torch.SymInt)
    return program.sequence
