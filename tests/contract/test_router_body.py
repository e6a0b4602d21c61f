"""`router_body="fp8"` end to end: scores and rows of an eager router whose linears are quantised by hand, gradients as
eager's on those rows, what stays exact, and what is said about it."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import oracle
import plans
import pytest
import torch
import transformers as T
from architectures import ARCHITECTURES, COMMON, GROUPED, VOCABULARY, Architecture, build, eager_of, token_batch
from cggr_compile.kernels.op import fp8_linear
from cggr_compile.kernels.providers import PROVIDERS, Place, Provider
from torch import nn
from transformers.pytorch_utils import Conv1D

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Report
from cggr_compile.ir.names import operator_counts
from cggr_compile.ir.program import PART, Program, value

RATIO, LAYERS, DEEP = 0.4, 2, 5
OPTIONS = {"ratio": RATIO, "router_layers": LAYERS, "router_body": "fp8", "inner": "eager"}
Batch = dict[str, torch.Tensor]
# A score is a mean over 14 tokens of a log-sum-exp over the words of products of the width's length, all in fp32. Sums
# of float8 products are all but exact, so the layers in front of that add nothing.
CLOSE = oracle.rounding(14, VOCABULARY, COMMON["hidden_size"])


def rounded(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-30)  # a padding token's embedding is zero
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def quantise(module: nn.Linear | Conv1D) -> None:
    """Makes the module multiply in float8, in float64."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        if torch.is_autocast_enabled("cpu"):
            x, weight = x.bfloat16(), weight.bfloat16()
        result = rounded(x) @ rounded(weight).T
        bias = 0.0 if module.bias is None else module.bias.to(x.dtype).double()
        return (result + bias).to(x.dtype)

    module.forward = forward


def scores_by_hand(eager: nn.Module, architecture: Architecture, batch: Batch, fp8: bool = True) -> torch.Tensor:
    """The rows' mean losses by an eager router whose linears of sizes that 16 divides are quantised."""
    router = oracle.truncated(eager, architecture, LAYERS)
    for module in router.modules():
        linear = isinstance(module, (nn.Linear, Conv1D)) and module is not router.get_output_embeddings()
        if fp8 and linear and all(size % 16 == 0 for size in module.weight.shape):
            quantise(module)
    with torch.no_grad():
        logits = router(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    sums = oracle.token_scores(logits, batch["labels"], "loss", architecture.causal).sum(1)
    return sums / oracle.counted(batch["labels"], architecture.causal).clamp(min=1)


def hardest(scores: torch.Tensor, batch: Batch, causal: bool) -> list[int]:
    counted = oracle.counted(batch["labels"], causal) > 0
    order = torch.where(counted, scores, -math.inf).argsort(descending=True)
    return sorted(order[: math.ceil(RATIO * len(scores))].tolist())


def router_products(program: Program) -> list[torch.fx.Node]:
    target = torch.ops.cggr.fp8_linear.default
    graph = next(snapshot.graph for snapshot in program.snapshots if snapshot.name == "quantize_linears")
    return graph.find_nodes(op="call_function", target=target)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("llama", r"fp8 body \(14 of 14 products with weights\)"),
        ("gpt2", r"fp8 body \(8 of 8 products with weights\)"),
        ("bert", r"fp8 body \(13 of 13 products with weights\)"),
        (
            "qwen3_moe",
            r"fp8 body \(8 of 14 products with weights; exact: 2 × aten.linear by 4 × 32: no multiples of 16; "
            r"2 × cggr.grouped_mlp by 4 × 32 × 32: no linear; 2 × cggr.grouped_mlp by 4 × 32 × 16: no linear\)",
        ),
    ],
)
def test_rows_are_those_of_a_quantised_router_and_gradients_those_of_eager(name: str, body: str) -> None:
    architecture, eager = ARCHITECTURES[name], build(name)
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    for seed, shape in ((1, (9, 14)), (2, (6, 12))):
        batch = token_batch(*shape, seed=seed)
        loss, gradients = oracle.step(model, batch)
        scores = scores_by_hand(eager, architecture, batch)
        rows = hardest(scores, batch, architecture.causal)
        assert model.cggr.selected.tolist() == rows
        oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(batch, torch.tensor(rows))))
        torch.testing.assert_close(model.cggr.score(batch), scores, rtol=CLOSE, atol=0)
        exact = scores_by_hand(eager, architecture, batch, fp8=False)
        assert ((scores - exact) / exact).abs().nan_to_num().max() > 10 * CLOSE
    report = model.cggr.report()
    assert model.cggr.captures == 1
    assert re.fullmatch(body, report.router.body)
    assert report.router.body in model.cggr.diff().summary()
    assert report.router.body in " ".join(str(report).split())
    assert report.providers["fp8_linear"] == "reference"
    assert "scaled_mm: torch's fp8 product is for CUDA" in report.passed_over["fp8_linear"]
    program = model.cggr.runtime.plans[-1].program
    assert len(router_products(program)) == program.routing.quantized_router.made


