"""Which operators depend on *where in the sequence* a token stands, and so change their meaning on k of S tokens.

Layers may mix tokens in two ways. As a set: attention weighs every key by its content and by a mask or bias that is
gathered with the tokens, sums and maxima take all of them, sparse attention chooses the best of them; that is the same
on any subset. Or by place: convolutions, scans, shifts and blocks read the neighbour, and on the kept tokens the
neighbour is another one. The second kind is found by what an operator does to a dimension of the sequence's size: it
runs along it (`_ALONG`), fixes a place in it (`select`, an index), or makes it another size than S (padding, slicing,
blocks), which only reading by place needs. Causal attention and triangular masks depend on the order alone, which is
kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from cggr_compile.errors import Refusal
from cggr_compile.ir.program import Program, hint, is_tensor, value
from cggr_compile.torch_internals import symbols, tracing

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
    aten.conv_transpose1d: 1,
    aten.conv_transpose2d: 2,
    aten.conv_transpose3d: 3,
    aten.max_pool1d: 1,
    aten.avg_pool1d: 1,
    aten.max_pool2d: 2,
    aten.avg_pool2d: 2,
}
_STRIDES = {aten.as_strided, aten.unfold, aten._cudnn_rnn, aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu}
_TRIANGLES = {aten.tril: (0, -1), aten.triu: (0, 1)}  # diagonals that say before or after, and nothing about how far
CUTS = {aten.slice, aten.narrow}


class _Indexing(NamedTuple):
    """Where an operator that counts places has its indices among its arguments, and where the dimension that they
    count in (None: one index for each)."""

    indices: int
    dim: int | None


# Operators that read or write at given places.
_INDEXING: dict[Any, _Indexing] = {
    aten.index: _Indexing(1, None),
    aten.index_put: _Indexing(1, None),
    aten.gather: _Indexing(2, 1),
    aten.scatter: _Indexing(2, 1),
    aten.scatter_add: _Indexing(2, 1),
    aten.index_select: _Indexing(2, 1),
    aten.index_add: _Indexing(2, 1),
    aten.take_along_dim: _Indexing(1, 2),
}
_KEEPS_PLACES = {
    aten.slice,
    aten.softmax,
    aten._softmax,
    aten.log_softmax,
    aten.to,
    aten._to_copy,
    aten.dropout,
    aten.clone,
}
_KNOWN_NAMESPACES = ("aten", "prims")
# Operators that compute each token by itself or take tokens as a set, whatever the dimension; besides those that are
# pointwise, views, or above.
_SETS = {
    *(aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.any, aten.all),
    *(aten.prod, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.logsumexp, aten.linalg_vector_norm),
    *(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax, aten.layer_norm),
    *(aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm, aten.group_norm, aten.native_group_norm),
    *(aten.batch_norm, aten.native_batch_norm, aten.cdist, aten._cdist_forward, aten.glu),
    *(aten.mm, aten.bmm, aten.matmul, aten.addmm, aten.baddbmm, aten.linear, aten.dot, aten.mv, aten._grouped_mm),
    *(aten._scaled_mm, aten._trilinear, aten.scaled_dot_product_attention, aten.embedding, aten.bucketize),
    *(aten.searchsorted, aten.histc, aten.bincount, aten.nonzero, aten.masked_select, aten.argsort),
    *(aten.sort, aten.topk),
    *(aten.dropout, aten.native_dropout, aten.bernoulli, aten.arange, aten.full, aten.zeros, aten.ones, aten.empty),
    *(aten.rand, aten.randn, aten.randint, aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like),
    *(aten.rand_like, aten.randn_like, aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty, aten.eye),
    *(aten.empty_strided, aten.new_empty_strided, aten.scalar_tensor, aten.lift_fresh_copy, aten._to_copy, aten.copy),
    *(aten.clone, aten._unsafe_view, aten.repeat, aten.repeat_interleave, aten.stack, aten.split_with_sizes),
    *(aten.sym_size, aten.sym_numel, aten.sym_stride, aten._local_scalar_dense, aten._assert_async),
    *(aten._assert_tensor_metadata, aten._assert_scalar, aten.count_nonzero, aten.norm, aten.nansum, aten.isin),
    # Pointwise, and torch does not say so.
    *(aten.floor_divide, aten.hardswish, aten._prelu_kernel, aten.polar, aten.complex, aten.log_sigmoid_forward),
    *(aten.uniform, aten.normal, aten.exponential),
}
_WRITES = {aten.slice_scatter, aten.select_scatter}  # of another tensor at fixed places of the dimension in argument 2
# Operators that choose along a dimension by what is there, with the place of the dimension among their arguments; they
# return the chosen entries and where those are.
_CHOICES = {aten.topk: 2, aten.sort: 1}


def order_dependence(program: Program, node: fx.Node, inside: Collection[fx.Node]) -> Refusal | None:
    """Why the node's result at a token depends on the places of others, or None where it does not.

    `node` is a call of the captured graph, whose sizes still tell the sequence from everything else. `inside` is what
    will be computed on the kept tokens: places found there by content are places among them.
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
        return Refusal(f"what {target} does along the sequence is not known", node) if exact else None
    packet = target.overloadpacket
    if _padding(program, node) is not None:
        return None
    if packet in CUTS and not _keeps_all(program, node):
        return Refusal(f"{packet} takes fixed places of the sequence", node)
    if counts_tokens(program, node) and not all(_is_choice(program, index, inside) for index in indices_of(node)):
        return Refusal(f"{packet} takes places of the sequence by their number", node)
    if packet in _STRIDES:
        return Refusal(f"{packet} reads the sequence by place", node)
    if packet in _ALONG and _runs_along(program, node, *_ALONG[packet]):
        return Refusal(f"{packet} runs along the sequence", node)
    if packet in _WINDOWS:
        shape = value(node.args[0]).shape[-_WINDOWS[packet] :]
        kernel = value(node.args[1]).shape[2:] if is_tensor(node.args[1]) else ()
        if any(program.mentions(size, _symbol(program)) for size in shape) and any(
            size != 1 for size in kernel or (0,)
        ):
            return Refusal(f"{packet} reads neighbours along the sequence", node)
    if packet in _WRITES and _writes_along(program, node):
        return Refusal(f"{packet} writes to fixed places of the sequence", node)
    if packet == aten.constant_pad_nd and _pads_along(program, node):
        return Refusal(f"{packet} shifts or lengthens the sequence", node)
    if not _is_known(node):
        if target._can_decompose():
            return _of_parts(program, node, target, node.args, node.kwargs)
        return Refusal(f"what {packet} does along the sequence is not known", node)
    if packet in _TRIANGLES and (node.args[1] if len(node.args) > 1 else 0) not in _TRIANGLES[packet]:
        return Refusal(f"{packet} measures distances along the sequence", node)
    return None if _is_choice(program, node, inside) else _odd_size(program, node)


