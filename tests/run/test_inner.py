"""What the inner backend is given: a graph of numbers, and a key by which inductor's caches know it again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import sympy
import torch
from architectures import build, token_batch
from cggr_compile.kernels.op import fp8_linear
from cggr_compile.kernels.reference import rows as reference
from functorch.compile import make_boxed_func
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch._inductor.virtualized import V
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy
from toys import Toy, toy_batch
from transformers import LlamaConfig, LlamaForCausalLM

import cggr_compile as cggr
from cggr_compile.run import inner
from cggr_compile.torch_internals import inductor


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
    assert len(set(named.values())) == 1


def key_of(policies: list[CheckpointPolicy | None], regions: list[int]) -> dict[str, str]:
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for policy, region in zip(policies, regions, strict=True):
        value = graph.call_function(torch.ops.aten.sin.default, (value,))
        if policy is not None:
            value.meta.update(recompute=policy, ac_graph_id=region)
    graph.output(value)
    return inner._named_functions(torch.fx.GraphModule({}, graph))


def test_the_key_of_the_caches_holds_the_checkpoints_of_nodes() -> None:
    """A partitioner goes by them; no text of the graph holds them. How regions are numbered says nothing."""
    again, saved = CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE
    kinds = [([None, None], [0, 0]), ([again, again], [1, 1]), ([again, again], [1, 2]), ([again, saved], [1, 1])]
    keys = [key_of(*kind) for kind in kinds]
    assert all(first != second for first, second in combinations(keys, 2))
    assert key_of([again, again], [3, 7]) == keys[2]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("checkpoints_first", [False, True])
@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 0.5, "outline_layers": True}], ids=str)
def test_caches_do_not_mix_up_steps_with_and_without_checkpoints(
    options: dict[str, Any], checkpoints_first: bool
) -> None:
    """As two runs of one script, the second with gradient checkpointing turned on, or off."""
    batch = token_batch(8, 32)
    saved = {}
    with fresh_inductor_cache():
        for checkpointed in (checkpoints_first, not checkpoints_first):
            torch._dynamo.reset()
            model = build("llama")
            if checkpointed:
                model.gradient_checkpointing_enable()
            model = cggr.optimize(model, inner="inductor", **options)
            oracle.step(model, batch)  # the cache gets its entry with the backward
            saved[checkpointed] = oracle.saved_bytes(model, batch)
    assert saved[True] < saved[False] / 2


def test_the_key_of_the_caches_holds_the_kernels_of_attention() -> None:
    usual = key_of([None], [0])
    with sdpa_kernel(SDPBackend.MATH):
        assert key_of([None], [0]) != usual
    assert key_of([None], [0]) == usual


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_caches_do_not_mix_up_kernels_of_attention() -> None:
    """As runs of one script, the second with others of torch's kernels."""
    graph = torch.fx.Graph()
    given = [graph.placeholder(name) for name in "qkv"]
    graph.output((graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, tuple(given)),))
    module = torch.fx.GraphModule({}, graph)
    hits = []
    with fresh_inductor_cache():
        for kernels in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION]):
            counters.clear()
            inputs = [torch.randn(2, 2, 64, 8, requires_grad=True) for _ in given]
            with sdpa_kernel(kernels):
                inner.compile_static(module, inputs, "inductor")(*inputs)[0].sum().backward()
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 1]


def linear_module(rounded: bool) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    target = fp8_linear.fp8_linear if rounded else torch.ops.aten.linear.default
    graph.output((graph.call_function(target, (x, weight)),))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("name", ["inductor", "another"])
@pytest.mark.parametrize("rounded", [False, True])
def test_rows_are_held_where_products_are_in_float8(monkeypatch: pytest.MonkeyPatch, rounded: bool, name: str) -> None:
    """By inductor itself, whose cache is then asked for code that does; a backend that calls inductor is not told."""
    given = {}

    def backend(module: torch.fx.GraphModule, _: list[object], **arguments: Any) -> torch.fx.GraphModule:
        given.update(arguments, key=torch._inductor.config.unsafe_marked_cacheable_functions)
        return module

    held = rounded and name == "inductor"
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: backend)
    inner.compile_static(linear_module(rounded), [torch.ones(2, 16), torch.ones(16, 16)], name)
    assert given.get("inner_compile") is (inductor.compile_holding_rows if held else None)
    assert (given["key"].keys() >= inductor.ROWS_HELD.keys()) == held
    if name == "inductor":
        assert given["config_patches"]["unsafe_marked_cacheable_functions"] == given["key"]


@pytest.mark.parametrize(
    ("hint", "length", "strict", "own", "held"),
    [
        (ReductionHint.INNER, 2048, None, False, True),
        (ReductionHint.INNER, inductor.WHOLE_ROW, None, False, True),
        (ReductionHint.INNER, inductor.WHOLE_ROW + 1, None, False, False),
        (ReductionHint.INNER, 2048, 4, False, False),
        (ReductionHint.INNER, 2048, 4, True, True),
        (ReductionHint.OUTER, 2048, None, False, False),
        (ReductionHint.OUTER, 2048, None, True, True),
    ],
)
def test_which_rows_are_held(
    monkeypatch: pytest.MonkeyPatch, hint: ReductionHint, length: int, strict: int | None, own: bool, held: bool
) -> None:
    """Short ones, and what inductor holds by itself; its own choices are back behind it."""
    by_itself = staticmethod(lambda features, cooperative: own)
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", by_itself)
    features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(length))
    if strict is not None:  # torch 2.14 has it, and says None where sums may have any order
        features.strict_sum_rblock = lambda: strict

    def compile_fx_inner(*given: Any, **named: Any) -> tuple[Any, ...]:
        return V.choices.should_use_persistent_reduction(features, False), given, named

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_fx_inner)
    before = V.choices
    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        assert inductor.compile_holding_rows("graph", is_backward=True) == (held, ("graph",), {"is_backward": True})
    assert V.choices is before
    assert before.should_use_persistent_reduction(features, False) == own


@pytest.mark.gpu
@pytest.mark.parametrize("held", [False, True])
def test_kernels_that_round_read_their_rows_once(monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """In the forward and in the backward; without, inductor makes loops of some."""
    if not held:
        monkeypatch.setattr(inductor, "compile_holding_rows", compile_fx.compile_fx_inner)
    config = LlamaConfig(vocab_size=128, hidden_size=2048, intermediate_size=4096, num_hidden_layers=2,
                         num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    model = cggr.optimize(LlamaForCausalLM(config).cuda().bfloat16().train(), matmul="fp8")
    ids = torch.randint(0, 128, (2, 64), device="cuda")
    with fresh_inductor_cache():
        _, codes = run_and_get_code(lambda: model(input_ids=ids, labels=ids).loss.backward())
    kernels = [kernel for code in codes for kernel in code.split("async_compile.triton(")[1:]]
    of_rows = [kernel for kernel in kernels if "*fp8e4nv" in kernel and "ReductionHint.INNER" in kernel]
    assert len(of_rows) > 4
    assert all("triton_heuristics.persistent_reduction(" in kernel for kernel in of_rows) == held
