"""`unpad=True`: a padded batch trains on its real tokens alone, and the step is eager's on the padded batch."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import oracle
import plans
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build
from cggr_compile.passes.rewrite import unpad_rows
from documents import examples
from flash import flash_on_the_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import padded
from torch import nn
from toys import WORDS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Report
from cggr_compile.ir.program import Program, value
from cggr_compile.run.not_computed import NOT_COMPUTED

LONG = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "long"
LLAMA = ARCHITECTURES["llama"]
# Products in other blocks, attention over other lengths: the widths, and the longest sum over tokens.
ROUNDING = oracle.rounding(COMMON["hidden_size"], COMMON["intermediate_size"], VOCABULARY, 128)
FAMILIES = ["llama", "mistral", "gemma3", "qwen3", "gpt2", "opt", "mixtral", "bert", "modernbert"]


def computed(step: plans.Routed) -> tuple[int, int]:
    """Of the last step, places that were computed and places of the batch."""
    return step.plan.unpadded.batch.last


@pytest.fixture(scope="module")
def unpadded(padded_llama: tuple[nn.Module, Program]) -> plans.Routed:
    return plans.Routed(*padded_llama, ratio=1.0, unpad=True)


@settings(max_examples=200 if LONG else 25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    side=st.sampled_from(["right", "left"]),
    ignored=st.sampled_from([0.0, 0.5, 0.9]),
    more=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_contract(unpadded: plans.Routed, lengths: list[int], side: str, ignored: float, more: int, seed: int) -> None:
    batch = padded(lengths, seed, side, ignored, longest=max(lengths) + more)
    actual = unpadded.step(batch)
    if not oracle.counted(batch["labels"], causal=True).any():
        assert actual[0] == 0  # where eager says 0 / 0
        return
    oracle.assert_step_within(ROUNDING, *actual, *oracle.step(copy.deepcopy(unpadded.model), batch))
    done, places = computed(unpadded)
    assert places == batch["input_ids"].numel()
    assert done == places or sum(lengths) < done <= sum(lengths) + max(1, places // 32)


def test_nothing_waits_behind_a_batch_that_was_not_worth_it(padded_llama: tuple[nn.Module, Program]) -> None:
    """A batch's numbers are read at once where the batch before was worth it, and else in the step that follows."""
    unpadded = plans.Routed(*padded_llama, ratio=1.0, unpad=True)
    full, short = padded([8, 8]), padded([8, 2])
    done = []
    for batch in (short, short, full, short, short):
        unpadded.step(batch)
        done.append(computed(unpadded))
    assert done[0] == done[1] == done[4] == (11, 16)
    assert done[2] == done[3] == (16, 16)
    unpadded.step(padded([7, 4, 9]))
    unpadded.step(padded([3, 5]))  # fewer places than the batch before has tokens
    assert computed(unpadded) == (9, 10)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(1)
def test_families(name: str, implementation: str, side: str) -> None:
    _assert_is_eagers(name, implementation, side)


@pytest.mark.long
@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "olmo2", "qwen3_moe", "cohere", "gemma2"])
def test_other_families(name: str) -> None:
    _assert_is_eagers(name, "eager", "left")


