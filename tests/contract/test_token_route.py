"""The token route against a hand-written eager model whose middle layers run on the gathered tokens: bitwise."""

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
from architectures import ARCHITECTURES, GROUPED, VOCABULARY, Architecture, build, eager_of, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small
from torch import Tensor, nn
from toys import WIDTH, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.checking.eager_tokens import TokensNotTold
from cggr_compile.inspection.explanation import Diff, Report
from cggr_compile.ir.program import Program
from cggr_compile.schedule import kept_of

LONG = os.environ.get("HYPOTHESIS_PROFILE", "ci") == "long"
EXAMPLES = 200 if LONG else 8
LAYERS = 5

DEEP = Architecture(
    "deep llama", lambda: T.LlamaForCausalLM(T.LlamaConfig(**{**GROUPED, "num_hidden_layers": LAYERS})), "model.layers"
)
WINDOWS = (2, 5, 32) if LONG else (5,)

# One of each kind that enters the layers: rotary tables, ALiBi folded into heads, two masks, a router's statistics.
FAMILIES = ["llama", "bloom", "gemma3", "qwen3_moe"]
OTHERS = [
    "qwen3",
    "phi3",
    "gptj",
    "gpt_neox",
    "falcon",
    "opt",
    "mixtral",
    "gpt_oss",
    "mistral",
    "gpt2",
    "bert",
    "modernbert",
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", FAMILIES + (OTHERS if LONG else []))
@pytest.mark.parametrize("padded", [True, False] if LONG else [True])
def test_families(name: str, padded: bool) -> None:
    """While every token is kept the model is the plain one; afterwards positions, loss and every gradient are those of
    eager on the positions that an eager router selects; other batch sizes and lengths reuse the capture."""
    architecture = ARCHITECTURES[name]
    eager = build(name)
    if not padded and name != "falcon":  # Falcon's classes choose their attention when they are built
        eager.set_attn_implementation("eager")
    options = {"route": "token", "ratio": 0.5, "selection": "topk", "router_layers": 2, "inner": "eager"}
    options["warmup_steps"] = 1
    model = cggr.optimize(copy.deepcopy(eager), **options)
    batches = [token_batch(masked=padded, seed=1), token_batch(9, 14, masked=padded, seed=2)]
    for batch in batches:
        oracle.assert_same_step(*oracle.step(model, batch), *oracle.step(eager, batch))
        assert torch.equal(
            model.cggr.selected, torch.arange(batch["input_ids"].shape[1]).expand(len(batch["labels"]), -1)
        )
    model.cggr.step()
    for batch in batches:
        actual = oracle.step(model, batch)
        positions = token_oracle.expected_positions(eager, architecture, batch, 0.5, 2)
        assert torch.equal(model.cggr.selected, positions)
        expected = token_oracle.step(eager, architecture, batch, range(1, 2), positions)
        oracle.assert_same_step(*actual, *expected)
    assert model.cggr.captures == 1


@pytest.fixture(scope="module")
def deep() -> tuple[nn.Module, Program]:
    model = eager_of(DEEP)
    return model, plans.captured(model, token_batch())


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("middle", "options"),
    [
        (range(1, 4), {"selection": "random", "seed": 3}),
        (range(2, 5), {"first_layers": 2, "last_layers": 0}),
        (range(1, 4), {"selection": "random", "resample": "layer"}),
        (range(3, 4), {"first_layers": 3, "selection": "trimmed", "selection_options": {"epsilon": 0.5}}),
        (
            range(1, 4),
            {"selection": "trimmed", "selection_options": {"epsilon": 0.5}, "resample": "layer", "scoring": "entropy"},
        ),
    ],
)
def test_options(deep: tuple[nn.Module, Program], middle: range, options: dict[str, Any]) -> None:
    eager = copy.deepcopy(deep[0])
    routed = plans.Routed(*deep, route="token", ratio=0.4, **options)
    batch = token_batch(7, 10)
    actual = routed.step(batch)
    positions = routed.selected
    layers = (len(middle),) if options.get("resample") == "layer" else ()
    assert positions.shape == (*layers, 7, 4)
    assert torch.equal(positions, positions.sort(-1).values)
    if layers:
        assert not torch.equal(positions[0], positions[1])
    oracle.assert_same_step(*actual, *token_oracle.step(eager, DEEP, batch, middle, positions))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Ids with padding on either side, up to all but one token, and labels ignored at random."""
    rows, length = draw(st.integers(2, 5)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    pads = torch.randint(0, length, (rows, 1), generator=generator)
    places = torch.arange(length).expand(rows, length)
    real = places >= pads if draw(st.booleans()) else places < length - pads
    ignored = ~real | (torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.6])))
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(ignored, -100)}


@pytest.fixture(scope="module")
def routed(deep: tuple[nn.Module, Program]) -> dict[str, tuple[range, plans.Routed]]:
    """A plan for each selection, with different layers kept dense."""
    dense = {"topk": (1, 1), "random": (3, 0), "trimmed": (2, 1)}
    return {
        selection: (
            range(first, LAYERS - last),
            plans.Routed(*deep, route="token", selection=selection, first_layers=first, last_layers=last, seed=1),
        )
        for selection, (first, last) in dense.items()
    }


@settings(max_examples=EXAMPLES)
@given(
    batch=batches(),
    ratio=st.sampled_from([0.1, 1 / 3, 0.5, 0.9]),
    selection=st.sampled_from(["topk", "random", "trimmed"]),
)
def test_contract(
    routed: dict[str, tuple[range, plans.Routed]], batch: dict[str, torch.Tensor], ratio: float, selection: str
) -> None:
    """Positions are distinct, sorted and of real tokens first; the step is the eager model's on them."""
    middle, step = routed[selection]
    eager = copy.deepcopy(step.model)
    actual = step.at(ratio).step(batch)
    positions = step.selected
    rows, length = batch["input_ids"].shape
    kept = kept_of(step.runtime.config.ratio, length)
    assert positions.shape == (rows, kept)
    assert (positions.diff(dim=1) > 0).all()
    real = batch["attention_mask"]
    assert torch.equal(real.gather(1, positions).sum(1), real.sum(1).clamp(max=kept))
    if selection == "topk" and kept < length:
        assert torch.equal(positions, token_oracle.expected_positions(eager, DEEP, batch, ratio, 2))
    if not oracle.counted(batch["labels"], causal=True).any():
        assert actual[0] == 0  # where eager says 0 / 0
        return
    expected = token_oracle.step(eager, DEEP, batch, middle, positions)
    oracle.assert_same_step(*actual, *expected)


