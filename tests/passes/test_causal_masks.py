"""Masks proved causal: index functions against the tensors themselves, the pass against transformers in eager mode."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import numpy
import oracle
import pytest
import sympy
import torch
from architectures import ARCHITECTURES, build, token_batch
from cggr_compile.passes.rewrite.elide_causal_masks import argument, reach
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Routed
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Report
from cggr_compile.ir.index_functions import IndexFunction, IndexFunctions, axis

Mask = Callable[[Tensor], Tensor]
# A mask is traced for each example.
EXAMPLES = 8 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else 100
SIZES = ((1, 1), (2, 1), (1, 4), (2, 5), (3, 7))


def index_function(mask: Mask) -> IndexFunction | None:
    """The index function of what `mask` returns, traced once with symbolic sizes."""
    traced = make_fx(mask, tracing_mode="symbolic", pre_dispatch=True)(torch.empty(4, 6))
    (placeholder,) = traced.graph.find_nodes(op="placeholder")
    (result,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    return IndexFunctions(placeholder.meta["val"].shape[0].node.shape_env).of(result)


def indices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch [B, 1, 1, 1], query [1, 1, S, 1] and key [1, 1, 1, S], as transformers makes them."""
    batch, length = x.shape
    return (
        torch.arange(batch)[:, None, None, None],
        torch.arange(length)[None, None, :, None],
        torch.arange(length)[None, None, None, :],
    )


@st.composite
def numbers(draw: st.DrawFn, depth: int = 2) -> Mask:
    """A tensor of integers that depends on indices."""
    kind = draw(
        st.sampled_from(["leaf", "leaf", "add", "sub", "abs", "scale", "diff", "read", "cumsum"] if depth else ["leaf"])
    )
    if kind == "leaf":
        which = draw(st.integers(0, 2))
        return lambda x: indices(x)[which]
    c = draw(st.integers(-3, 3))
    inner = draw(numbers(depth - 1))
    if kind == "add":
        return lambda x: inner(x) + c
    if kind == "sub":
        other = draw(numbers(depth - 1))
        return lambda x: inner(x) - other(x)
    if kind == "abs":
        return lambda x: inner(x).abs()
    if kind == "scale":
        return lambda x: c * inner(x)
    if kind == "diff":
        return lambda x: steps(x)[:, None, None, :] + inner(x)
    if kind == "cumsum":
        return lambda x: (steps(x) != 1).cumsum(-1)[:, None, None, :]
    along = draw(st.integers(1, 2))
    return lambda x: positions(x)[indices(x)[0], indices(x)[along]] + inner(x)


def positions(x: Tensor) -> Tensor:
    """Position ids [B, S] as transformers makes them where none are given."""
    return (torch.arange(x.shape[1]) + 0).unsqueeze(0).expand(x.shape[0], -1)


def steps(x: Tensor, first: int = 1) -> Tensor:
    """How far the positions go from one to the next, [B, S]."""
    return torch.diff(positions(x), prepend=positions(x)[:, :1] - first, dim=-1)


@st.composite
def masks(draw: st.DrawFn, depth: int = 3) -> Mask:
    """A boolean tensor that depends on indices."""
    kind = draw(st.sampled_from(["compare", "causal", "causal", "and", "and", "or", "not", "cast", "tril"]))
    if kind == "causal" or not depth:
        c = draw(st.sampled_from([0, 0, 0, 1, -1]))
        return lambda x: indices(x)[2] <= indices(x)[1] + c
    if kind == "compare":
        relation = draw(st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne]))
        left, right = draw(numbers()), draw(numbers() | st.integers(-3, 3).map(lambda c: lambda x: c))
        return lambda x: relation(left(x), right(x))
    inner = draw(masks(depth - 1))
    if kind == "not":
        return lambda x: ~inner(x)
    if kind == "cast":
        return lambda x: x.new_ones((), dtype=torch.bool) & inner(x).to(dtype=torch.bool)
    if kind == "tril":
        side, diagonal = draw(st.sampled_from([torch.tril, torch.triu])), draw(st.integers(-2, 2))
        return lambda x: side(inner(x).expand(x.shape[0], 1, x.shape[1], x.shape[1]), diagonal)
    other = draw(masks(depth - 1))
    return (lambda x: inner(x) & other(x)) if kind == "and" else (lambda x: inner(x) | other(x))