def test_under_autocast_products_have_the_autocast_dtype_and_no_gradient_is_lost() -> None:
    architecture, eager, batch = ARCHITECTURES["gpt2"], build("gpt2"), token_batch(9, 14)
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        scores = model.cggr.score(batch)
        by_hand, exact = (scores_by_hand(eager, architecture, batch, fp8) for fp8 in (True, False))
        expected = eager(**oracle.rows_of(batch, model.cggr.selected)).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(scores, by_hand, rtol=CLOSE, atol=0)
    assert ((by_hand - exact) / exact).abs().nan_to_num().max() > 10 * CLOSE
    products = router_products(model.cggr.runtime.plans[-1].program)
    assert {value(node).dtype for node in products} == {torch.bfloat16}
    found = loss.detach(), oracle.gradients(model)
    oracle.assert_same_step(*found, expected.detach(), oracle.gradients(eager))


@pytest.mark.long
def test_products_keep_their_modules_and_regions() -> None:
    explained = cggr.explain(build("llama"), token_batch(), **OPTIONS)
    products = router_products(explained.program)
    assert {node.meta[PART] for node in products} == {"router"}
    rows = explained.diff().rows()
    added = [row.text for row in rows if row.mark == "+" and "cggr.fp8_linear[reference]" in row.text]
    assert len(added) == 14
    assert all("model.layers." in text for text in added)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"router_layers": 4}])
def test_outlined_layers_select_alike(options: dict[str, int]) -> None:
    config = T.LlamaConfig(**{**GROUPED, "num_hidden_layers": DEEP})
    eager = eager_of(Architecture("llama", lambda: T.LlamaForCausalLM(config), "model.layers"))
    whole = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, **options})
    pieces = {**OPTIONS, "inner": "aot_eager", "outline_layers": True, **options}
    outlined = cggr.optimize(copy.deepcopy(eager), **pieces)
    for seed in (1, 2):
        batch = token_batch(9, 14, seed=seed)
        expected, actual = oracle.step(whole, batch), oracle.step(outlined, batch)
        assert outlined.cggr.selected.tolist() == whole.cggr.selected.tolist()
        oracle.assert_same_step(*actual, *expected)
    variant = outlined.cggr.runtime.plans[-1].route.variant
    assert (variant.pieces, variant.bodies) == (DEEP + 1, 3)


@pytest.mark.long
def test_an_exact_body_has_no_pass_and_no_operator() -> None:
    explained = cggr.explain(build("llama"), token_batch(), **{**OPTIONS, "router_body": "exact"})
    report = explained.report()
    assert report.router.body == "exact body"
    assert "quantize_linears" not in report.passes
    assert "fp8_linear" not in report.providers
    fp8 = cggr.explain(build("llama"), token_batch(), **OPTIONS).report()
    assert fp8.cost == report.cost  # as many multiply-adds
    assert [name for name in fp8.passes if name != "quantize_linears"] == list(report.passes)
    around = [re.search(r"and (\d+) small nodes", " ".join(str(text).split()))[1] for text in (fp8, report)]
    assert around[0] == around[1]