def _assert_is_eagers(name: str, implementation: str, side: str) -> None:
    eager = build(name)
    eager.set_attn_implementation(implementation)
    eager.config.output_router_logits = False
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = examples("integrations.md", "on_real_tokens")["on_real_tokens"](copy.deepcopy(eager))
    for seed, lengths in enumerate(([7, 4, 9, 2], [3, 8, 1, 5], [11, 2])):
        batch = padded(lengths, seed, side)
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.captures == 1
    assert "the last step computed 14 of 22 places; attention under a mask" in " ".join(
        str(model.cggr.report()).split()
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_masks_of_other_dtypes(dtype: torch.dtype, implementation: str) -> None:
    eager = build("llama")
    eager.set_attn_implementation(implementation)
    batch = padded([7, 4, 9, 2])
    model = cggr.optimize(copy.deepcopy(eager), unpad=True)
    found = oracle.step(model, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    oracle.assert_step_within(ROUNDING, *found, *oracle.step(eager, batch))


def test_batches_that_cannot_are_trained_as_they_are(unpadded: plans.Routed) -> None:
    """Padding that predicts a label, or is between tokens; nothing is lost of either."""
    predicting, between = padded([7, 4, 9]), padded([7, 4, 9])
    predicting["labels"][1, 6] = 5
    between["attention_mask"][2, 3] = 0
    between["labels"][2, 4] = -100
    for batch in (predicting, between):
        unpadded.step(padded([7, 4, 9]))
        actual = unpadded.step(batch)
        assert computed(unpadded) == (27, 27)
        oracle.assert_step_within(ROUNDING, *actual, *oracle.step(copy.deepcopy(unpadded.model), batch))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"inner": "aot_eager"}, marks=pytest.mark.long),
        {"prediction_metrics": True},
        {"padding": "right"},
        {"outline_layers": True},
    ],
)
def test_options(padded_llama: tuple[nn.Module, Program], options: dict[str, Any]) -> None:
    step = plans.Routed(*padded_llama, **{"ratio": 1.0, "unpad": True, "inner": "eager", **options})
    for seed, lengths in enumerate(([7, 4, 9], [2, 10, 3], [5, 1, 1, 6])):
        batch = padded(lengths, seed)
        actual = step.step(batch)
        oracle.assert_step_within(ROUNDING, *actual, *oracle.step(copy.deepcopy(step.model), batch))
    if options.get("inner") == "aot_eager":
        assert [route.variant.compilations for name, route in step.plan.routes.items() if name == "unpadded"] == [2]


class Told(Toy):
    """Attends causally, and does something besides."""

    def __init__(self, besides: Any, hides_padding: bool = True) -> None:
        super().__init__(layers=1)
        self.besides = besides
        self.hides_padding = hides_padding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> tuple:
        hidden = self.embed(input_ids % WORDS)
        places = torch.arange(input_ids.shape[1])
        seen = places[None, None, None, :] <= places[None, None, :, None]
        if self.hides_padding:
            seen = seen & (attention_mask[:, None, None, :] != 0)
        heads = hidden.unsqueeze(1)
        weights = (heads @ heads.mT).masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
        hidden = hidden + (weights @ heads).squeeze(1)
        hidden = self.besides(hidden, attention_mask)
        return self.loss(self.logits(self.middle(hidden)), torch.where(labels < 0, labels, labels % WORDS)), None


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("besides", "reason"),
    [
        (lambda x, mask: x + x.roll(1, 1), "roll runs along the sequence"),
        (lambda x, mask: x + x.mean(0, keepdim=True), "mean adds up tokens"),
        (lambda x, mask: x + x.flip(0), "aten.flip.default computes each token by itself is not known"),
        (lambda x, mask: x + x.mean(), "mean adds up tokens"),
        (lambda x, mask: x * x.shape[1], "a value depends on the batch size or the sequence length"),
        (lambda x, mask: torch.where(x > 0, x, x.shape[1]), "a value depends on the batch size or the sequence length"),
        (lambda x, mask: x * torch.arange(x.shape[0]).view(-1, 1, 1), "goes by the places of tokens"),
        (lambda x, mask: x + x.mT.reshape(x.shape), "takes entries of several tokens as one"),
        (lambda x, mask: x + x.unflatten(2, (2, -1)).transpose(1, 2).reshape(x.shape), "takes entries of several"),
        (lambda x, mask: x + x.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1), "takes entries of several"),
        (lambda x, mask: x + x.flatten(0, 1).reshape(x.shape[1], x.shape[0], -1).transpose(0, 1), "takes entries of"),
        (lambda x, mask: x + torch.cat([x.flatten(0, 1)] * 2).view(*x.shape[:2], 2, -1).sum(2), "behind each other"),
        (lambda x, mask: x + x.flatten(0, 1).repeat(2, 1).view(*x.shape[:2], 2, -1).sum(2), "behind each other"),
        (lambda x, mask: x + x.flatten(0, 1).mean(0), "mean adds up tokens"),
        (lambda x, mask: x + x.view(-1).mean(), "mean adds up tokens"),
        (lambda x, mask: x * x.flatten(0, 1).softmax(0).view(x.shape), "softmax adds up tokens"),
        (lambda x, mask: x + x.flatten(0, 1).cumsum(0).view(x.shape), "cumsum runs along"),
        (lambda x, mask: x + x.flatten(0, 1).topk(2, 0).values.sum(0), "topk chooses among tokens"),
        (lambda x, mask: x + x.flatten(0, 1).sort(0).values.view(x.shape), "sort.default computes each"),
        (lambda x, mask: x + x @ (x.flatten(0, 1).t() @ x.flatten(0, 1)), "matmul adds up tokens"),
        (
            lambda x, mask: torch.nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape),
            "whether aten.batch_norm.default computes each token by itself",
        ),
    ],
)
def test_what_is_not_of_each_token_is_refused(besides: Any, reason: str) -> None:
    model = cggr.optimize(Told(besides), unpad=True, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**padded([7, 4, 9]))


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "besides",
    [
        lambda x, mask: x + torch.arange(x.shape[1]).view(1, -1, 1) / 8,
        lambda x, mask: x + mask.cumsum(1).unsqueeze(-1) / 8,
        lambda x, mask: x * mask.sum(1).max(),
        lambda x, mask: x * torch.full((1,), x.shape[1]),
        lambda x, mask: x * (torch.ones(1) * x.shape[0] * x.shape[1]),
        lambda x, mask: x + x.flatten(0, 1).softmax(1).topk(2, 1).values.sum(1).view(x.shape[:2]).unsqueeze(-1),
        lambda x, mask: x * mask.unsqueeze(-1),
        lambda x, mask: x + torch.zeros(x.shape[0], x.shape[1], 1),
    ],
)
def test_what_goes_by_the_places_of_the_padded_batch_does(besides: Any) -> None:
    eager = Told(besides)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    for side in ("right", "left"):
        batch = padded([7, 4, 9], side=side)
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().unpadded.startswith("the last step computed 21 of 27")


