"""The segment route against eager on the kept documents: packed anew bitwise, each by itself within rounding."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import oracle
import plans
import pytest
import segment_oracle
import torch
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build, eager_of
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_oracle import packed
from torch import nn
from toys import WORDS, Toy

import cggr_compile as cggr
from cggr_compile.inspection.explanation import Diff, Report
from cggr_compile.ir.program import Program
from cggr_compile.schedule import kept_of

LONG = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "long"
EXAMPLES = 200 if LONG else 12
LLAMA = ARCHITECTURES["llama"]
SEVERAL = [[3, 2, 4, 1, 3], [1, 1, 5, 2, 4], [6, 1, 1, 5], [2, 2, 2, 2, 2, 3]]
LONGER = [[2, 5, 1, 7, 3]]
# A product of the widths and the longest sum over tokens, forward and backward.
ROUNDING = oracle.rounding(COMMON["hidden_size"], COMMON["intermediate_size"], VOCABULARY, 64)

FAMILIES = ["gemma3", "mistral", "gpt2", "mixtral"]  # Llama is that of the other tests
OTHERS = ["llama", "qwen3", "phi3", "gpt_neox", "olmo2", "qwen3_moe", "cohere", "gemma2"]


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = eager_of(LLAMA)
    return model, plans.captured(model, packed(SEVERAL))


@pytest.fixture(scope="module")
def routed(llama: tuple[nn.Module, Program]) -> dict[str, plans.Routed]:
    return {
        selection: plans.Routed(*llama, route="segment", selection=selection, seed=1)
        for selection in ("topk", "random", "trimmed")
    }


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Documents of one token and more, labels ignored at random, those of first tokens too or not."""
    total = draw(st.integers(4, 16))
    rows = []
    for _ in range(draw(st.integers(2, 4))):
        row, left = [], total
        while left:
            row.append(draw(st.integers(1, min(left, draw(st.sampled_from([1, 3, 8]))))))
            left -= row[-1]
        rows.append(row)
    ignored = draw(st.sampled_from([0.0, 0.3, 0.9]))
    return packed(rows, draw(st.integers(0, 2**16)), ignored, first_ignored=draw(st.booleans()))


@settings(max_examples=EXAMPLES)
@given(
    batch=batches(),
    ratio=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    selection=st.sampled_from(["topk", "random", "trimmed"]),
)
def test_contract(
    routed: dict[str, plans.Routed], batch: dict[str, torch.Tensor], ratio: float, selection: str
) -> None:
    """Whole documents with counted labels train, as they do by themselves; where none fits, the loss is 0."""
    step = routed[selection].at(ratio)
    eager = copy.deepcopy(step.model)
    actual = step.step(batch)
    rows, length = batch["input_ids"].shape
    k = kept_of(step.runtime.config.ratio, length)
    if k == length:  # the plain step
        assert torch.equal(step.selected, torch.arange(length).expand(rows, -1))
        if oracle.counted(batch["labels"], causal=True).any():
            oracle.assert_same_step(*actual, *oracle.step(eager, batch))
        return
    known = {(d.row, place): d for d in segment_oracle.documents_of(batch) for place in d.places}
    at = [(row, place) for row, places in enumerate(step.selected.tolist()) for place in places if place >= 0]
    taken = sorted({known[place] for place in at})
    assert torch.equal(step.selected, segment_oracle.places_of(taken, rows, k))
    assert all(document.counted for document in taken)
    if selection == "topk":
        assert taken == segment_oracle.expected_documents(eager, LLAMA, batch, k, 2)
    if not taken:
        assert all(not d.counted or len(d.places) > k for d in known.values())
        assert actual[0] == 0  # where eager says 0 / 0
        assert all(gradient is not None and not gradient.any() for gradient in actual[1].values())
        return
    oracle.assert_same_step(*actual, *oracle.step(eager, segment_oracle.repacked(batch, step.selected)))
    oracle.assert_step_within(ROUNDING, *actual, *segment_oracle.step_alone(eager, batch, taken))


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_over_num_items_in_batch_stands_for_the_whole_batch(
    routed: dict[str, plans.Routed], shape: tuple[int, ...]
) -> None:
    """The kept tokens' mean, times the counted tokens of the batch over the number it is divided by."""
    batch = packed(SEVERAL)
    total = (batch["labels"] != -100).sum()
    model = cggr.optimize(build("llama"), route="segment", ratio=0.5, router_layers=2, inner="eager")
    loss = model(**batch, num_items_in_batch=(2 * total).view(shape)).loss
    assert model.cggr.metrics()["tokens_total"] == total
    mean, _ = routed["topk"].at(0.5).step(batch)
    torch.testing.assert_close(loss, (mean / 2).view(shape), rtol=ROUNDING, atol=0.0)