def _is_known(node: fx.Node) -> bool:
    """Whether the rules above say all of what an operator does along a dimension."""
    packet, returns = packet_of(node), node.target._schema.returns
    if packet in _SETS or any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads()):
        return True
    ruled = (_ALONG, _WINDOWS, _STRIDES, _TRIANGLES, CUTS, _INDEXING, _WRITES, {aten.constant_pad_nd})
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in returns)
    return is_view or any(packet in rule for rule in ruled)


def _writes_along(program: Program, node: fx.Node) -> bool:
    """Whether an operator of `_WRITES` writes to some places of the sequence and not to all."""
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    whole, part = value(node.args[0]).shape, value(node.args[1]).shape
    assert isinstance(given, int)
    if not program.mentions(whole[given], _symbol(program)):
        return False
    return packet_of(node) == aten.select_scatter or not program.same_size(whole[given], part[given])


def _pads_along(program: Program, node: fx.Node) -> bool:
    """Whether something is added to the sequence's dimension, or taken from it, on either side."""
    sizes, given = value(node.args[0]).shape, node.args[1]
    assert isinstance(given, (list, tuple))
    padded = [len(sizes) - 1 - place // 2 for place, number in enumerate(given) if number != 0]
    return any(program.mentions(sizes[dim], _symbol(program)) for dim in padded)


def packet_of(node: fx.Node) -> Any:
    """The operator without its overload, None where the node calls none."""
    return getattr(node.target, "overloadpacket", None)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a tensor is computed entry by entry."""
    return is_tensor(node) and torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_unrolled(program: Program, node: fx.Node) -> bool:
    """Whether the node reads every n-th token, as a scan does that is unrolled into one level for each power of two.

    How many levels there are is the whole sequence's, so that k tokens cannot go through them.
    """
    if packet_of(node) != aten.slice or len(node.args) < 5 or node.args[4] == 1:
        return False
    source, dim = node.args[:2]
    return isinstance(dim, int) and program.mentions(value(source).shape[dim], _symbol(program))


class _Padded(NamedTuple):
    """A dimension that holds the sequence and, in front or behind, constant places of no token (an attention sink)."""

    dim: int
    start: int


def indices_of(node: fx.Node) -> list[fx.Node]:
    """The indices that an operator of `_INDEXING` is given."""
    given: Any = node.args[_INDEXING[packet_of(node)].indices]
    return [index for index in given if index is not None] if isinstance(given, (list, tuple)) else [given]


def _is_choice(program: Program, node: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Whether a value of `inside` is what an operator chose of the sequence by content, or where that is; also in
    another form."""
    if node not in inside:
        return False
    packet = packet_of(node)
    if packet in _CHOICES:
        place, shape = _CHOICES[packet], value(node.args[0]).shape
        dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", -1)
        return isinstance(dim, int) and _is_sequence(program, shape[dim])
    keeps = node.target is operator.getitem or packet in _KEEPS_PLACES
    return keeps and all(_is_choice(program, source, inside) for source in node.all_input_nodes[:1])


def _padding(program: Program, node: fx.Node) -> _Padded | None:
    """Where the sequence lies in a value that such places were joined to, also behind operators that keep places."""
    if node.op != "call_function" or not is_tensor(node) or _odd_size(program, node) is None:
        return None
    packet, shape = packet_of(node), value(node).shape
    if packet == aten.cat:
        parts = _parts(node)
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)
        sizes = [value(part).shape[dim] for part in parts]
        places = [index for index, size in enumerate(sizes) if _is_sequence(program, size)]
        others = [size for size in sizes if isinstance(size, int)]
        constant = len(places) == 1 and len(others) == len(sizes) - 1
        return _Padded(dim, sum(sizes[: places[0]])) if constant else None
    if not is_pointwise(node) and packet not in _KEEPS_PLACES:
        return None
    alike = [s for s in node.all_input_nodes if is_tensor(s) and program.same_shape(value(s).shape, shape)]
    found = {_padding(program, source) for source in alike}
    return found.pop() if len(found) == 1 else None