def windowed(window: int) -> Architecture:
    config = T.MistralConfig(**GROUPED, sliding_window=window)
    return Architecture(f"mistral with windows of {window}", lambda: T.MistralForCausalLM(config), "model.layers")


@pytest.fixture(scope="module")
def packed() -> dict[int, plans.Routed]:
    """A plan for each window: the size is a constant of the graph."""
    models = {window: eager_of(windowed(window)) for window in WINDOWS}
    return {
        window: plans.Routed(
            model, plans.captured(model, packed_batch(6, 12, 0)), route="token", selection="random", seed=1
        )
        for window, model in models.items()
    }


def packed_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Documents behind one another: `position_ids` restart at each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.3
    places = torch.arange(length).expand(rows, length)
    begun = torch.where(starts, places, 0).cummax(1).values
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": places - begun}


@pytest.mark.long
@settings(max_examples=EXAMPLES)
@given(
    window=st.sampled_from(WINDOWS),
    rows=st.integers(2, 5),
    length=st.integers(4, 14),
    seed=st.integers(0, 99),
    ratio=st.sampled_from([0.3, 0.6]),
)
def test_packed_sequences_in_windows(
    packed: dict[int, plans.Routed], window: int, rows: int, length: int, seed: int, ratio: float
) -> None:
    """A kept token sees the kept ones of its document that were in its window before."""
    routed = packed[window]
    eager = copy.deepcopy(routed.model)
    batch = packed_batch(rows, length, seed)
    actual = routed.at(ratio).step(batch)
    expected = token_oracle.step(eager, windowed(window), batch, range(1, 2), routed.selected)
    oracle.assert_same_step(*actual, *expected)