def test_one_entry_of_a_batch_of_one_row_may_be_the_rows() -> None:
    """And then it would not be known what each document has of it."""
    batch = {name: tensor[:1] for name, tensor in packed(SEVERAL).items()}
    model = cggr.optimize(build("llama"), route="segment", ratio=0.5, inner="eager")
    with pytest.raises(
        cggr.CannotOptimize, match=r"num_items_in_batch of shape \(1,\).*number for the whole batch without"
    ):
        model(**batch, num_items_in_batch=torch.tensor([9]))


@pytest.mark.long
def test_two_compilations_for_any_lengths(llama: tuple[nn.Module, Program]) -> None:
    options = {"route": "segment", "selection": "trimmed", "seed": 0}
    compiled, plain = (plans.Routed(*llama, inner=inner, **options) for inner in ("aot_eager", "eager"))
    for seed, lengths in enumerate((SEVERAL, [[2, 5, 1, 7, 3], [9, 9]], [[1, 2, 1, 3], [3, 4], [7]])):
        batch = packed(lengths, seed)
        oracle.assert_step_within(ROUNDING, *compiled.step(batch), *plain.step(batch))
        assert torch.equal(compiled.selected, plain.selected)
    assert [route.variant.compilations for route in compiled.plan.routes.values()] == [2]


@pytest.mark.long
def test_the_balance_of_experts_counts_empty_places() -> None:
    eager = build("mixtral")
    eager.set_attn_implementation("eager")
    model = cggr.optimize(copy.deepcopy(eager), route="segment", ratio=0.5, router_layers=2, inner="eager")
    batch = packed([[5, 5, 3], [3, 5, 5]])
    actual = oracle.step(model, batch)
    repacked = segment_oracle.repacked(batch, model.cggr.selected)
    oracle.assert_same_step(*actual, *oracle.step(eager, repacked))
    filled = [int((places >= 0).sum()) for places in model.cggr.selected]
    assert max(filled) < 7
    shorter = {name: tensor[:, : max(filled)] for name, tensor in repacked.items()}
    assert eager(**repacked).aux_loss != eager(**shorter).aux_loss


@pytest.mark.long
def test_depth_and_documents(llama: tuple[nn.Module, Program]) -> None:
    """While two layers train, the kept documents train them."""
    eager = copy.deepcopy(llama[0])
    model = cggr.optimize(
        copy.deepcopy(eager), route=("depth", "segment"), depth_layers=2, router_layers=1, ratio=0.5, inner="eager"
    )
    batch = packed(SEVERAL)
    loss, _ = oracle.step(model, batch)
    expected, _ = oracle.step(oracle.truncated(eager, LLAMA, 2), segment_oracle.repacked(batch, model.cggr.selected))
    assert torch.equal(loss, expected)
    assert (model.cggr.selected >= 0).any()


def test_check_judges_it_by_an_oracle_of_its_own() -> None:
    eager = build("llama")
    eager.set_attn_implementation("eager")
    found = cggr.check(eager, packed(SEVERAL), packed([[2, 5, 1, 7, 3], [9, 9]]), route="segment")
    assert found.exact, found
    assert any(place >= 0 for row in found.selected[1] for place in row)


