"""`matmul="fp8"` end to end: steps are those of an eager model whose linears are in float8 (`fp8_oracle`), to the bit;
what stays exact, and what is said about it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import fp8_oracle
import oracle
import plans
import pytest
import segment_oracle
import token_oracle
import torch
import torch.nn.functional as F
import transformers as T
from architectures import ARCHITECTURES, GROUPED, Architecture, build, eager_of, token_batch
from torch import nn
from toys import WIDTH, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.names import operator_counts
from cggr_compile.ir.program import PART, TRAINED_PARTS, Program

OPTIONS: dict[str, Any] = {"matmul": "fp8", "router_layers": 2, "inner": "eager"}
LLAMA, DEEP = ARCHITECTURES["llama"], 4
LINEAR = torch.ops.cggr.fp8_linear.default
Captured = tuple[nn.Module, Program]


def products(program: Program) -> int:
    """Products in float8 of the parts that train."""
    graph = next(snapshot.graph for snapshot in program.snapshots if snapshot.name == "quantize_linears")
    found = graph.find_nodes(op="call_function", target=LINEAR)
    return sum(node.meta[PART] in TRAINED_PARTS for node in found)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("llama", "21 of 21 products with weights"),
        ("gpt2", "12 of 12 products with weights"),
        (
            "mixtral",
            "12 of 21 products with weights; exact: 3 × aten.linear by 4 × 32: no multiples of 16; "
            "3 × cggr.grouped_mlp by 4 × 96 × 32: no linear; 3 × cggr.grouped_mlp by 4 × 32 × 48: no linear",
        ),
        ("gemma3", "21 of 21 products with weights"),
        ("bert", "19 of 19 products with weights"),
    ],
)
def test_steps_are_those_of_an_eager_model_in_float8(name: str, counted: str) -> None:
    """While everything is kept, and on the rows that an exact router selects."""
    architecture, exact = ARCHITECTURES[name], build(name)
    eager, batches = fp8_oracle.in_float8(exact), [token_batch(), token_batch(9, 14, seed=2)]
    model = cggr.optimize(copy.deepcopy(exact), ratio=0.4, warmup_steps=1, **OPTIONS)
    for batch in batches:
        found = oracle.step(model, batch)
        oracle.assert_same_step(*found, *oracle.step(eager, batch))
        with pytest.raises(AssertionError):
            oracle.assert_same_step(*found, *oracle.step(exact, batch), rtol=1e-3, atol=1e-4)
    model.cggr.step()
    for batch in batches:
        found = oracle.step(model, batch)
        rows = oracle.expected_rows(exact, architecture, batch, 0.4, 2)
        assert torch.equal(model.cggr.selected, rows)
        oracle.assert_same_step(*found, *oracle.step(eager, oracle.rows_of(batch, rows)))
    report = model.cggr.report()
    assert report.float8 == counted
    assert f"float8 {counted}" in " ".join(str(report).split())
    assert f"~ float8: {counted}" in model.cggr.diff().summary()
    assert report.router.body == "exact body"
    assert report.providers["fp8_linear"] == "reference"
    assert products(model.cggr.runtime.plans[-1].program) == int(counted.split()[0])


def test_the_middle_layers_train_in_float8_on_their_tokens(llama: Captured) -> None:
    routed, batch = plans.Routed(*llama, route="token", **OPTIONS), token_batch(7, 10)
    found = routed.step(batch)
    positions = token_oracle.expected_positions(routed.model, LLAMA, batch, 0.5, 2)
    assert torch.equal(routed.selected, positions)
    eager = fp8_oracle.in_float8(routed.model)
    oracle.assert_same_step(*found, *token_oracle.step(eager, LLAMA, batch, range(1, 2), positions))


@pytest.mark.long
def test_kept_documents_train_in_float8() -> None:
    exact, places = build("llama"), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2])
    batch = {**token_batch(4, masked=False), "position_ids": places.expand(4, -1)}
    model = cggr.optimize(copy.deepcopy(exact), route="segment", ratio=0.5, **OPTIONS)
    found = oracle.step(model, batch)
    kept = segment_oracle.repacked(batch, model.cggr.selected)
    oracle.assert_same_step(*found, *oracle.step(fp8_oracle.in_float8(exact), kept))


@pytest.mark.long
def test_experts_that_tokens_skip_stay_exact() -> None:
    """The pass that shows them which tokens they have reads linears as what they are."""
    report = cggr.explain(
        build("mixtral"), token_batch(), route="token", skip="experts", selection="topk", **OPTIONS
    ).report()
    assert report.float8.startswith("12 of 21 products")
    assert [str(entry) for entry in report.shortened] == ["view_8 [B·S, 32] (dim 0): read by the experts of layer 1"]


@pytest.mark.parametrize(
    "options",
    [
        {"route": "loss"},
        {"route": ("token", "loss"), "selection": "random"},
        {"route": "depth", "depth_layers": 2, "ratio": 1.0, "selection": None},
        {"router_body": "fp8"},
        {"keep_logits": True},
    ],
    ids=str,
)
def test_the_same_products_are_in_float8_whatever_is_kept(llama: Captured, options: dict[str, Any]) -> None:
    """In place of the exact linears, and of no others; kept logits and the scores' router stay exact."""
    fp8, exact = (
        plans.Routed(*llama, **{**OPTIONS, **options, "matmul": how}).plan.in_force.program for how in ("fp8", "exact")
    )
    counts, before = operator_counts(fp8.graph), operator_counts(exact.graph)
    layers = 2 if options.get("route") == "depth" else 3
    assert products(fp8) == 7 * layers
    assert counts - before == {"cggr.fp8_linear[reference]": 7 * layers}
    assert before - counts == {"aten.linear": 7 * layers}