class Rereads(Told):
    """Causal attention whose two masks are read for something else too, with a loss and labels of its own."""

    def __init__(self, gate: Any, first: int = 0, hidden_from: int = 99) -> None:
        super().__init__(None)
        self.gate, self.first, self.hidden_from = gate, first, hidden_from

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> tuple:
        hidden = self.embed(input_ids % WORDS)
        places = torch.arange(input_ids.shape[1])
        real = attention_mask[:, None, None, :] != 0
        causal = (places[None, :] <= places[:, None])[None, None]
        scores = torch.where(real, hidden.unsqueeze(1) @ hidden.unsqueeze(1).mT, torch.finfo(torch.float32).min)
        weights = torch.where(causal, scores, torch.finfo(torch.float32).min).softmax(-1)
        hidden = (hidden + (weights @ hidden.unsqueeze(1)).squeeze(1)) * self.gate(real, causal)
        logits = self.logits(self.middle(hidden))[:, self.first : -1]
        labels = torch.where(labels < 0, labels, labels % WORDS).masked_fill(places >= self.hidden_from, -100)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, self.first + 1 :].flatten()), None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Rereads(lambda real, causal: real[:, 0, 0, :, None]), "a mask of attention is read for something else"),
        (Rereads(lambda real, causal: causal[0, 0, -1, :, None]), "a mask of attention is read for something else"),
        (Rereads(lambda real, causal: causal.float().mean()), "a mask of attention is read for something else"),
        (Rereads(lambda real, causal: 1, first=1), "the loss leaves out tokens by their places"),
    ],
)
def test_masks_and_rows_that_go_by_place_are_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(cggr.CannotOptimize, match=reason):
        cggr.optimize(model, unpad=True, inner="eager")(**padded([7, 4, 9]))