def test_report_diff_and_metrics(llama: tuple[nn.Module, Program]) -> None:
    step = plans.Routed(*llama, route="segment", ratio=0.25, prediction_metrics=True)
    batch = packed([[5, 3, 2, 3], [1, 4, 4, 4]])
    step.step(batch)
    text, diff = str(Report.of(step.runtime)), Diff.of(step.runtime)
    assert "topk, k = ceil(0.25 · S) = 4 of 13 tokens of each sequence, in whole documents" in text
    assert "mean over a document's counted tokens" in text
    assert "input_ids (dim 1), position_ids (dim 1), labels (dim 1)" in text
    summary = diff.summary()
    assert "+ select: topk, k = ceil(0.25 · S) tokens of each sequence, in whole documents" in summary
    assert "inputs gathered: input_ids, position_ids, labels (dim 1: S → k)" in summary
    assert "~ main pass: S → k in " in summary
    added = [row.text for row in diff.rows() if row.mark == "+" and "aten.linear" in row.text]
    assert not [text for text in added if not text.lstrip().startswith("%router.")], added
    assert "pass on the residual" not in summary
    assert "k = 4 tokens" in diff.to_html()
    # Everything on 4 of 13 tokens: a fourth of the linear parts, less of attention.
    assert (4 / 13) ** 2 < Report.of(step.runtime).cost.random_ratio < 4 / 13
    found = plans.metrics(step) | cggr.run.metrics.token_metrics(("segment",), step.runtime.last)
    kept = segment_oracle.places_of(segment_oracle.expected_documents(step.model, LLAMA, batch, 4, 2), 2, 4)
    assert {name: found[name].item() for name in ("documents_total", "documents_selected", "documents_too_long")} == {
        "documents_total": 7,
        "documents_selected": 2,
        "documents_too_long": 1,
    }
    assert found["token_kept_ratio"] == (kept >= 0).sum() / 26
    assert found["tokens_total"] == 26 - 8
    assert found["tokens_selected"] == (segment_oracle.repacked(batch, kept)["labels"] != -100).sum()
    assert {"entropy", "mean_token_accuracy"} <= found.keys()
    assert not {"rows_nan_score", "score_mean", "selection_rate_long"} & found.keys()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"position_ids": None}, r"no position_ids \[batch, sequence\] of int64.*position_ids that restart"),
        ("llama", {"attention_mask": torch.ones(4, 13, dtype=torch.int64)}, "keep documents apart.*no attention_mask"),
        ("bert", {}, "the mask of an attention is not proved to keep documents apart"),
    ],
)
def test_what_lets_documents_meet_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    batch = {key: x for key, x in (packed(SEVERAL) | changes).items() if x is not None}
    model = cggr.optimize(build(name), route="segment", ratio=0.5, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=message):
        model(**batch)


@pytest.mark.long
def test_boundaries_for_flash_attention_may_come_along() -> None:
    """The model's masks are made of the positions, whatever else says where documents end."""
    batch, ends = packed([SEVERAL[0]]), torch.tensor([0, 3, 5, 9, 10, 13], dtype=torch.int32)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    eager = build("llama")
    model = cggr.optimize(copy.deepcopy(eager), route="segment", ratio=0.5, router_layers=2, inner="eager")
    actual = oracle.step(model, batch | told)
    oracle.assert_same_step(*actual, *oracle.step(eager, segment_oracle.repacked(batch, model.cggr.selected)))
    assert (model.cggr.selected >= 0).any()
    del batch["position_ids"]
    with pytest.raises(cggr.CannotOptimize, match="no position_ids"):
        cggr.optimize(copy.deepcopy(eager), route="segment", ratio=0.5, inner="eager")(**batch | told)


def test_labels_that_are_the_ids_themselves_are_refused() -> None:
    """One tensor is one input of the graph: what is ignored as a label would be gone as a token."""
    batch = packed(SEVERAL)
    model = cggr.optimize(Meeting(attention(True)), route="segment", ratio=0.5, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"made of input_ids, .*labels=input_ids\.clone\(\)"):
        model(**{**batch, "labels": batch["input_ids"]})


def test_positions_that_would_join_documents_raise(routed: dict[str, plans.Routed]) -> None:
    batch = packed(SEVERAL)
    batch["position_ids"][1, 7:] += 3
    with pytest.raises(ValueError, match="at place 7 of sequence 1 they go from 4 to 3; let every document"):
        routed["topk"].at(0.5).step(batch)


