"""The order of gatherings in a graph of ATen's operators, and how inductor is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cggr_compile.passes.lower.unshard_parameters import prefetch_gathers
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from cggr_compile.torch_internals import inductor

_collectives, _aten = torch.ops._c10d_functional, torch.ops.aten
SIGNS = {_collectives.all_gather_into_tensor.default: "G", _collectives.wait_tensor.default: "w",
         _collectives.reduce_scatter_tensor.default: "R", _aten.mm.default: "."}  # fmt: skip


def backward(units: int, before_first: int = 1, scores: int | None = None) -> fx.Graph:
    """A backward as the partitioner leaves it: each unit is gathered where it is read, and its gradient is sent. In
    front of unit number `scores` something that was computed from the units so far is gathered."""
    graph = fx.Graph()
    x, *shards = [graph.placeholder(f"in{place}") for place in range(units + 1)]
    for _ in range(before_first):
        x = graph.call_function(_aten.mm.default, (x, x))
    sent = []
    for place, shard in enumerate(shards):
        if place == scores:
            x = _gathered(graph, x)
        whole = _gathered(graph, graph.call_function(_aten.cat.default, ([shard, shard],)))
        x = graph.call_function(_aten.mm.default, (x, whole))
        sent.append(graph.call_function(_collectives.reduce_scatter_tensor.default, (x, "sum", 2, "0")))
    graph.output([graph.call_function(_collectives.wait_tensor.default, (each,)) for each in sent])
    return graph


def _gathered(graph: fx.Graph, x: fx.Node) -> fx.Node:
    started = graph.call_function(_collectives.all_gather_into_tensor.default, (x, 2, "0"))
    return graph.call_function(_collectives.wait_tensor.default, (started,))


def order(graph: fx.Graph) -> str:
    return "".join(SIGNS.get(node.target, "") for node in graph.nodes)


def test_a_unit_is_gathered_while_the_one_before_computes() -> None:
    graph = backward(3)
    assert order(graph) == ".Gw.RGw.RGw.Rwww"
    prefetch_gathers(graph)
    graph.lint()
    assert order(graph) == ".GGw.RGw.Rw.Rwww"


def test_what_needs_the_unit_before_is_gathered_behind_it() -> None:
    graph = backward(3, scores=1)
    assert order(graph) == ".Gw.RGwGw.RGw.Rwww"
    prefetch_gathers(graph)
    graph.lint()
    assert order(graph) == ".Gw.RGGwGw.Rw.Rwww"


@given(st.integers(0, 6), st.integers(0, 2), st.integers(0, 5))
def test_what_is_computed_stays_the_same(units: int, before_first: int, scores: int) -> None:
    """Every operator has the arguments that it had, in front of it, and a second pass changes nothing."""
    graph = backward(units, before_first, scores)
    arguments = {node: node.args for node in graph.nodes}
    prefetch_gathers(graph)
    graph.lint()
    assert {node: node.args for node in graph.nodes} == arguments
    once = list(graph.nodes)
    prefetch_gathers(graph)
    assert list(graph.nodes) == once


class Own(CustomGraphPass):
    """A pass of the user's."""

    def __init__(self, seen: list[str], name: str | None) -> None:
        self.seen, self.name = seen, name

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append("own")

    def uuid(self) -> str | None:
        return self.name


@pytest.fixture
def own_pass() -> Iterator[Callable[[Own], None]]:
    before = torch._inductor.config.post_grad_custom_post_pass

    def use(own: Own) -> None:
        torch._inductor.config.post_grad_custom_post_pass = own

    yield use
    torch._inductor.config.post_grad_custom_post_pass = before


@pytest.mark.parametrize("name", ["first", None])
def test_a_pass_of_the_users_runs_too(own_pass: Callable[[Own], None], name: str | None) -> None:
    """What it says of itself is a part of what inductor's cache is asked for; if it says nothing, nothing is cached."""
    seen: list[str] = []
    own_pass(Own(seen, name))
    last = inductor.options({}, lambda graph: seen.append("last"))["post_grad_custom_post_pass"]
    last(fx.Graph())
    assert seen == ["own", "last"]
    assert (last.uuid() or [None])[0] == name


def test_without_gatherings_inductors_order_is_its_own() -> None:
    assert inductor.options({"f": "1"}, None) == {"unsafe_marked_cacheable_functions": {"f": "1"}}
