"""Null routing (`skip="experts"`) against hand-written eager models whose middle layers call their experts with the
kept tokens only: bitwise, where both sides sort pairs stably."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import oracle
import plans
import pytest
import token_oracle
import torch
import torch.nn.functional as F
import transformers as T
from architectures import GROUPED, VOCABULARY, Architecture, eager_of, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import padded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutput

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Diff, Report
from cggr_compile.inspection.figure import figure
from cggr_compile.ir.program import Program

LONG = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "long"
SKIP: dict[str, Any] = {"route": "token", "skip": "experts", "selection": "topk", "router_layers": 1}
LAYERS, CHOICES, DENSE = 4, 2, 2
"""Layers, choices of each token, and the layer without experts."""

EXPERTS = {**GROUPED, "num_hidden_layers": LAYERS, "num_experts_per_tok": CHOICES}
FOUR = {"num_experts": 4, "moe_intermediate_size": 16, "output_router_logits": True}
SHARED = {**EXPERTS, **FOUR, "shared_expert_intermediate_size": 16, "mlp_only_layers": [DENSE]}


class Layer(nn.Module):
    """Adds the mean of the real tokens so far, and then what an MLP makes of the sum."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        if hidden.shape[1] > 2:  # every token gets here, however few are kept
            hidden = hidden + (hidden * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return hidden + self.mlp(hidden)


class Mixture(nn.Module):
    """Layers with the experts and the shared expert of Qwen2-MoE, one with its dense MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.config = T.Qwen2MoeConfig(**SHARED)
        self.embed = nn.Embedding(VOCABULARY, self.config.hidden_size)
        self.layers = nn.ModuleList(Layer(layer.mlp) for layer in T.Qwen2MoeModel(self.config).layers)
        self.head = nn.Linear(self.config.hidden_size, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask.unsqueeze(-1))
        logits = self.head(hidden)
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        return CausalLMOutput(loss=F.cross_entropy(logits.reshape(-1, VOCABULARY), targets), logits=logits)


MIXTURE = Architecture("mixture", Mixture, "layers")


def mixture() -> nn.Module:
    torch.manual_seed(0)
    model = Mixture().train()
    for parameter in model.parameters():  # far enough from 0 for tokens to differ
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, Program]:
    model = mixture()
    return model, plans.captured(model, token_batch())


@pytest.fixture(scope="module")
def routed(captured: tuple[nn.Module, Program]) -> plans.Routed:
    return plans.Routed(*captured, **SKIP)


def assert_equal(
    step: Callable[[], Any], model: nn.Module, architecture: Architecture, batch: Any, middle: range, positions: Tensor
) -> None:
    """A step is bitwise that of the eager model whose experts in the middle layers are called with the tokens at the
    positions."""
    eager = token_oracle.skipping(model, architecture, middle, positions)
    with token_oracle.StableSorts():
        oracle.assert_same_step(*step(), *oracle.step(eager, batch))


@settings(max_examples=200 if LONG else 8)
@given(
    lengths=st.lists(st.integers(3, 12), min_size=2, max_size=5),
    side=st.sampled_from(["left", "right"]),
    ignored=st.sampled_from([0.0, 0.6]),
    seed=st.integers(0, 2**16),
    ratio=st.sampled_from([0.1, 1 / 3, 0.5, 0.9]),
)
def test_contract(routed: plans.Routed, lengths: list[int], side: str, ignored: float, seed: int, ratio: float) -> None:
    """Positions are those that an eager router selects; loss and every gradient are eager's on them."""
    batch, eager = padded(lengths, seed, side, ignored), copy.deepcopy(routed.model)
    if not oracle.counted(batch["labels"], causal=True).any():
        batch["labels"] = batch["input_ids"]  # where eager says 0 / 0
    positions = token_oracle.expected_positions(eager, MIXTURE, batch, ratio, 1)
    step = lambda: routed.at(ratio).step(batch)  # noqa: E731
    assert_equal(step, eager, MIXTURE, batch, range(1, LAYERS - 1), positions)
    assert torch.equal(routed.selected, positions)


def test_with_sorts_as_they_are_only_gradients_of_tables_round(routed: plans.Routed) -> None:
    batch = token_batch()
    loss, gradients = routed.at(0.5).step(batch)
    short = token_oracle.skipping(routed.model, MIXTURE, range(1, LAYERS - 1), routed.selected)
    expected = oracle.step(short, batch)
    oracle.assert_step_within(oracle.rounding(batch["input_ids"].numel()), loss, gradients, *expected)
    exact, own = ({n: g for n, g in each.items() if "1.mlp.experts" not in n} for each in (expected[1], gradients))
    assert len(exact) == len(gradients) - 2
    oracle.assert_same_step(loss, own, expected[0], exact)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("middle", "options"),
    [
        (range(1, 4), {"selection": "random", "resample": "layer", "last_layers": 0, "seed": 3}),
        (range(3, 4), {"first_layers": 3, "last_layers": 0, "scoring": "entropy"}),
        (range(1, 4), {"last_layers": 0, "selection": "trimmed", "selection_options": {"epsilon": 0.5}}),
    ],
)
def test_options(captured: tuple[nn.Module, Program], middle: range, options: dict[str, Any]) -> None:
    routed, batch, eager = (
        plans.Routed(*captured, **{**SKIP, **options}),
        token_batch(7, 10),
        copy.deepcopy(captured[0]),
    )
    with token_oracle.StableSorts():
        loss, gradients = routed.step(batch)
    assert routed.selected.shape == ((3, 7, 5) if "resample" in options else (7, 5))
    assert_equal(lambda: (loss, gradients), eager, MIXTURE, batch, middle, routed.selected)