Meet = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Meeting(Toy):
    """Tokens meet as `meet` makes of hidden states, ids and positions."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self.meet = meet

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> tuple:
        hidden = self.embed(input_ids % WORDS) + position_ids.unsqueeze(-1) / 8
        hidden = self.middle(self.meet(hidden, input_ids, position_ids))
        return self.loss(self.logits(hidden), torch.where(labels < 0, labels, labels % WORDS)), None


def attention(sees_itself: bool, dim: int = -1, fill: float = -torch.inf) -> Meet:
    """Attention of a head inside of documents, written out."""

    def meet(hidden: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        documents = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        places = torch.arange(ids.shape[1])
        seen = places[None, None, None, :] <= places[None, None, :, None] - int(not sees_itself)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        heads = hidden.unsqueeze(1)
        weights = (heads @ heads.mT).masked_fill(~seen, fill).softmax(dim)
        return hidden + (weights @ heads).squeeze(1)

    return meet


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("meet", "reason"),
    [
        (lambda hidden, ids, positions: hidden + hidden.roll(1, 1), "roll runs along the sequence"),
        (lambda hidden, ids, positions: hidden + ids.roll(1, 1).unsqueeze(-1), "roll runs along the sequence"),
        (lambda hidden, ids, positions: hidden + hidden.mean(1, keepdim=True), "mean adds up tokens, and is no"),
        (lambda hidden, ids, positions: hidden + hidden.sum(), "sum adds up tokens, and is no attention"),
        (lambda hidden, ids, positions: hidden * positions.max(), "max adds up tokens, and is no attention"),
        (lambda hidden, ids, positions: hidden @ hidden.mT @ hidden, "matmul adds up tokens, and is no attention"),
        (lambda hidden, ids, positions: hidden + hidden.sort(1).values, "whether aten.sort.default computes each"),
        (lambda hidden, ids, positions: hidden * hidden.softmax(1), "softmax adds up tokens, and is no attention"),
        (attention(sees_itself=False), "the mask of an attention is not proved"),
        (attention(sees_itself=True, fill=-5.0), "documents of a packed sequence are not proved to be independent"),
        (attention(sees_itself=True, dim=-2), "documents of a packed sequence are not proved to be independent"),
    ],
)
def test_meetings_of_documents_are_refused(meet: Meet, reason: str) -> None:
    model = cggr.optimize(Meeting(meet), route="segment", ratio=0.5, selection="random", inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**packed(SEVERAL))


class Told(Toy):
    """Reads something of the documents besides."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor
    ) -> tuple:
        hidden = self.embed(input_ids % WORDS) + position_ids.unsqueeze(-1) / 8 + lengths.float().mean()
        return self.loss(self.logits(self.middle(hidden)), torch.where(labels < 0, labels, labels % WORDS)), None


def test_what_has_no_entry_for_each_token_is_refused() -> None:
    model = cggr.optimize(Told(), route="segment", ratio=0.5, selection="random", inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"the model reads lengths of shape \(5,\), and it cannot be told"):
        model(**packed(SEVERAL), lengths=torch.tensor(SEVERAL[0]))


def test_attention_written_out_inside_of_documents_is_not() -> None:
    batch = packed(SEVERAL)
    model = cggr.optimize(Meeting(attention(True)), route="segment", ratio=0.5, selection="random", inner="eager")
    actual = oracle.step(model, batch)
    positions = model.cggr.selected
    cggr.restore(model)
    oracle.assert_same_step(*actual, *oracle.step(model, segment_oracle.repacked(batch, positions)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "importance"}, "what fits into k says which documents are taken.*valid selections: topk, fixed"),
        ({"dynamic_threshold": True}, "is for whole sequences and route='segment' selects documents"),
        ({"route": ("segment", "loss")}, "is not a combination of routes"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**{"route": "segment", "ratio": 0.5, **options})