class Merged(nn.Linear):
    """A linear whose weight is a table and a product of two others."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.down, self.up = (nn.Parameter(torch.randn(shape) / 8) for shape in ((16, inputs), (outputs, 16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down)


def test_products_of_weights_alone_stay_exact() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = Merged(32, 32)
    explained = cggr.explain(model, token_batch(), **OPTIONS)
    assert explained.report().router.body == "fp8 body (14 of 14 products with weights)"
    products = explained.program.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    parts = [node.meta[PART] for node in products if "self.up @ self.down" in node.meta["stack_trace"]]
    assert sorted(parts) == ["main", "router"]


def test_a_router_without_such_products_is_refused() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**GROUPED, **sizes})).train()
    message = (
        r"float8 can make none of the router's products with weights \(8 × aten.linear by 24 × 24: no multiples of 16; "
        r"4 × aten.linear by 40 × 24: .*leave router_body out"
    )
    with pytest.raises(cggr.CannotOptimize, match=f"(?s){message}"):
        cggr.explain(model, token_batch(), **OPTIONS)


def test_a_provider_that_cannot_run_is_refused(llama: tuple[nn.Module, Program]) -> None:
    with pytest.raises(cggr.CannotOptimize, match="provider 'scaled_mm' is unavailable on cpu"):
        plans.Routed(*llama, **OPTIONS, kernels={"fp8_linear": "scaled_mm"})


@pytest.mark.sample(2)
@pytest.mark.parametrize("route", ["token", "loss", ("sequence", "loss")])
def test_other_routes_score_their_tokens_with_it(
    llama: tuple[nn.Module, Program], route: str | tuple[str, ...]
) -> None:
    """In place of the exact body's operators, and of no others."""
    counts = []
    for body in ("fp8", "exact"):
        routed = plans.Routed(*llama, **{**OPTIONS, "router_body": body}, route=route)
        assert routed.step(token_batch())[0].isfinite()
        counts.append(operator_counts(routed.plan.program.graph))
    assert counts[0] - counts[1] == {"cggr.fp8_linear[reference]": 14}
    assert counts[1] - counts[0] == {"aten.linear": 14}


def test_every_provider_of_an_operator_is_reported(
    llama: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of one router may differ in what can make them."""

    def other_width(place: Place) -> str | None:
        return None if place.length == 48 else f"for 48 columns, not {place.length}"

    fast = Provider("fast", other_width, lambda: fp8_linear.fp8_linear)
    monkeypatch.setitem(PROVIDERS, "fp8_linear", {"fast": fast, "reference": PROVIDERS["fp8_linear"]["reference"]})
    report = Report.of(plans.Routed(*llama, **OPTIONS).runtime)
    assert report.providers["fp8_linear"] == "reference, fast"
    assert report.passed_over["fp8_linear"] == "fast: for 48 columns, not 32"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("fp16", "router_body='fp16'; valid values: exact, fp8"),
        ("exat", "router_body='exat', did you mean 'exact'. valid values: exact, fp8"),
        (None, "router_body=None; valid values: exact, fp8"),
    ],
)
def test_bad_options_say_what_to_do(body: Any, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(router_body=body)


@pytest.mark.gpu
@pytest.mark.sample(3)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_on_a_gpu_rows_are_ranked_as_by_hand(name: str, graphs: bool) -> None:
    """In bfloat16, compiled: scores as by hand but for one rounding, and a step that is eager's on its rows, both
    measured from fp32."""
    architecture, eager = ARCHITECTURES[name], build(name).cuda().bfloat16()
    precise = copy.deepcopy(eager).float()
    model = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, "inner": "inductor", "cuda_graphs": graphs})
    for seed in (1, 2, 3):
        batch = {key: tensor.cuda() for key, tensor in token_batch(9, 14, seed=seed).items()}
        loss, gradients = oracle.step(model, batch)
        on_cpu = {key: tensor.cpu() for key, tensor in batch.items()}
        by_hand, truth = (scores_by_hand(each.cpu(), architecture, on_cpu) for each in (eager, precise))
        allowed = (by_hand - truth).abs() + oracle.rounding(1, dtype=torch.bfloat16) * truth
        assert ((model.cggr.score(batch).cpu() - truth).abs() <= allowed).all()
        rows = oracle.rows_of(batch, model.cggr.selected)
        eagers, precises = oracle.step(eager.cuda(), rows), oracle.step(precise.cuda(), rows)
        oracle.assert_no_further((loss, gradients), eagers, precises, times=2)
    assert model.cggr.report().providers["fp8_linear"] == "scaled_mm"