def whole(mask: Mask) -> Mask:
    return lambda x: mask(x).expand(x.shape[0], 1, x.shape[1], x.shape[1])


def elements(function: IndexFunction, shape: torch.Size) -> Tensor:
    """The tensor that a function describes."""
    places = [axis(dim) for dim in range(len(shape))]
    found = sympy.lambdify(places, function.element, "numpy")(*numpy.indices(shape))
    return torch.from_numpy(numpy.array(numpy.broadcast_to(found, shape), dtype=bool))


@settings(max_examples=EXAMPLES)
@given(mask=masks())
def test_an_index_function_is_the_mask_at_every_size(mask: Mask) -> None:
    function = index_function(whole(mask))
    assert function is not None
    for sizes in SIZES:
        actual = whole(mask)(torch.empty(sizes))
        assert torch.equal(elements(function, actual.shape), actual), (function, sizes)
    # A mask called causal is; the sizes exceed every constant that the strategy draws.
    tril = torch.ones(23, 23, dtype=torch.bool).tril()
    if reach(function) is sympy.oo:
        assert torch.equal(whole(mask)(torch.empty(2, 23)), tril.expand(2, 1, 23, 23))


@settings(max_examples=EXAMPLES)
@given(bounds=st.lists(st.tuples(st.booleans(), st.integers(-2, 30)), min_size=1, max_size=4), swapped=st.booleans())
def test_conditions_on_the_distance_are_decided_exactly(bounds: list[tuple[bool, int]], swapped: bool) -> None:
    def mask(x: Tensor) -> Tensor:
        _, query, key = indices(x)
        result = torch.ones((), dtype=torch.bool)
        for ahead, c in bounds:
            near = (query >= key - c if swapped else key <= query + c) if ahead else query - key < c
            result = result & near
        return result

    function = index_function(whole(mask))
    assert function is not None
    seen = reach(function)
    for length in (5, 40):
        expected = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
        same = torch.equal(whole(mask)(torch.empty(2, length)), expected)
        assert same == (seen is not None and length <= seen + 1)


def test_what_is_not_known_stays_unknown() -> None:
    def of_data(x: Tensor) -> Tensor:
        return (indices(x)[2] <= indices(x)[1]) & (x > 0)[:, None, None, :]

    def chunked(x: Tensor) -> Tensor:
        return indices(x)[2] // 3 == indices(x)[1] // 3

    def out_of_range(x: Tensor) -> Tensor:
        return positions(x)[indices(x)[0], indices(x)[2] - 1] <= indices(x)[1]

    def jumping(x: Tensor) -> Tensor:
        return steps(x, first=2)[:, None, None, :] <= indices(x)[1]

    def counted(x: Tensor) -> Tensor:
        return (steps(x) != 2).cumsum(-1)[:, None, None, :] <= indices(x)[1]

    for mask in (of_data, chunked, out_of_range, jumping, counted):
        assert index_function(whole(mask)) is None


