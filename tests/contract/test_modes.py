"""Training modes: checkpointing, autocast, dropout, ignored labels, accumulation, odd batch shapes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import oracle
import plans
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, GROUPED, build, token_batch
from torch import nn
from toys import Toy, route, toy_batch

import cggr_compile as cggr
from cggr_compile.ir.names import operator_counts
from cggr_compile.ir.program import Program

LLAMA = ARCHITECTURES["llama"]


def routed(llama: tuple[nn.Module, Program], **options: Any) -> plans.Routed:
    """The captured step under the same options as `optimized`."""
    return plans.Routed(*llama, **{"ratio": 0.4, **options})


def optimized(eager: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return cggr.optimize(copy.deepcopy(eager), **{"ratio": 0.4, "router_layers": 2, "inner": "eager", **options})


def test_gradient_checkpointing_is_exact_and_still_saves_memory() -> None:
    eager = build("llama")
    batch = token_batch(8, 32)
    plain_bytes = oracle.saved_bytes(eager, oracle.rows_of(batch, torch.arange(4)))
    eager.gradient_checkpointing_enable()
    model = optimized(eager)
    loss, gradients = oracle.step(model, batch)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)
    assert torch.equal(model.cggr.selected, oracle.expected_rows(eager, LLAMA, batch, 0.4, 2))
    assert oracle.saved_bytes(model, batch) < plain_bytes / 2


@pytest.mark.long
def test_the_partitioners_memory_budget_holds_inside() -> None:
    eager, batch = build("llama"), token_batch(8, 32)
    plain, tight = optimized(eager, inner="aot_eager"), optimized(eager, inner="aot_eager")
    plain_bytes = oracle.saved_bytes(plain, batch)
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        assert oracle.saved_bytes(tight, batch) < 0.7 * plain_bytes
    loss, gradients = oracle.step(tight, batch)
    rows = oracle.rows_of(batch, tight.cggr.selected)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"outline_layers": True}, {}, {"inner": "inductor"}], ids=str)
def test_elementwise_results_are_recomputed_where_asked(options: dict[str, Any]) -> None:
    eager, batch = build("llama"), token_batch(8, 32)
    options = {"inner": "aot_eager", **options}
    plain, frugal = optimized(eager, **options), optimized(eager, **options, recompute_elementwise=True)
    assert oracle.saved_bytes(frugal, batch) < 0.9 * oracle.saved_bytes(plain, batch)
    loss, gradients = oracle.step(frugal, batch)
    rows = oracle.rows_of(batch, frugal.cggr.selected)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, rows), rtol=1e-5, atol=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", pytest.param("mixtral", marks=pytest.mark.long)])
def test_autocast_loses_no_gradient(name: str) -> None:
    """The original CGGR's router filled autocast's weight cache under no_grad: 28 of 56 parameters got no gradient."""
    eager = build(name)
    model = optimized(eager)
    batch = token_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    rows = model.cggr.selected
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss = eager(**oracle.rows_of(batch, rows)).loss
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=1e-3)
    expected, actual = oracle.gradients(eager), oracle.gradients(model)
    assert {n for n, g in actual.items() if g is None} == {n for n, g in expected.items() if g is None}
    for parameter, gradient in expected.items():
        if gradient is not None:
            difference = (actual[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert difference < 5e-2, f"{parameter}: relative error {difference:.3f}"


def test_dropout_is_eagers_under_the_same_generator_state() -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config.use_cache = False
    assert config.resid_pdrop > 0
    torch.manual_seed(0)
    eager = transformers.GPT2LMHeadModel(config).train()
    model = optimized(eager)
    batch = token_batch()
    model(**batch)  # capture draws nothing that the next line would not reset
    torch.manual_seed(7)
    loss, gradients = oracle.step(model, batch)
    rows = model.cggr.selected
    torch.manual_seed(7)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, rows))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)
    quiet = copy.deepcopy(eager)
    for module in quiet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    quiet.config.attn_pdrop = 0.0
    for block in quiet.transformer.h:
        block.attn.attn_dropout.p = 0.0
    assert torch.equal(rows, oracle.expected_rows(quiet, ARCHITECTURES["gpt2"], batch, 0.4, 2))


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_a_batch_without_counted_labels_has_a_connected_zero_loss(
    llama: tuple[nn.Module, Program], ratio: float
) -> None:
    model = routed(llama, ratio=ratio)
    batch = token_batch()
    trained = {name for name, gradient in model.step(batch)[1].items() if gradient is not None}
    assert trained
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = model.step(batch)
    assert loss.item() == 0.0
    for parameter in trained:
        assert gradients[parameter] is not None, f"{parameter} is disconnected"
        assert gradients[parameter].abs().max() == 0.0


def test_rows_without_counted_labels_are_never_selected(llama: tuple[nn.Module, Program]) -> None:
    """With fewer counted rows than k, what fills up counts for nothing: the loss is that of the counted rows."""
    eager = copy.deepcopy(llama[0])
    model = routed(llama, ratio=0.5)
    batch = token_batch(8, 12)
    batch["labels"][:6] = -100
    loss, gradients = model.step(batch)
    assert set(model.selected.tolist()) == {6, 7}
    assert plans.metrics(model)["rows_selected"] == 2
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, torch.tensor([6, 7])))
    oracle.assert_same_step(loss, gradients, expected_loss, expected, rtol=1e-5, atol=1e-7)


def test_a_row_with_nan_scores_is_not_selected() -> None:
    eager = Toy().train()
    batch = toy_batch(6)
    with torch.no_grad():
        eager.embed.weight[5] = float("nan")
    batch["input_ids"][batch["input_ids"] == 5] = 6
    batch["labels"] = batch["input_ids"].clone()
    batch["input_ids"][3, 0] = 5
    model = optimized(eager, ratio=0.8)
    loss = model(**batch)[0]
    assert 3 not in model.cggr.selected.tolist()
    assert loss.isfinite()


@pytest.mark.sample(1)
@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "random"},
        {"selection": "importance", "router_head": "sampled", "router_head_frequent": 4, "router_head_sampled": 4},
        {"selection": "stratified"},
        {"selection": "trimmed", "route": "loss"},
    ],
)
def test_the_default_dtype_is_none_of_a_steps(dtype: torch.dtype, options: dict) -> None:
    steps, batch = [], toy_batch(8, ignored=0.3)
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        model = cggr.optimize(Toy().train(), router_layers=2, seed=0, inner="eager", **options)
        torch.set_default_dtype(default)
        try:
            loss = model(**batch)[0]
            loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        steps.append((loss.detach(), oracle.gradients(model)))
    oracle.assert_same_step(*steps[1], *steps[0])


@pytest.mark.parametrize("kind", ["tensor", "one entry", pytest.param("int", marks=pytest.mark.long)])
def test_num_items_in_batch_keeps_the_gradient_scale(kind: str) -> None:
    """A sum over the kept tokens, divided by a count of all, is scaled by counted / kept tokens."""
    eager = build("llama")
    model = optimized(eager)
    batch = token_batch()
    counts = oracle.counted(batch["labels"], causal=True)
    total = counts.sum() * 4
    items = {"tensor": total, "one entry": total.view(1), "int": int(total)}[kind]
    loss, gradients = oracle.step(model, {**batch, "num_items_in_batch": items})
    rows = model.cggr.selected
    expected_loss, expected = oracle.step(eager, {**oracle.rows_of(batch, rows), "num_items_in_batch": items})
    share = counts.sum() / counts[rows].sum()
    scaled = {name: None if g is None else g * share for name, g in expected.items()}
    oracle.assert_same_step(loss, gradients, expected_loss * share, scaled, rtol=1e-4, atol=1e-7)


def test_a_call_may_ask_for_router_logits() -> None:
    """Their loss is that of the selected rows, and a call that does not ask has none."""
    eager = build("mixtral")
    eager.config.output_router_logits = False
    model, batch = optimized(eager), token_batch()
    for asked in ({}, {"output_router_logits": True}, {}):
        loss, gradients = oracle.step(model, {**batch, **asked})
        rows = oracle.rows_of(batch, model.cggr.selected)
        oracle.assert_same_step(loss, gradients, *oracle.step(eager, {**rows, **asked}))
    assert model.cggr.captures == 2
    assert not any(module._forward_hooks for module in cggr.restore(model).modules())
    assert cggr.explain(model, {**batch, "output_router_logits": True}).report().stack.layers == 3


@pytest.mark.parametrize("scoring", ["combined", "entropy", "margin"])
def test_scorings_select_what_an_eager_router_selects(llama: tuple[nn.Module, Program], scoring: str) -> None:
    eager = copy.deepcopy(llama[0])
    model = routed(llama, scoring=scoring)
    batch = token_batch()
    loss, gradients = model.step(batch)
    scores = oracle.row_scores(eager, LLAMA, batch, 2, scoring)
    torch.testing.assert_close(plans.metrics(model)["score_mean"], scores[scores.isfinite()].mean())
    rows = oracle.expected_rows(eager, LLAMA, batch, 0.4, 2, scoring)
    assert torch.equal(model.selected, rows)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, rows))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)


def test_random_rows_leave_torchs_generator_alone_and_follow_the_seed() -> None:
    torch.manual_seed(0)
    eager = Toy().train()
    batch = toy_batch(16, ignored=0.3)
    drawn = []
    for _ in range(2):
        model = optimized(eager, selection="random", seed=11)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        steps = []
        for _ in range(3):
            loss, gradients = oracle.step(model, batch)
            rows = model.cggr.selected
            expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, rows))
            oracle.assert_same_step(loss, gradients, expected_loss, expected)
            steps.append(rows.tolist())
            assert 1 not in rows.tolist()
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(steps)
    assert drawn[0] == drawn[1]
    assert len({tuple(rows) for rows in drawn[0]}) > 1


@pytest.mark.parametrize(("rows", "length"), [(2, 12), (12, 12), (1, 12), (5, 2)])
def test_odd_shapes(rows: int, length: int) -> None:
    """B = 2, B = S, one row (passes unrouted) and the shortest sequence."""
    torch.manual_seed(0)
    eager = Toy().train()
    model = optimized(eager)
    batch = toy_batch(rows, length)
    loss, gradients = oracle.step(model, batch)
    expected_rows = torch.tensor(route(eager, batch).hardest(-(-2 * rows // 5)))
    assert torch.equal(model.cggr.selected, expected_rows)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, expected_rows))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)


def test_one_capture_serves_all_shapes_and_labels_may_be_the_ids() -> None:
    torch._dynamo.utils.counters.clear()
    model = optimized(Toy().train())
    for rows, length in [(6, 12), (9, 14), (4, 4), (2, 31), (17, 3)]:
        ids = toy_batch(rows, length)["input_ids"]
        model(input_ids=ids, labels=ids)[0].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert model.cggr.captures == 1


def test_warm_up_walks_down_the_ladder() -> None:
    model = optimized(Toy().train(), ratio=0.25, warmup_steps=8)
    batch = toy_batch(16)
    kept = []
    for _ in range(10):
        model(**batch)
        kept.append(len(model.cggr.selected))
        model.cggr.step()
    assert kept == [16, 15, 13, 12, 10, 9, 7, 6, 4, 4]
    assert model.cggr.captures == 1


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_compiled_inner_backends_agree_bitwise(inner: str) -> None:
    """It runs the operators that eager runs, in their order."""
    torch.manual_seed(0)
    eager = Toy().train()
    model = optimized(eager, inner=inner)
    batch = toy_batch(ignored=0.3)
    loss, gradients = oracle.step(model, batch)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)


def test_the_cache_is_off_in_a_routed_step_only() -> None:
    eager = build("llama")
    eager.config.use_cache = True
    model = optimized(eager)
    batch = token_batch()
    assert model(**batch).past_key_values is None
    model.eval()
    assert model(**batch).past_key_values is not None
    assert model.config.use_cache


def test_keep_logits_returns_those_of_the_kept_rows() -> None:
    eager = build("gemma2")
    model = optimized(eager, keep_logits=True)
    batch = token_batch()
    logits = model(**batch).logits
    expected = eager(**oracle.rows_of(batch, model.cggr.selected)).logits
    assert torch.equal(logits, expected)


def test_bfloat16_weights() -> None:
    """Bitwise: logits are rounded to bfloat16 where the model rounds them, and the loss of them is in fp32."""
    config = transformers.LlamaConfig(**GROUPED)
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
    model = optimized(eager)
    batch = token_batch()
    loss, gradients = oracle.step(model, batch)
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)


@pytest.mark.parametrize(("selection", "operator"), [("topk", "select"), ("trimmed", "draw"), ("importance", "draw")])
def test_no_operator_reads_back_to_the_host(llama: tuple[nn.Module, Program], selection: str, operator: str) -> None:
    reading = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.nonzero.default}
    graph = routed(llama, selection=selection).plan.program.graph
    targets = {node.target for node in graph.nodes}
    assert f"cggr.{operator}[reference]" in operator_counts(graph)
    assert targets & reading == set()


@pytest.mark.gpu
@pytest.mark.sample(3)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_steady_step_on_the_gpu_never_synchronises(inner: str, autocast: bool) -> None:
    model = optimized(build("llama").cuda(), inner=inner)
    batch = {name: tensor.cuda() for name, tensor in token_batch().items()}
    context = torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext()
    with context:
        for _ in range(2):
            model(**batch).loss.backward()
        with oracle.without_sync():
            model(**batch).loss.backward()
