"""What the inner backend is given: a graph of numbers, and a key by which inductor's caches know it again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import oracle
import pytest
import torch
from cggr_compile.kernels.reference import rows as reference
from functorch.compile import make_boxed_func
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.run import inner


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_a_later_process_is_served_from_inductors_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second compilation stands for another process: Dynamo starts anew and only the disk is shared.
    Artifacts of other sources do not fit."""
    torch.manual_seed(0)
    eager, batch = Toy(), toy_batch()

    def step() -> tuple[dict[str, int], dict[str, torch.Tensor | None]]:
        torch._dynamo.reset()
        counters.clear()
        model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="inductor")
        model(**batch)[0].backward()
        return dict(counters["inductor"]) | dict(counters["aot_autograd"]), oracle.gradients(model)

    with fresh_inductor_cache():
        cold, expected = step()
        assert cold["autograd_cache_miss"] == 1
        assert not [name for name in cold if name.endswith("cache_bypass")]
        warm, actual = step()
        assert warm["autograd_cache_hit"] == 1
        assert "fxgraph_cache_miss" not in warm
        oracle.assert_same_gradients(actual, expected)
        monkeypatch.setattr(inner, "_fingerprint", lambda: "other sources")
        other, _ = step()
        assert other["autograd_cache_miss"] == 1


def test_no_size_is_a_symbol() -> None:
    """A symbolic size of a weight costs time in every kernel, and more while they are compiled."""
    sizes = []

    def compile_part(gm: torch.fx.GraphModule, _: list[object]) -> Callable[..., object]:
        values = [node.meta["val"] for node in gm.graph.nodes if "val" in node.meta]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        sizes.extend(value for value in values if isinstance(value, (int, torch.SymInt)))
        sizes.extend(size for tensor in tensors for size in (*tensor.shape, *tensor.stride()))
        return make_boxed_func(gm.forward)

    register_backend(aot_autograd(fw_compiler=compile_part), "parts")
    model = cggr.optimize(Toy(), ratio=0.5, selection="random", inner="parts")
    model(**toy_batch())[0].backward()
    assert sizes
    assert not [size for size in sizes if not isinstance(size, int)]


def test_the_key_of_the_caches_holds_the_sources_of_what_a_graph_names() -> None:
    """A graph names our operators and functions; what they do is in their sources."""

    def another(x: torch.Tensor) -> torch.Tensor:
        return x

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(another, (graph.call_function(reference.score, (x,)),)))
    named = inner._named_functions(torch.fx.GraphModule({}, graph))
    assert set(named) == {"cggr_compile", "cggr_compile.kernels.reference.rows.score"}
    assert set(named.values()) == {inner._fingerprint()}