def test_labels_that_the_model_hides_by_place() -> None:
    """Hidden there is the label at its own place, and not the one that is read where the next row begins."""
    eager = Rereads(lambda real, causal: 1, hidden_from=4)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    batch = padded([7, 4, 9])
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().unpadded.startswith("the last step computed 21 of 27")
    batch["labels"][1, 4] = 7
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().unpadded.startswith("the last step computed 27 of 27")


class Counts(Told):
    """Returns a number of the batch, or stores it, once without padding."""

    def __init__(self, number: Any, stored: bool) -> None:
        super().__init__(lambda x, mask: x)
        self.number, self.stored, self.last = number, stored, None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> tuple:
        loss, _ = super().forward(input_ids, attention_mask, labels)
        number = self.number(labels)
        self.last = number if self.stored else None
        return loss, number


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "number", [lambda x: x.numel(), lambda x: x.shape[1] / 2, lambda x: (x >= 0).sum(), lambda x: (x >= 0).sum(1)]
)
def test_what_counts_the_padded_batch_is_refused(number: Any, stored: bool) -> None:
    batch = padded([7, 4, 9])
    dims = getattr(number(batch["labels"]), "ndim", 0)
    model = cggr.optimize(Counts(number, stored), unpad=True, inner="eager")
    if dims and not stored:  # as all of its kind, it is not computed
        assert model(**batch)[1] is NOT_COMPUTED
        return
    with pytest.raises(cggr.CannotOptimize, match="returns or stores what it counts in the batch, padding included"):
        model(**batch)


class Watched(Told):
    """Says something of all that the tokens became."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> tuple:
        loss, _ = super().forward(input_ids, attention_mask, labels)
        return loss, self.seen.pow(2).mean()

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen = super().middle(hidden)
        return self.seen


def test_models_without_proof(padded_llama: tuple[nn.Module, Program]) -> None:
    """True asks for it, and raises; "auto" says why not."""
    with pytest.raises(cggr.CannotOptimize, match="more than the loss depends on"):
        cggr.optimize(Watched(lambda x, mask: x), unpad=True, inner="eager")(**padded([7, 4, 9]))
    step = plans.Routed(*padded_llama, ratio=1.0, unpad="auto")
    step.step(padded([7, 4, 9]))
    assert Report.of(step.runtime).unpadded == "nothing: attention of variable lengths needs CUDA"


def test_a_batch_without_a_mask_trains_as_it_is() -> None:
    eager = Toy()
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    oracle.assert_step_within(ROUNDING, *oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))
    assert model.cggr.report().unpadded == "nothing: there is no attention_mask, and no position_ids"


def test_masks_of_other_shapes_are_refused() -> None:
    batch = padded([7, 4, 9])
    batch["attention_mask"] = batch["attention_mask"][:, None, None, :].bool().expand(-1, 1, 9, -1)
    with pytest.raises(
        cggr.CannotOptimize,
        match=r"attention_mask is torch.bool .*, 1, .* expected integers or booleans of the labels",
    ):
        cggr.optimize(build("llama"), unpad=True, inner="eager")(**batch)


def test_attention_that_sees_padding_is_refused() -> None:
    """Behind the tokens causal attention sees none, where that is promised."""
    eager = Told(lambda x, mask: x * mask.unsqueeze(-1), hides_padding=False)
    batch = padded([7, 4, 9])
    with pytest.raises(cggr.CannotOptimize, match="not proved to see real tokens alone"):
        cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")(**batch)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, padding="right", inner="eager")
    oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    assert model.cggr.report().unpadded.startswith("the last step computed 21 of 27")
    in_front = padded([7, 4, 9], side="left")
    oracle.assert_step_within(ROUNDING, *oracle.step(model, in_front), *oracle.step(eager, in_front))
    assert model.cggr.report().unpadded.startswith("the last step computed 27 of 27")


def test_a_batch_of_one_row_trains_as_it_is() -> None:
    """As the last of an epoch may be; captures are of one row or of several."""
    eager = Told(lambda x, mask: x)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner="eager")
    for lengths, longest in (([5], 9), ([7, 4, 9], 9), ([5], 9), ([3, 6], 6)):
        batch = padded(lengths, longest=longest)
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
        if model.cggr.captures == 1:
            assert model.cggr.report().unpadded == "nothing: the captured batch has one row"
    assert model.cggr.report().unpadded.startswith("the last step computed 10 of 12")


def test_options_that_do_not_go_together() -> None:
    for options in ({"ratio": 0.5}, {"selection": "auto"}, {"route": "loss", "ratio": 1.0}):
        with pytest.raises(cggr.ConfigError, match="unpad=True is for steps on every row and every token"):
            cggr.RoutingConfig(unpad=True, **options)
    with pytest.raises(cggr.ConfigError, match="unpad='left' is neither a bool nor 'auto'"):
        cggr.RoutingConfig(unpad="left")


@pytest.mark.sample(1)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "modernbert"])
def test_attention_of_variable_lengths(name: str, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and windows are told to it as the mask says them, and grouped heads are not repeated."""
    monkeypatch.setattr(unpad_rows, "runs_varlen", lambda node: True)
    eager = build(name)
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, inner=inner)
    with flash_on_the_cpu():
        for seed, lengths in enumerate(([7, 4, 9, 2], [3, 8, 1, 5], [12, 2, 1])):
            for side in ("right", "left"):
                batch = padded(lengths, seed, side, longest=12)
                oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    layers = eager.config.num_hidden_layers
    attention = f"{layers} attentions of variable lengths"
    assert model.cggr.report().unpadded == f"the last step computed 16 of 36 places; {attention}"
    graph = model.cggr.runtime.plans[-1].unpadded.route.program.graph
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten._flash_attention_forward.default)
    heads = getattr(eager.config, "num_key_value_heads", eager.config.num_attention_heads)
    assert {value(node.args[1]).shape[1] for node in nodes} == {heads}