def _keeps_all(program: Program, node: fx.Node) -> bool:
    """Whether a slice leaves every dimension with tokens as it is, or takes the sequence out of a padded one."""
    source, dim, start = (*node.args, 0, 0)[:3]
    before, after = value(source).shape, value(node).shape
    dim = dim % len(before)
    if not program.mentions(before[dim], _symbol(program)) or program.same_size(before[dim], after[dim]):
        return True
    padded = _padding(program, source)
    found = padded is not None and dim == padded.dim and start == padded.start
    return found and _is_sequence(program, after[dim])


def counts_tokens(program: Program, node: fx.Node) -> bool:
    """Whether an operator is given places in the sequence."""
    return packet_of(node) in _INDEXING and any(_is_sequence(program, size) for size in _indexed_sizes(node))


def _indexed_sizes(node: fx.Node) -> list[Any]:
    """Sizes of the dimensions that an indexing operator counts places in."""
    shape = value(node.args[0]).shape
    found = _INDEXING[node.target.overloadpacket]
    if found.dim is None:
        indices = node.args[found.indices]
        assert isinstance(indices, (list, tuple))
        return [size for size, index in zip(shape, indices, strict=False) if index is not None]
    given = node.args[found.dim] if len(node.args) > found.dim else None
    return [shape[given]] if isinstance(given, int) else list(shape)