@pytest.mark.sample(1)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", FAMILIES + (OTHERS if LONG else []))
def test_families(name: str, rows: int) -> None:
    """Selection, loss and every gradient, for other lengths by the same capture; while everything is kept the model is
    the plain one."""
    architecture = ARCHITECTURES[name]
    eager = build(name)
    eager.set_attn_implementation("eager")
    eager.config.output_router_logits = False
    options = {"route": "segment", "ratio": 0.5, "router_layers": 2, "inner": "eager", "warmup_steps": 1}
    model = cggr.optimize(copy.deepcopy(eager), **options)
    batches = [packed(SEVERAL[:rows], seed=1), packed((LONGER * 4)[:rows], seed=2, ignored=0.3)]
    oracle.assert_same_step(*oracle.step(model, batches[0]), *oracle.step(eager, batches[0]))
    assert torch.equal(model.cggr.selected, torch.arange(13).expand(rows, -1))
    model.cggr.step()
    for batch in batches:
        actual, k = oracle.step(model, batch), -(-batch["input_ids"].shape[1] // 2)
        documents = segment_oracle.expected_documents(eager, architecture, batch, k, 2)
        positions = segment_oracle.places_of(documents, rows, k)
        assert torch.equal(model.cggr.selected, positions)
        oracle.assert_same_step(*actual, *oracle.step(eager, segment_oracle.repacked(batch, positions)))
        oracle.assert_step_within(ROUNDING, *actual, *segment_oracle.step_alone(eager, batch, documents))
    assert model.cggr.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"inner": "eager"}, {"inner": "inductor"}, {"inner": "inductor", "cuda_graphs": True}]
)
def test_a_steady_step_on_a_gpu_never_synchronises(options: dict[str, Any]) -> None:
    eager = eager_of(LLAMA).cuda()
    model = cggr.optimize(copy.deepcopy(eager), route="segment", ratio=0.5, router_layers=2, **options)
    batches = [{name: tensor.cuda() for name, tensor in packed(SEVERAL, seed).items()} for seed in range(4)]
    for batch in batches[:3]:
        oracle.step(model, batch)
    torch.cuda.synchronize()
    with oracle.without_sync():
        actual = oracle.step(model, batches[3])
    documents = segment_oracle.expected_documents(eager, LLAMA, batches[3], 7, 2)
    assert torch.equal(model.cggr.selected.cpu(), segment_oracle.places_of(documents, 4, 7))
    expected = oracle.step(eager, segment_oracle.repacked(batches[3], model.cggr.selected))
    oracle.assert_step_within(ROUNDING, *actual, *expected)


@pytest.mark.parametrize("cached", [False, True])
def test_transformers_keeps_documents_apart_without_a_cache_only(cached: bool) -> None:
    """What the documents say of `use_cache`, which evaluation and eager training have on by default."""
    eager = build("llama")
    eager.config.use_cache = cached
    ids = torch.arange(3, 12)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        together = eager(input_ids=ids, position_ids=positions).logits[:, 4:]
        alone = eager(input_ids=ids[:, 4:]).logits
    assert torch.allclose(together, alone, rtol=0, atol=1e-5) == (not cached)


class Placed(Toy):
    """Adds an entry of a table by the place in the row, and sees positions beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, self.embed.embedding_dim))

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple:
        hidden = self.embed(input_ids) + self.table[: input_ids.shape[1]] + self.table[position_ids]
        logits = self.logits(self.middle(hidden))
        return (self.loss(logits, labels), logits)


def test_places_are_those_of_the_row_that_is_packed_anew() -> None:
    torch.manual_seed(0)
    eager = Placed().train()
    batch = packed([[5, 7], [12], [4, 4, 4], [6, 6]])
    batch["input_ids"], batch["labels"] = batch["input_ids"] % WORDS, batch["labels"].clamp(max=WORDS - 1)
    model = cggr.optimize(copy.deepcopy(eager), route="segment", ratio=0.5, selection="random", inner="eager")
    loss, gradients = oracle.step(model, batch)
    again = segment_oracle.repacked(batch, model.cggr.selected)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, again), rtol=1e-6, atol=1e-6)