def test_scores_by_themselves_are_exact(llama: Captured) -> None:
    plan = plans.Routed(*llama, **OPTIONS).plan
    scores = plan.scoring("scores", plan.owner.in_force).program
    assert not any("fp8_linear" in name for name in operator_counts(scores.graph))


def test_unpadded_batches(padded_llama: Captured) -> None:
    """On the real tokens alone; rounding is row by row, so only the order of sums differs, and what it tips over."""
    routed, batch = plans.Routed(*padded_llama, ratio=1.0, unpad=True, **OPTIONS), token_batch()
    loss, _ = routed.step(batch)
    assert products(routed.plan.unpadded.route.program) == 21
    assert routed.plan.unpadded.batch.last is not None
    expected, _ = oracle.step(fp8_oracle.in_float8(routed.model), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_micro_batches_add_up(llama: Captured) -> None:
    eager = fp8_oracle.in_float8(llama[0])
    eager.zero_grad()
    model = cggr.optimize(copy.deepcopy(llama[0]), **OPTIONS)
    for seed in (1, 2):
        for each in (model, eager):
            each(**token_batch(seed=seed)).loss.backward()
    oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager))


def test_adapters_train_over_frozen_weights() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.0, target_modules=["q_proj", "down_proj"])
    exact = peft.get_peft_model(build("llama"), adapters).train()
    for name, parameter in exact.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model, batch = cggr.optimize(copy.deepcopy(exact), ratio=0.5, **OPTIONS), token_batch(seed=3)
    found = oracle.step(model, batch)
    eager = fp8_oracle.in_float8(exact)
    oracle.assert_same_step(*found, *oracle.step(eager, oracle.rows_of(batch, model.cggr.selected)))
    assert sum(gradient is not None for gradient in found[1].values()) == 12
    assert model.cggr.report().float8 == "33 of 33 products with weights"


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_checkpointed_layers_are_computed_again(inner: str) -> None:
    exact, batch = build("llama"), token_batch(8, 32)
    plain = cggr.optimize(copy.deepcopy(exact), **{**OPTIONS, "inner": inner})
    exact.gradient_checkpointing_enable()
    model = cggr.optimize(copy.deepcopy(exact), **{**OPTIONS, "inner": inner})
    oracle.assert_same_step(*oracle.step(model, batch), *oracle.step(fp8_oracle.in_float8(exact), batch))
    assert oracle.saved_bytes(model, batch) < oracle.saved_bytes(plain, batch) / 2


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
def test_under_autocast_steps_are_those_of_an_eager_model_in_float8(name: str) -> None:
    exact, batch = build(name), token_batch()
    eager, model = fp8_oracle.in_float8(exact), cggr.optimize(copy.deepcopy(exact), ratio=0.5, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        expected = eager(**oracle.rows_of(batch, model.cggr.selected)).loss
    loss.backward()
    expected.backward()
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), expected.detach(), oracle.gradients(eager))
    assert {gradient.dtype for gradient in oracle.gradients(model).values()} == {torch.float32}