def _runs_along(program: Program, node: fx.Node, place: int, default: Any) -> bool:
    parts = _parts(node) if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    if node.target == aten.cat.default and len(parts) < 2:
        return False
    first = parts[0]
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", node.kwargs.get("dims", default))
    dims = given if isinstance(given, (list, tuple)) else range(value(first).dim()) if given is None else [given]
    shape = value(first).shape
    return bool(len(shape)) and any(
        isinstance(dim, int)
        and program.mentions(shape[dim], _symbol(program))
        and not _flattened(program, node, shape[dim])
        for dim in dims
    )


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation joins: the empty vector that stands for nothing yet, in caches say, is none of it."""
    return [part for part in node.args[0] if tuple(value(part).shape) != (0,)]


def _flattened(program: Program, node: fx.Node, size: Any) -> bool:
    """Whether a concatenation joins whole blocks of flattened tokens, as statistics over layers do."""
    return node.target == aten.cat.default and not _is_sequence(program, size)


def _odd_size(program: Program, node: fx.Node) -> Refusal | None:
    """A dimension that mentions S and is not S, S times the batch, or a multiple of that."""
    for val in _tensors(node):
        for size in val.shape:
            if program.mentions(size, _symbol(program)) and not is_token_count(program, size):
                return Refusal(
                    f"a dimension of size {hint(size)} cuts, pads or splits the sequence of {hint(program.sequence)}",
                    node,
                )
    return None


def is_token_count(program: Program, size: Any) -> bool:
    """Whether a size is S, or a multiple of B · S: so many tokens, or so many for every token of the batch."""
    if _is_sequence(program, size):
        return True
    expression, sequence = program.expression(size), program.expression(program.sequence)
    batch = program.expression(program.batch)
    rest = (expression / (sequence * batch)).cancel()
    return bool(rest.is_Integer) and int(rest) >= 1


def _of_body(program: Program, node: fx.Node) -> Refusal | None:
    """Python arithmetic has no tensors; a `torch.autograd.Function` is what its forward's operators are."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if not any(_has_sequence(program, source) for source in node.all_input_nodes):
        return None
    if node.target is not torch.ops.higher_order.autograd_function_apply:
        return Refusal(f"what {node.target} does along the sequence is not known", node)
    forward, _, *inputs = node.args
    assert isinstance(forward, fx.Node)
    return _of_parts(program, node, getattr(program.root, str(forward.target)), inputs, {})


def _of_parts(
    program: Program, node: fx.Node, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Refusal | None:
    """The first refusal of the operators that a function is made of, called with a node's arguments."""
    given, spec = pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))
    values = [value(x) if isinstance(x, fx.Node) else x for x in given]
    places = [place for place, x in enumerate(given) if isinstance(x, fx.Node) and is_tensor(x)]

    def called(*tensors: torch.Tensor) -> Any:
        filled = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    aside = symbols.nothing_pending(program.shape_env)
    with program.fake_mode, program.shape_env.suppress_guards(), aside, tracing.enable_python_dispatcher():
        traced = make_fx(called, tracing_mode="real")(*(values[place] for place in places))
    inside = set(traced.graph.nodes)
    if any(inner.target is function for inner in inside):
        return Refusal(f"what {node.target} does along the sequence is not known", node)
    refusals = (order_dependence(program, inner, inside) for inner in traced.graph.nodes)
    return next((Refusal(f"in {node.target}: {found.reason}", node) for found in refusals if found), None)


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
