"""`fuse_experts`: which graphs it takes for experts, that steps stay eager's, and which providers compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import transformers as T
from architectures import GROUPED, token_batch
from cggr_compile.kernels.op import grouped_mm
from cggr_compile.kernels.providers import choose
from cggr_compile.passes.analyse.find_experts import find_experts
from cggr_compile.passes.rewrite import fuse_experts as module
from oracle import gradients
from plans import Routed, captured
from torch import fx, nn

import cggr_compile as cggr
from cggr_compile.ir.dataflow import ancestors
from cggr_compile.ir.program import Program

aten = torch.ops.aten

EXPERTS = {**GROUPED, "num_hidden_layers": 2, "num_experts_per_tok": 2}


def mixtral(**options: Any) -> nn.Module:
    return T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS, num_local_experts=4, **options))


def olmoe() -> nn.Module:
    return T.OlmoeForCausalLM(T.OlmoeConfig(**EXPERTS, num_experts=4, pad_token_id=0, eos_token_id=1))


def deepseek() -> nn.Module:
    sizes = dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16)
    sizes |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    config = {**EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    config |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**config, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8, moe_intermediate_size=16)
    ),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(
            **EXPERTS, num_local_experts=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
    ),
    "olmoe": olmoe,
    "deepseek_v3": deepseek,
}
COUNTS = {"mixtral": 2, "qwen3_moe": 2, "gpt_oss": 2, "olmoe": 2, "deepseek_v3": 1}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    model.config.use_cache = False
    return model


def fused(routed: Routed, implementation: Any = grouped_mm.grouped_mlp) -> int:
    return sum(node.target is implementation for node in routed.plan.program.graph.nodes)


def eager_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal(found: tuple[torch.Tensor, dict[str, Any]], expected: tuple[torch.Tensor, dict[str, Any]]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradient is None and found[1][name] is None) or torch.equal(found[1][name], gradient), name


def assert_close(found: tuple[torch.Tensor, dict[str, Any]], expected: tuple[torch.Tensor, dict[str, Any]]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


class Captured(NamedTuple):
    model: nn.Module
    batch: dict[str, torch.Tensor]
    program: Program

    def routed(self, **options: Any) -> Routed:
        return Routed(self.model, self.program, ratio=1.0, selection="random", **options)


def captured_step(name: str) -> Captured:
    model, batch = made(name), token_batch(4, 9)
    return Captured(model, batch, captured(model, batch))


@pytest.fixture(scope="module")
def step() -> Captured:
    return captured_step("gpt_oss")


def assert_fused_and_equal(step: Captured, count: int) -> None:
    routed = step.routed()
    found = routed.step(step.batch)
    assert fused(routed) == count
    left = [str(node.target) for node in routed.plan.program.graph.nodes]
    assert not any(word in target for target in left for word in ("grouped_mm_fallback", "_grouped_mm", "aten.sort"))
    assert_equal(found, eager_step(step.model, step.batch))


def test_experts_become_one_operator_and_the_step_stays_eagers_bit_for_bit(step: Captured) -> None:
    assert_fused_and_equal(step, COUNTS["gpt_oss"])


@pytest.mark.long  # tests/contract has Mixtral and Qwen3-MoE
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt_oss"])
def test_of_other_models_too(name: str) -> None:
    assert_fused_and_equal(captured_step(name), COUNTS[name])


def test_off_the_graph_is_the_models_own_and_triton_agrees(step: Captured) -> None:
    expected = eager_step(step.model, step.batch)
    off = step.routed(disable_passes=("fuse_experts",))
    assert_equal(off.step(step.batch), expected)
    assert not fused(off)
    triton = step.routed(kernels={"grouped_mlp": "triton"})
    assert_close(triton.step(step.batch), expected)
    implementation = choose("grouped_mlp", torch.device("cpu"), torch.float32, "triton").implementation
    assert fused(triton, implementation) == COUNTS["gpt_oss"]


@pytest.mark.long
def test_rows_of_no_expert_of_a_rank_are_dropped() -> None:
    """Releases before 5.23 mask them in every model, later ones where experts are spread over ranks."""
    model, batch = made("gpt_oss"), token_batch(4, 9)
    for part in model.modules():
        if hasattr(part, "_is_expert_parallel"):
            part._is_expert_parallel = True
    routed = Routed(model, captured(model, batch), ratio=1.0, selection="random")
    assert_equal(routed.step(batch), eager_step(model, batch))
    assert fused(routed) == COUNTS["gpt_oss"]


@pytest.mark.long
def test_a_checkpointed_layer_stays_one() -> None:
    model, batch = made("gpt_oss"), token_batch(4, 9)
    model.gradient_checkpointing_enable()
    routed = Routed(model, captured(model, batch), ratio=1.0, selection="random")
    assert_equal(routed.step(batch), eager_step(model, batch))
    assert fused(routed) == COUNTS["gpt_oss"]


@pytest.mark.long
def test_bfloat16_and_a_router_of_its_own() -> None:
    model, batch = made("mixtral").bfloat16(), token_batch(4, 9)
    routed = Routed(model, captured(model, batch), router_layers=1)
    routed.step(batch)
    assert fused(routed) == COUNTS["mixtral"] + 1
    assert dict(routed.plan.program.routing.providers)["grouped_mlp"] == "torch"


@pytest.mark.long
@pytest.mark.parametrize(("options", "implementation"), [({"hidden_act": "gelu"}, "grouped_mm"), ({}, "batched_mm")])
def test_what_would_not_be_the_same_stays(options: dict[str, str], implementation: str) -> None:
    torch.manual_seed(0)
    model, batch = mixtral(**options).train(), token_batch(4, 9)
    model.config.use_cache = False
    model.set_experts_implementation(implementation)
    routed = Routed(model, captured(model, batch), ratio=1.0, selection="random")
    assert_equal(routed.step(batch), eager_step(model, batch))
    assert not fused(routed)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_one_table_a_pair_is_the_same_mlp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA such products are grouped, which sums in another order."""
    monkeypatch.setattr(module, "_may_be_grouped", lambda total, experts: True)
    model, batch = made(name), token_batch(4, 9)
    model.set_experts_implementation("batched_mm")
    expected = eager_step(model, batch)
    model.zero_grad(set_to_none=True)
    loss = cggr.optimize(model, inner="eager")(**batch).loss
    loss.backward()
    assert_close((loss.detach(), gradients(model)), expected)
    assert ("grouped_mlp", "torch") in model.cggr.runtime.plans[-1].program.routing.providers