def assert_follows_sizes(exact: nn.Module, batches: list[dict[str, torch.Tensor]], **options: Any) -> None:
    """Also with symbolic sizes, which the second batch brings."""
    model, eager = cggr.optimize(copy.deepcopy(exact), ratio=0.5, **options), fp8_oracle.in_float8(exact)
    for batch in batches:
        found = oracle.step(model, batch)
        expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
        if options["inner"] == "inductor":  # sums in another order; steps without float8 are 2⁻⁴ apart
            oracle.assert_step_within(2**-8, *found, *expected)
        else:
            oracle.assert_same_step(*found, *expected)
    variant = model.cggr.runtime.plans[-1].route.variant
    assert variant.compilations == 2
    assert bool(variant.pieces) == options["outline_layers"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("outlined", [False, True])
def test_compiled_steps_follow_sizes(outlined: bool) -> None:
    batches = [toy_batch(rows, length) for rows, length in ((4, 6), (7, 8), (3, 5))]
    options = {**OPTIONS, "inner": "aot_eager", "outline_layers": outlined}
    assert_follows_sizes(Toy(DEEP).train(), batches, **options)


@pytest.mark.long
@pytest.mark.parametrize(("inner", "outlined"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_inner_backends(inner: str, outlined: bool) -> None:
    config = T.LlamaConfig(**{**GROUPED, "num_hidden_layers": DEEP})
    exact = eager_of(Architecture("llama", lambda: T.LlamaForCausalLM(config), "model.layers"))
    batches = [token_batch(*shape) for shape in ((6, 12), (9, 14), (4, 10))]
    assert_follows_sizes(exact, batches, **{**OPTIONS, "inner": inner, "outline_layers": outlined})


class Narrow(Toy):
    """Its layers are narrower inside than float8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)) for _ in range(3))


class Precise(Toy):
    """Its second layer leaves autocast, and its third is wider than its weights."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers
        hidden = hidden + first(hidden).tanh()
        with torch.autocast("cpu", enabled=False):
            hidden = hidden + second(hidden.to(second.weight.dtype)).tanh()
        return hidden + F.linear(hidden.double(), third.weight.double()).tanh().to(hidden.dtype)


def test_what_a_model_makes_in_full_precision_stays_exact() -> None:
    report = cggr.explain(Precise().train(), toy_batch(), **OPTIONS).report()
    why = "in full precision by the model's own choice"
    assert report.float8 == f"1 of 3 products with weights; exact: 2 × aten.linear by 16 × 16: {why}"


def test_a_model_without_such_products_is_refused() -> None:
    message = (
        r"matmul='fp8', and float8 can make none of the model's products with weights \(3 × aten.linear by 8 × 16: no "
        r"multiples of 16; 3 × aten.linear by 16 × 8: .*leave matmul out"
    )
    with pytest.raises(cggr.CannotOptimize, match=f"(?s){message}"):
        cggr.explain(Narrow().train(), toy_batch(), **OPTIONS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fp16", "matmul='fp16'; valid values: exact, fp8"),
        ("exat", "matmul='exat', did you mean 'exact'. valid values: exact, fp8"),
        (None, "matmul=None; valid values: exact, fp8"),
    ],
)
def test_bad_options_say_what_to_do(how: Any, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(matmul=how)


@pytest.mark.gpu
@pytest.mark.sample(3)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_steps_are_those_of_float8_without_a_sync(autocast: bool, graphs: bool) -> None:
    """Compiled, no further from float8 in fp32 than twice an eager model in float8 of the same dtype; what is recorded
    by graphs may wait while it is."""
    exact = build("llama").cuda().to(torch.float32 if autocast else torch.bfloat16)
    options = {**OPTIONS, "inner": "inductor", "cuda_graphs": graphs}
    model = cggr.optimize(copy.deepcopy(exact), ratio=0.5, **options)
    batch = {key: tensor.cuda() for key, tensor in token_batch(8, 32).items()}
    same_dtype = torch.autocast("cuda", torch.bfloat16, enabled=autocast)
    for step in range(8):
        with oracle.without_sync() if step > 5 else nullcontext(), same_dtype:
            model.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            loss.backward()
    assert model.cggr.report().providers["fp8_linear"] == "scaled_mm"
    rows = oracle.rows_of(batch, model.cggr.selected)
    truth = oracle.step(fp8_oracle.in_float8(copy.deepcopy(exact).float()), rows)
    with same_dtype:
        eager = oracle.step(fp8_oracle.in_float8(exact), rows)
    oracle.assert_no_further((loss.detach(), oracle.gradients(model)), eager, truth, times=2)
