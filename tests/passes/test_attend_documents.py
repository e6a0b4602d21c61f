"""`unpad` on packed batches: attention of variable lengths within documents is eager's attention under its mask."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from architectures import COMMON, VOCABULARY, build
from cggr_compile.passes.rewrite import attend_documents
from flash import flash_on_the_cpu
from segment_oracle import packed
from torch import nn
from toys import WORDS, Toy

import cggr_compile as cggr
from cggr_compile.ir.program import value
from cggr_compile.run import packing

ROUNDING = oracle.rounding(COMMON["hidden_size"], COMMON["intermediate_size"], VOCABULARY, 64)
BATCHES = [
    [[3, 2, 4, 1, 3], [1, 1, 5, 2, 4], [6, 1, 1, 5]],
    [[1] * 13, [13], [12, 1]],
    [[9, 2, 9], [1, 18, 1]],
]
FAMILIES = ["llama", "mistral", "gemma3", "qwen3", "gpt2", "mixtral"]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attend_documents, "runs_varlen", lambda node: True)
    with flash_on_the_cpu():
        yield


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_each_document_attends_to_itself(name: str, inner: str, flash: None) -> None:
    eager = build(name)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner=inner)
    for seed, lengths in enumerate(BATCHES):
        batch = packed(lengths, seed, ignored=0.2)
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    layers = eager.config.num_hidden_layers
    said = "attention within 6 documents in the last step; {} attentions of variable lengths"
    assert model.cggr.report().unpadded == said.format(layers)


def test_one_row_and_documents_that_begin_anywhere(flash: None) -> None:
    """As padding_free batches are; a document may begin at any position, and also where positions jump."""
    eager = build("llama")
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    for positions in ([0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 3, 4, 9], [0, 0, 0, 0, 0, 0, 0]):
        batch = packed([[len(positions)]])
        batch["position_ids"] = torch.tensor([positions])
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert "within 7 documents" in model.cggr.report().unpadded
    ends = [node for node in model.cggr.runtime.plans[-1].unpadded.route.program.placeholders if node.name == "ends"]
    assert [value(node).dtype for node in ends] == [torch.int32]


@pytest.mark.long
def test_checkpointed_layers_stay_one_checkpoint_each(flash: None) -> None:
    eager = build("llama")
    eager.gradient_checkpointing_enable()
    model, batch = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager"), packed(BATCHES[0])
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    written = model.cggr.runtime.plans[-1].unpadded.route.variant.module
    assert len([name for name, _ in written.named_children() if name.startswith("checkpoint_")]) == 3


class Packed(Toy):
    """Attention whose mask the positions make, in some way."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask
        self.positions = torch.zeros(0)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> tuple:
        self.positions = position_ids
        return super().forward(input_ids % WORDS, labels.where(labels < 0, labels % WORDS))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        mask = self.mask(self.positions, causal)
        return nn.functional.scaled_dot_product_attention(hidden[:, None], hidden[:, None], hidden[:, None], mask)[:, 0]


def _apart(positions: torch.Tensor) -> torch.Tensor:
    documents = (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (documents[:, :, None] == documents[:, None, :])[:, None]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "mask",
    [
        lambda positions, causal: (positions[:, :, None] > positions[:, None, :])[:, None] & causal,
        lambda positions, causal: ~_apart(positions) & causal,
        lambda positions, causal: _apart(positions + positions) & causal,
        lambda positions, causal: _apart(positions) & (positions != 3)[:, None, None, :] & causal,
        lambda positions, causal: (_apart(positions) | (positions == 0)[:, None, None, :]) & causal,
        lambda positions, causal: _apart(positions) & (positions[:, None, None, :] <= torch.arange(13)[:, None]),
        lambda positions, causal: (_apart(positions) & causal)[..., :1],
        lambda positions, causal: (_apart(positions) & causal)[:, :, :1],
        lambda positions, causal: (_apart(positions) & causal)[:1] & (positions == positions)[:, None, None, :],
    ],
)
def test_other_masks_of_positions_stay(mask: Any, flash: None) -> None:
    eager = Packed(mask)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    batch = packed(BATCHES[0])
    oracle.assert_same_step(*oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().unpadded.startswith("nothing: no attention in bfloat16 or float16 on CUDA is proved")


def test_the_toys_own_mask_goes(flash: None) -> None:
    eager = Packed(lambda positions, causal: _apart(positions) & causal)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    batch = packed(BATCHES[0])
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert "within 14 documents" in model.cggr.report().unpadded


def test_more_documents_than_a_launch_takes_train_under_the_mask(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST", 8)
    eager = Packed(lambda positions, causal: _apart(positions) & causal)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    for lengths, said in ((BATCHES[0], "under a mask in the last step, of more than 8"), (BATCHES[2], "within 6")):
        batch = packed(lengths)
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
        assert said in model.cggr.report().unpadded


def test_off_a_gpu_the_mask_stays() -> None:
    model = cggr.optimize(build("llama"), unpad=True, inner="eager")
    oracle.step(model, packed(BATCHES[0]))
    assert model.cggr.report().unpadded.startswith("nothing: no attention in bfloat16 or float16 on CUDA")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"inner": "eager"}, {"inner": "inductor"}, {"inner": "inductor", "cuda_graphs": True}]
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_on_a_gpu(name: str, options: dict[str, Any]) -> None:
    truth = build(name).cuda()
    model = cggr.optimize(copy.deepcopy(truth), unpad="auto", **options)
    batches = [packed(lengths, seed) for seed, lengths in enumerate([BATCHES[0], BATCHES[1]] * 2)]
    oracle.assert_autocast_steps_no_further(model, truth, batches)
    assert "attention within 16 documents" in model.cggr.report().unpadded