@pytest.mark.gpu
@pytest.mark.sample(4)
@pytest.mark.parametrize("options", [{"inner": "eager"}, {"inner": "inductor", "cuda_graphs": True}])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_on_a_gpu_triton_is_no_further_from_fp32_than_the_model(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERTS, "num_experts_per_tok", 4)  # all of them: another rounding chooses no other expert
    eager = made(name).cuda().bfloat16()
    truth = copy.deepcopy(eager).float()
    model = cggr.optimize(copy.deepcopy(eager), **options)
    batch = {key: tensor.cuda() for key, tensor in token_batch(4, 9).items()}
    for _ in range(3):
        found = oracle.step(model, batch)
        oracle.assert_no_further(found, oracle.step(eager, batch), oracle.step(truth, batch), times=2.0)
    assert model.cggr.report().providers["grouped_mlp"] == "triton"


@pytest.mark.parametrize(
    ("target", "place", "value"),
    [
        (aten.sum.dim_IntList, 1, [2]),
        (aten.floor_divide.default, 1, 3),
        (aten.histc.default, 1, 3),
        (aten.cumsum.default, 1, -1),
        (aten.add.Tensor, 1, 2),
        (aten.clamp.default, 2, 8.0),
        (aten.slice.Tensor, 4, 3),
        (aten.slice.Tensor, 2, 0),
    ],
)
def test_another_constant_is_not_taken_for_experts(step: Captured, target: Any, place: int, value: Any) -> None:
    program = step.program
    totals = program.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList, sort=True)
    total = next(node for node in totals if find_experts(program, node) is not None)
    for node in sorted(ancestors([total]), reverse=True):
        constants = [x for x in node.args[place : place + 1] if not isinstance(x, fx.Node)]
        if node.target == target and constants:
            before = node.args
            node.update_arg(place, value)
            found = find_experts(program, total)
            node.args = before
            break
    assert found is None
    assert find_experts(program, total) is not None