def test_causality_needs_no_batch_and_no_head() -> None:
    batch, query, key = axis(0), axis(2), axis(3)
    sizes = (2, 1, 5, 5)
    assert reach(IndexFunction(sizes, key <= query)) is sympy.oo
    assert reach(IndexFunction(sizes, (key <= query) & (query < key + 3))) == 2
    assert reach(IndexFunction(sizes, key <= query + batch)) is None
    assert reach(IndexFunction(sizes, key < query)) is None
    assert reach(IndexFunction(sizes, query < key + 3)) is None


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "padded"), [("llama", False), ("gemma3", False), pytest.param("llama", True, marks=pytest.mark.long)]
)
def test_attention_without_a_mask_is_that_of_transformers_in_eager_mode(name: str, padded: bool) -> None:
    model = build(name)
    eager = copy.deepcopy(model)
    batch = token_batch(masked=padded)
    cggr.optimize(model, ratio=0.5, selection="random", seed=0)
    loss, gradients = oracle.step(model, batch)
    program = model.cggr.runtime.plans[0].program
    operator = torch.ops.aten.scaled_dot_product_attention.default
    attentions = program.graph.find_nodes(op="call_function", target=operator)
    causal = [node for node in attentions if argument(node, "is_causal")]
    assert program.routing.causal_attentions == len(causal)
    assert all(argument(node, "attn_mask") is None and argument(node, "enable_gqa") for node in causal)
    # Every layer of the tiny Gemma 3 has a window.
    assert (len(causal), len(attentions)) == (3 if name == "llama" and not padded else 0, 3)
    rows = oracle.rows_of(batch, model.cggr.selected)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, rows))
    without = Routed(model, model.cggr.runtime.plans[0].captured, disable_passes=("elide_causal_masks",))
    report = Report.of(without.runtime)
    assert "elide_causal_masks" in model.cggr.report().passes
    assert ("elide_causal_masks" in report.passes, report.causal_attentions) == (False, 0)


def test_a_window_that_hides_nothing_needs_no_mask() -> None:
    """One capture for lengths within the window, one for those beyond; each is eager's step, up to SDPA's kernels."""
    model = oracle.truncated(build("mistral"), ARCHITECTURES["mistral"], 2)
    for module in (model, model.model):
        module.config.sliding_window = 6
    eager = copy.deepcopy(model)
    cggr.optimize(model, ratio=0.5, selection="random", seed=0)
    for length, captures, causal in ((5, 1, 2), (4, 1, 2), (9, 2, 0), (5, 2, 0), (7, 2, 0)):
        batch = token_batch(6, length, masked=False)
        loss, gradients = oracle.step(model, batch)
        plans = model.cggr.runtime.plans
        assert (len(plans), plans[-1].program.routing.causal_attentions) == (captures, causal), length
        rows = oracle.rows_of(batch, model.cggr.selected)
        oracle.assert_same_step(loss, gradients, *oracle.step(eager, rows), rtol=1e-4, atol=1e-6)


def padding_mask(ids: Tensor, mask: Tensor) -> Tensor:
    """Causal and no padding, as transformers writes it, and a model that flattens the mask first."""
    batch, query, key = indices(ids)
    return (key <= query) & mask.view(ids.shape[0], -1).to(torch.bool)[batch, key]


def packing_mask(ids: Tensor, positions: Tensor) -> Tensor:
    batch, query, key = indices(ids)
    placed = positions.expand(ids.shape[0], -1)
    return (placed[batch, key] <= placed[batch, query]) & (placed[batch, query] < placed[batch, key] + 2)


@pytest.mark.parametrize("mask", [padding_mask, packing_mask])
def test_what_is_computed_of_named_inputs_is_an_expression_of_their_elements(
    mask: Callable[[Tensor, Tensor], Tensor],
) -> None:
    ids, given = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6, dtype=torch.int64)
    traced = make_fx(lambda x, y: whole(lambda x: mask(x, y))(x), tracing_mode="symbolic", pre_dispatch=True)(
        ids, given
    )
    first, second = traced.graph.find_nodes(op="placeholder", sort=True)
    (result,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    shape_env = first.meta["val"].shape[0].node.shape_env
    assert IndexFunctions(shape_env).of(result) is None
    function = IndexFunctions(shape_env, {"given": second}).of(result)
    assert function is not None
    for rows, length in ((4, 6), (2, 9)):
        ids = torch.zeros(rows, length, dtype=torch.int64)
        given = torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(0))
        actual = mask(ids, given).expand(rows, 1, length, length)
        element = sympy.lambdify(
            [axis(dim) for dim in range(4)],
            function.element,
            [{"given": lambda *at, given=given: given[at].numpy()}, "numpy"],
        )
        assert torch.equal(torch.from_numpy(element(*numpy.indices(actual.shape))), actual)