def test_with_every_token_kept_nothing_is_skipped(captured: tuple[nn.Module, Program]) -> None:
    """Of three tokens 0.9 are three: the loss route alone leaves something out."""
    both = plans.Routed(*captured, **{**SKIP, "route": ("token", "loss")}, ratio=0.9)
    batch = token_batch(4, 3)
    found = both.step(batch)
    positions, mask = both.selected
    assert positions.shape == (4, 3)
    assert 0 < mask.sum() < mask.numel()
    loss = plans.Routed(copy.deepcopy(captured[0]), captured[1], route="loss", ratio=0.9, router_layers=1)
    oracle.assert_same_step(*found, *loss.step(batch))


class Pairs(TorchDispatchMode):
    """How many rows each grouped product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.cggr.grouped_mm.default:
            self.counts.append(int(args[2][-1]))
        return func(*args, **(kwargs or {}))


def test_products_are_of_kept_pairs_only(routed: plans.Routed) -> None:
    with Pairs() as pairs:
        routed.at(0.25).step(token_batch(6, 12))
    every, kept = 6 * 12 * CHOICES, 6 * 3 * CHOICES
    assert pairs.counts == [every, every, every, every, kept, kept, every, every]  # two of the router and each layer


def test_report_diff_and_figure_say_what_is_skipped(routed: plans.Routed) -> None:
    routed.at(0.25)
    report, diff = Report.of(routed.runtime), Diff.of(routed.runtime)
    assert "experts of layers 1–2 of 4; the other tokens skip these" in str(report)
    (entry,) = report.shortened
    assert entry.why == "read by the experts of layer 1"
    assert any(f"%{entry.name}:" in row.text for row in diff.rows())
    assert "~ experts of layers 1–2 of 4: S → k in 1 of cggr.grouped_mlp; the other tokens skip these" in diff.summary()
    assert diff.op_counts()["skip_experts"]["aten.scatter"][1] == 1
    assert "experts of layers 1–2 of 4 on k = 3 tokens" in figure(report)
    # The pairs of 72 tokens are multiplied with tables of 32 × 32 and 32 × 16 numbers: a quarter is left.
    saved = 2 * 72 * CHOICES * (32 * 32 + 32 * 16) * 3 / 4
    assert (1 - report.cost.random_ratio) * report.cost.forward_flops == pytest.approx(saved)


def test_refusals(captured: tuple[nn.Module, Program]) -> None:
    with pytest.raises(cggr.CannotOptimize, match="no experts were found in layer 2 of 4") as caught:
        plans.Routed(*captured, **SKIP, first_layers=DENSE, last_layers=LAYERS - DENSE - 1)
    assert caught.value.hint
    with pytest.raises(cggr.CannotOptimize, match=r"layers 1–2 mix tokens by their places: aten\.cumsum"):
        plans.Routed(*captured, **{**SKIP, "skip": "layers"})
    with pytest.raises(cggr.ConfigError, match="experts that are not fused take no selection"):
        cggr.RoutingConfig(**SKIP, disable_passes=("fuse_experts",))
    with pytest.raises(cggr.ConfigError, match="skip='heads'"):
        cggr.RoutingConfig(route="token", skip="heads")


LATENT = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
LATENT |= {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS, num_local_experts=4, output_router_logits=True)),
    "qwen2_moe": lambda: T.Qwen2MoeForCausalLM(T.Qwen2MoeConfig(**SHARED)),
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**EXPERTS, **FOUR, head_dim=8)),
    "deepseek_v3": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(**{**EXPERTS, **LATENT, **GROUPS}, first_k_dense_replace=2)
    ),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8, sliding_window=4)
    ),
    "olmoe": lambda: T.OlmoeForCausalLM(
        T.OlmoeConfig(**EXPERTS, num_experts=4, pad_token_id=0, eos_token_id=1, output_router_logits=True)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "checkpointed"), [*((name, False) for name in FAMILIES), ("deepseek_v3", True), ("gpt_oss", True)]
)
def test_families(name: str, checkpointed: bool) -> None:
    """Models of transformers, with the loss that balances experts where they have one, also checkpointed."""
    architecture = Architecture(name, FAMILIES[name], "model.layers")
    eager = eager_of(architecture)
    if checkpointed:
        eager.gradient_checkpointing_enable()
    batch = token_batch(7, 14, seed=2)
    routed = plans.Routed(copy.deepcopy(eager), plans.captured(eager, token_batch()), **SKIP)
    positions = token_oracle.expected_positions(eager, architecture, batch, 0.5, 1)
    assert_equal(lambda: routed.step(batch), eager, architecture, batch, range(1, LAYERS - 1), positions)
    assert torch.equal(routed.selected, positions)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"inner": "inductor"},
        {"inner": "aot_eager", "outline_layers": True},
        {"kernels": {"grouped_mlp": "triton"}},
        {"kernels": {"grouped_mlp": "reference"}},
    ],
)
def test_compiled_and_by_other_providers(options: dict[str, Any]) -> None:
    """Within rounding; evaluation is the plain model."""
    eager, batch = mixture(), token_batch()
    model = cggr.optimize(copy.deepcopy(eager), **{**SKIP, "inner": "eager", **options})
    actual = oracle.step(model, batch)
    positions = token_oracle.expected_positions(eager, MIXTURE, batch, 0.5, 1)
    assert torch.equal(model.cggr.selected, positions)
    short = token_oracle.skipping(eager, MIXTURE, range(1, LAYERS - 1), positions)
    oracle.assert_step_within(1e-5, *actual, *oracle.step(short, batch))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, eager.eval()(**batch).logits)


class Reversed(nn.Module):
    """An MLP on the batch's tokens from the last to the first."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden.flatten(0, 1).flip(0).unsqueeze(0)).squeeze(0).flip(0).view_as(hidden)


@pytest.mark.long
def test_experts_of_reordered_tokens_are_refused() -> None:
    model = mixture()
    for layer in model.layers:
        layer.mlp = Reversed(layer.mlp)
    with pytest.raises(cggr.CannotOptimize, match=r"the experts of layer 1 run on rows of shape \[B·S, 32\]") as caught:
        cggr.explain(model, token_batch(), **SKIP)
    assert caught.value.hint