@pytest.mark.sample(1)
@pytest.mark.parametrize("varlen", [False, True])
def test_checkpointed_layers_stay_one_checkpoint_each(varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where padding is promised to be behind, so that no mask is left to put another in the place of."""
    monkeypatch.setattr(unpad_rows, "runs_varlen", lambda node: varlen)
    eager = build("llama")
    eager.gradient_checkpointing_enable()
    model = cggr.optimize(copy.deepcopy(eager), unpad=True, padding="right", inner="eager")
    batch = padded([7, 4, 9, 2], longest=12)
    with flash_on_the_cpu():
        oracle.assert_step_within(ROUNDING, *oracle.step(model, batch), *oracle.step(eager, batch))
    written = model.cggr.runtime.plans[-1].unpadded.route.variant.module
    assert len([name for name, _ in written.named_children() if name.startswith("checkpoint_")]) == 3


@pytest.mark.gpu
@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options", [{"inner": "eager"}, {"inner": "inductor"}, {"inner": "inductor", "cuda_graphs": True}]
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_on_a_gpu_attention_is_of_variable_lengths(name: str, options: dict[str, Any]) -> None:
    truth = build(name).cuda()
    model = cggr.optimize(copy.deepcopy(truth), unpad="auto", **options)
    lengths = ([7, 4, 9, 2], [3, 8, 1, 5], [3, 8, 1, 5], [3, 8, 1, 5])
    batches = [padded(each, seed, longest=12) for seed, each in enumerate(lengths)]
    oracle.assert_autocast_steps_no_further(model, truth, batches)
    assert model.cggr.report().unpadded == "the last step computed 18 of 48 places; 3 attentions of variable lengths"


@pytest.mark.gpu
def test_a_trainer_on_a_gpu_leaves_padding_out_by_itself(tmp_path: Path) -> None:
    """`cggr.route` alone; losses are the plain trainer's within the precision of bfloat16's products."""
    batch = padded([7, 4, 9, 2] * 4, longest=12)
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    plain = build("llama")
    losses = []
    for model, routed in ((copy.deepcopy(plain), True), (plain, False)):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        if routed:
            cggr.route(trainer)
        trainer.train()
        if routed:
            assert "attentions of variable lengths" in model.cggr.report().unpadded
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