def test_skipped_tokens_pass_on_the_residual(deep: tuple[nn.Module, Program]) -> None:
    """Without dense layers behind, a loss on skipped tokens alone gives the middle layers no gradient."""
    model, program = deep
    routed = plans.Routed(model, program, route="token", ratio=0.25, selection="random", seed=5, last_layers=0)
    batch = token_batch(masked=False) | {"attention_mask": torch.ones(6, 12, dtype=torch.int64)}
    routed.step(batch)
    predicted = torch.zeros(6, 12, dtype=torch.bool).scatter(1, routed.selected, True).roll(1, 1)
    batch["labels"] = batch["input_ids"].masked_fill(predicted, -100)
    again = plans.Routed(model, program, route="token", ratio=0.25, selection="random", seed=5, last_layers=0)
    _, gradients = again.step(batch)
    assert torch.equal(again.selected, routed.selected)
    for name, gradient in gradients.items():
        in_the_middle = any(f"layers.{layer}." in name for layer in range(1, LAYERS))
        assert bool(gradient.any()) is not in_the_middle, name


def test_schedule_ends_dense_with_a_bounded_number_of_sizes(deep: tuple[nn.Module, Program]) -> None:
    eager = copy.deepcopy(deep[0])
    routed = plans.Routed(*deep, route="token", ratio=0.25, selection="random", warmup_steps=4, dense_after_steps=12)
    batch = token_batch(4, 16)
    kept = []
    for _ in range(13):
        actual = routed.step(batch)
        kept.append(routed.selected.shape[1])
        routed.runtime.steps += 1
    assert kept == [16, 13, 10, 7, 4, 6, 7, 9, 10, 12, 13, 15, 16]
    oracle.assert_same_step(*actual, *oracle.step(eager, batch))


def test_report_and_diff_name_what_is_gathered(deep: tuple[nn.Module, Program]) -> None:
    routed = plans.Routed(*deep, route="token", ratio=0.25)
    report, diff = Report.of(routed.runtime), Diff.of(routed.runtime)
    text = str(report)
    assert "topk, k = ceil(0.25 · S) = 3 of 12 tokens of each sequence" in text
    assert "layers 1–3 of 5; the other tokens pass on the residual" in text
    gathered = {(entry.shape, entry.dims) for entry in report.shortened}
    assert gathered == {("[B, S, 32]", (1,)), ("[1, 1, S, 8]", (2,)), ("[B, 1, S, S]", (2, 3))}
    summary = diff.summary()
    assert "the residual that enters layers 1–3" in summary
    assert "~ layers 1–3 of 5: S → k in " in summary
    for entry in report.shortened:
        assert any(f"%{entry.name}:" in row.text for row in diff.rows()), entry.name
    # Three of five layers at 3 of 12 tokens: their linear parts at a quarter, attention's square at a sixteenth.
    layer = report.cost.layer_flops[1]
    saved = 1 - report.cost.random_ratio
    share = 3 * layer / report.cost.forward_flops
    assert 3 / 4 * share < saved < 15 / 16 * share
    assert "tokens of each sequence" in diff.to_html()


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, *([torch.bfloat16, torch.uint8] if LONG else [])])
def test_a_padding_mask_of_any_dtype_tells_padding(dtype: torch.dtype) -> None:
    batch = {name: x % 31 for name, x in token_batch().items()}
    batch["attention_mask"][:, 9:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    steps, positions = [], []
    for mask in (batch["attention_mask"], batch["attention_mask"].to(dtype)):
        model = cggr.optimize(small(), route="token", ratio=0.4, selection="random", seed=0, inner="eager")
        steps.append(oracle.step(model, batch | {"attention_mask": mask}))
        positions.append(model.cggr.selected)
    assert torch.equal(*positions)
    assert batch["attention_mask"].gather(1, positions[1]).all()
    oracle.assert_same_step(*steps[1], *steps[0])


TABLES: dict[str, Callable[..., Tensor]] = {
    "counted": lambda table, hidden: table[torch.arange(hidden.shape[1])],
    "sliced": lambda table, hidden: table[: hidden.shape[1]],
    "narrowed": lambda table, hidden: table.narrow(0, 0, hidden.shape[1]),
    "expanded": lambda table, hidden: table[None, : hidden.shape[1]].expand(len(hidden), -1, -1),
    "modulo": lambda table, hidden: table[torch.arange(hidden[..., 0].numel()) % hidden.shape[1]].view_as(hidden),
}


class Tabled(Toy):
    """Adds an entry for each position to what every layer reads."""

    def __init__(self, read: str) -> None:
        super().__init__(4)
        self.read = TABLES[read]
        self.table = nn.Parameter(torch.randn(40, WIDTH))

    def middle(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        for index, layer in enumerate(self.layers):
            if positions is None or index in (0, 3):
                hidden = hidden + layer(hidden + self.read(self.table, hidden)).tanh()
                continue
            rows = torch.arange(len(hidden)).unsqueeze(1)
            kept = hidden[rows, positions]
            hidden = hidden.index_put((rows, positions), kept + layer(kept + self.table[positions]).tanh())
        return hidden


class Reader(nn.Module):
    def __init__(self, read: str) -> None:
        super().__init__()
        self.read, self.table, self.mix = TABLES[read], nn.Parameter(torch.randn(40, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(hidden + self.read(self.table, hidden)).tanh()


class Cutting(Toy):
    """Layers that are modules with tables of their own."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reader(read) for _ in range(4))

    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        *loss, logits = super().forward(input_ids, labels)
        return T.modeling_outputs.CausalLMOutput(*loss, logits=logits)


@pytest.mark.parametrize("read", TABLES)
def test_entries_for_positions_are_those_of_the_whole_sequence(read: str) -> None:
    """However a layer finds them; the eager model, by hand, runs its middle layers on the kept tokens."""
    torch.manual_seed(0)
    eager, batch = Tabled(read).train(), toy_batch(4)
    model = cggr.optimize(copy.deepcopy(eager), route="token", ratio=0.5, inner="eager")
    if read == "modulo":
        with pytest.raises(cggr.CannotOptimize, match="cannot tell which tokens"):
            model(**batch)
        return
    loss = model(**batch)[0]
    loss.backward()
    hidden = eager.middle(eager.embed(batch["input_ids"]), model.cggr.selected)
    wanted = eager.loss(eager.logits(hidden), batch["labels"])
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for (name, found), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("read", ["counted", "sliced"])
def test_layers_that_find_places_themselves_are_not_judged(read: str) -> None:
    """Alone on k tokens the module would read the first k entries of its table."""
    torch.manual_seed(0)
    with pytest.raises(TokensNotTold, match="it numbers its tokens itself"):
        cggr.check(Cutting(read).train(), toy_batch(4), route="token")


def test_windows_that_a_layer_cuts_out_of_a_buffer_are_of_the_whole_sequence() -> None:
    """GPT-Neo's local attention; eager by hand, with the mask of the kept tokens' positions."""
    torch.manual_seed(0)
    eager = T.GPTNeoForCausalLM(
        T.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            attention_types=[[["local"], 4]],
            window_size=3,
            max_position_embeddings=64,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).train()
    ids = torch.randint(3, VOCABULARY, (4, 13))
    model = cggr.optimize(copy.deepcopy(eager), route="token", ratio=0.5, inner="eager")
    loss, positions = model(input_ids=ids, labels=ids).loss, model.cggr.selected
    inner, rows, every = eager.transformer, torch.arange(4).unsqueeze(1), torch.arange(13).expand(4, 13)

    def run(layer: nn.Module, hidden: Tensor, places: Tensor) -> Tensor:
        attention, normed = layer.attn.attention, layer.ln_1(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (projection(normed).unflatten(-1, (4, 8)).transpose(1, 2) for projection in projections)
        distance = places.unsqueeze(2) - places.unsqueeze(1)
        weights = (q @ k.mT).masked_fill(((distance < 0) | (distance >= 3)).unsqueeze(1), -torch.inf).softmax(-1)
        hidden = hidden + attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.ln_2(hidden))

    hidden = run(inner.h[0], inner.wte(ids) + inner.wpe(every), every)
    kept = hidden[rows, positions]
    for layer in inner.h[1:3]:
        kept = run(layer, kept, positions)
    hidden = run(inner.h[3], hidden.index_put((rows, positions), kept), every)
    logits = eager.lm_head(inner.ln_f(hidden))
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), rtol=1e-6, atol=0
    )
