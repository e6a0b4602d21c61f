"""Every architecture of transformers: tiny configurations, the check itself, the processes, the results, the page.

The whole sweep is `python benchmarks/architectures.py`; here is a sample, one class a mechanism.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from cggr_compile.passes.rewrite import build_router as build_router_module
from huggingface_hub.errors import StrictDataclassClassValidationError
from processes import environment
from random_models import VOCABULARY, Layer, RandomModel, Spec
from sweep.classes import IMAGES, TEXT, Candidate, Record, batches, build, candidates, examine
from sweep.page import render
from sweep.runs import UnknownArchitecture, last_error, load, run, save, sweep
from sweep.tiny import VOCABULARY as TINY_VOCABULARY
from sweep.tiny import tiny_config
from torch.torch_version import TorchVersion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cggr_compile as cggr
from cggr_compile.checking.eager_layers import LayerStackNotFound, layer_calls
from cggr_compile.checking.eager_tokens import TokensNotTold, _at

ROOT = Path(__file__).parents[2]
EVERY = candidates()
OLDEST = transformers.__version__.startswith("5.17.")
LAYERDROP = pytest.mark.skipif(
    TorchVersion(transformers.__version__) < "5.23",
    reason="transformers 5.17 and 5.20: its layerdrop stops a trace",
)
RANDOMNESS = re.compile(r".*(drop|pdrop|jitter).*")


def candidate(model_type: str, objective: str = "causal") -> Candidate:
    return next(c for c in EVERY if (c.model_type, c.objective) == (model_type, objective))


@pytest.mark.skipif(OLDEST, reason="transformers 5.17 has more classes whose defaults are invalid")
def test_every_configuration_is_small_and_keeps_every_kind_of_layer() -> None:
    own_defaults_are_invalid = []
    for model_type in dict.fromkeys(c.model_type for c in EVERY):
        config_class = CONFIG_MAPPING[model_type]
        try:
            default = config_class()
        except StrictDataclassClassValidationError:  # the class's own defaults contradict each other
            own_defaults_are_invalid.append(model_type)
            continue
        tiny = tiny_config(config_class)
        for name, value in vars(tiny).items():
            if RANDOMNESS.fullmatch(name) and isinstance(value, float) and "freq" not in name:
                assert value == 0, (model_type, name)
            if name.endswith("_token_id") and isinstance(value, int):
                assert -1 <= value < TINY_VOCABULARY, (model_type, name)
        assert (vars(tiny).get("vocab_size") or 0) <= TINY_VOCABULARY, model_type
        assert (vars(tiny).get("num_hidden_layers") or 0) <= 16, model_type
        kinds = vars(default).get("layer_types")
        if isinstance(kinds, list) and isinstance(vars(tiny).get("layer_types"), list):
            assert set(vars(tiny)["layer_types"]) == set(kinds), model_type
    assert own_defaults_are_invalid == ["gemma4_assistant"]


def test_what_a_configuration_says_of_each_layer_is_kept() -> None:
    """Flags of each layer are no list of layers; of layers that need another modality none counts as one that runs;
    heads that are rotated as a whole stay so."""
    for model_type in ("smollm3", "llama4_text"):
        tiny = tiny_config(CONFIG_MAPPING[model_type])
        assert len(tiny.no_rope_layers) == tiny.num_hidden_layers
        assert set(tiny.no_rope_layers) == {0, 1}
    tiny = tiny_config(CONFIG_MAPPING["mllama"]).text_config
    assert tiny.num_hidden_layers - len(tiny.cross_attention_layers) == 2
    assert tiny.cross_attention_layers
    tiny = tiny_config(CONFIG_MAPPING["longcat_flash"])
    assert tiny.head_dim == tiny.qk_rope_head_dim


@pytest.mark.parametrize(
    ("model_type", "objective", "layers"),
    [
        pytest.param("xlnet", "causal", "transformer.layer", id="sequence-first", marks=pytest.mark.long),
        pytest.param("xlm", "masked", "transformer.layer_norm2", id="lists-of-parts-and-mutated-dropout"),
        pytest.param("albert", "masked", "", id="shared-layers", marks=pytest.mark.long),
    ],
)
def test_a_class_of_each_mechanism_is_exact(model_type: str, objective: str, layers: str) -> None:
    ran = []
    record = examine(candidate(model_type, objective), lambda _: ran.append(True))
    assert (record.status, record.reason, record.path, record.difference) == ("exact", "", layers, 0.0)
    assert record.captured
    assert ran


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("model_type", "objective"),
    [
        pytest.param("bart", "causal", marks=LAYERDROP),
        ("esm", "masked"),
        ("mobilebert", "masked"),
    ],
)
def test_what_spells_its_head_or_loss_otherwise_can_be_inspected(model_type: str, objective: str) -> None:
    model = build(candidate(model_type, objective))
    explanation = cggr.explain(model, batches(model)[1], ratio=0.5)
    assert explanation.report().stack.layers == 2
    assert "→ cggr.masked_loss" in str(explanation.diff())


def test_the_eager_side_finds_the_layers_by_itself() -> None:
    """Albert runs one module twice; of XLM's four lists, the last part of a layer ends it."""
    for model_type, path in (("albert", "albert.encoder.albert_layer_groups.0"), ("xlm", "transformer.layer_norm2.0")):
        model = build(candidate(model_type, "masked")).eval()
        calls = layer_calls(model, batches(model)[1])
        assert len(calls) == 2
        assert calls[0] is model.get_submodule(path)


SPEC = Spec((Layer("pre", None, "none"),), 3, 1, 1, False, False, "none", "list", False, False, False, 0.0, 1.0)


def random_ids(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (14, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


class Direct(RandomModel):
    """Calls the layers' `forward`, which passes module hooks by, as SqueezeBERT does."""

    def blocks(self) -> list[Callable[..., torch.Tensor]]:  # type: ignore[override]
        return [block.forward for block in super().blocks()]


def test_the_eager_side_sees_layers_whose_forward_is_called_directly() -> None:
    torch.manual_seed(0)
    model = Direct(SPEC)
    assert layer_calls(model, random_ids()) == list(model.tower)
    assert not any("forward" in vars(layer) for layer in model.tower)
    assert cggr.check(model, random_ids()).exact


def test_a_class_without_an_eager_router_is_neither_a_failure_nor_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unjudged(*arguments: object, **options: object) -> None:
        raise LayerStackNotFound("X runs no list of modules more than once")

    monkeypatch.setattr("sweep.classes.check", unjudged)
    record = examine(candidate("bert", "masked"), lambda _: None)
    assert (record.status, record.reason) == ("unchecked", "X runs no list of modules more than once")
    surroundings = {"command": "python", "device": "cpu", "versions": {}}
    page = render([record], [], surroundings)
    assert "| masked | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 of 1 (0.0%) |" in page
    assert "* bert (BertForMaskedLM, unchecked): X runs no list" in page
    monkeypatch.setattr("sweep.runs.run", lambda *given: given[4](record))
    assert sweep(["BertForMaskedLM"], 1, 1, 1, tmp_path / "r.json", tmp_path / "page.md", "sequence") == 1


def test_check_needs_a_batch_and_a_route_that_it_can_judge() -> None:
    with pytest.raises(ValueError, match=r"^check: no batch was given; pass at least one"):
        cggr.check(RandomModel(SPEC))
    with pytest.raises(ValueError, match=r"^check: route='loss' is none of 'sequence', 'segment' and 'token'"):
        cggr.check(RandomModel(SPEC), random_ids(), route="loss")


@pytest.mark.parametrize("number", [torch.tensor(9), torch.tensor([9])])
def test_check_takes_no_number_for_all_rows(number: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^check: num_items_in_batch is one number for all rows, .*; leave it out"):
        cggr.check(RandomModel(SPEC), {**random_ids(), "num_items_in_batch": number})


def test_check_judges_the_token_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers on the selected tokens are exact; layers that saw every token, or other tokens, are not."""
    torch.manual_seed(0)
    model, given = RandomModel(SPEC), random_ids()
    assert cggr.check(model, given, route="token").exact
    torch._dynamo.reset()
    monkeypatch.setattr("cggr_compile.checking.check.on_tokens", lambda *_: nullcontext())
    outcome = cggr.check(model, given, route="token")
    assert outcome.selected == outcome.expected
    assert not outcome.within_rounding


def test_layers_that_number_their_tokens_are_not_judged() -> None:
    """A window of its own: on k tokens the eager layer takes them for neighbours."""
    windowed = dataclasses.replace(SPEC, kinds=(dataclasses.replace(SPEC.kinds[0], window=2),))
    with pytest.raises(TokensNotTold, match="Block: it numbers its tokens itself"):
        cggr.check(RandomModel(windowed), random_ids(), route="token")


@pytest.mark.long
def test_llama4_is_exact_but_for_positions_that_its_layers_count() -> None:
    """On k tokens eager layers count from 0 to k - 1; the compiled ones keep the positions of the whole sequence."""
    model = build(candidate("llama4_text"))
    with pytest.raises(TokensNotTold, match="Llama4TextDecoderLayer: it numbers its tokens itself"):
        cggr.check(model, *batches(model), route="token")
    torch._dynamo.reset()
    for module in model.modules():
        if hasattr(module, "attn_temperature_tuning"):
            module.attn_temperature_tuning = False
    assert cggr.check(model, *batches(model), route="token").exact


def test_what_a_layer_is_given_is_taken_at_the_tokens() -> None:
    """Per row, shared by the rows, in two dimensions, flattened, folded into the batch, and without tokens."""
    positions = torch.tensor([[0, 2], [1, 3]])
    hidden = torch.arange(2 * 5 * 3).view(2, 5, 3)
    mask = torch.arange(25).view(1, 1, 5, 5)
    shared, table = hidden[:1], torch.arange(7)
    folded = torch.arange(2 * 4 * 5).view(8, 1, 5)
    given = _at(positions, hidden, {"x": (hidden, mask), "y": [shared, hidden.flatten(0, 1)], "z": (folded, table, 5)})
    for row, places in enumerate(positions.tolist()):
        assert torch.equal(given["x"][0][row], hidden[row, places])
        assert torch.equal(given["x"][1][row, 0], mask[0, 0][places][:, places])
        assert torch.equal(given["y"][0][row], shared[0, places])
        assert torch.equal(given["y"][1].view(2, 2, 3)[row], hidden[row, places])
        assert torch.equal(given["z"][0].view(2, 4, 1, 2)[row], folded.view(2, 4, 1, 5)[row][..., places])
    assert given["z"][1] is table
    with pytest.raises(TokensNotTold, match=r"tensor of shape \(5, 3\), whose batch cannot be told"):
        _at(positions, hidden, torch.zeros(5, 3))


def test_sizes_that_are_the_sequences_by_chance_are_told_or_refused() -> None:
    """The residual by its place, masks by their last dimensions; what else could be either is not guessed."""
    positions, length = torch.tensor([[0, 2], [1, 3]]), 5
    entry, mask = torch.rand(2, length, length), torch.rand(2, 1, length, length).gt(0.5)
    causal = torch.full((length, length), -torch.inf).triu(1)
    short, *masked = _at(positions, entry, (entry, mask, causal[None], causal[None] == 0))
    assert torch.equal(short[1], entry[1, [1, 3]])
    for found, whole in zip(masked, (mask[1, 0], causal, causal == 0), strict=True):
        assert torch.equal(found[1].reshape(2, 2), whole[[1, 3]][:, [1, 3]])
    bias = torch.rand(1, 4, length, length)
    assert torch.equal(_at(positions, entry, bias)[1], bias[0][:, [1, 3]][:, :, [1, 3]])
    tables = torch.rand(2, length, length), torch.rand(length, length), torch.rand(1, 1, length, length)
    for given in (*tables, torch.rand(2 * length, 1, length), torch.ones(length, length, dtype=torch.bool)):
        with pytest.raises(TokensNotTold, match="cannot be told while that has 5 tokens; check it with"):
            _at(positions, entry, given)


class Returning(RandomModel):
    """What `forward` returns of a loss, None without labels, and logits: `give(loss, logits)`."""

    def __init__(self, give: Callable[..., object]) -> None:
        super().__init__(SPEC)
        self.give = give

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> object:  # type: ignore[override]
        output = super().forward(input_ids, labels=labels)
        return self.give(output.loss, output.logits)


class Labelled(Returning):
    """A forward that has to be given labels."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> object:  # type: ignore[override]
        return super().forward(input_ids, labels)


@pytest.mark.parametrize(
    ("kind", "give"),
    [
        (Returning, lambda loss, logits: (logits,) if loss is None else (loss, logits)),
        (Returning, lambda loss, logits: logits if loss is None else loss),
        (Labelled, lambda loss, logits: {"logits": logits, "peak": logits.detach().amax(), "loss": loss}),
    ],
    ids=["tuple", "tensor", "dict"],
)
def test_check_of_a_forward_that_returns_something_else(kind: type[Returning], give: Callable[..., object]) -> None:
    torch.manual_seed(0)
    model = kind(give)
    for route in ("sequence", "token"):
        torch._dynamo.reset()
        outcome = cggr.check(model, random_ids(), random_ids(1), route=route)
        assert outcome.exact, str(outcome)


def test_check_says_that_a_model_returns_no_logits() -> None:
    with pytest.raises(ValueError, match=r"^check: Labelled returns no logits \[batch, sequence, vocabulary\], with"):
        cggr.check(Labelled(lambda loss, logits: loss), random_ids())


def test_check_of_an_optimised_model_is_of_its_route() -> None:
    """Where that is not given; what is given counts."""
    model, given = RandomModel(SPEC), random_ids()
    checked = cggr.check(cggr.optimize(model, route="token", ratio=0.25, selection="topk", router_layers=2), given)
    assert str(checked).startswith("exact: route token, ratio 0.25, router of 2 of ")
    torch._dynamo.reset()
    assert cggr.check(cggr.optimize(model, route=("depth", "token"), depth_layers=1), given).route == "token"
    torch._dynamo.reset()
    assert cggr.check(cggr.optimize(model, route="loss"), given).route == "sequence"
    torch._dynamo.reset()
    one_row = {name: tensor[:1] for name, tensor in given.items()}
    checked = cggr.check(cggr.optimize(model), one_row)
    assert str(checked).startswith("exact: everything kept, with all of 3 layers")
    assert (checked.route, checked.ratio, checked.router_layers, checked.selected) == ("", 1.0, 0, ())
    torch._dynamo.reset()
    checked = cggr.check(model, given, route="sequence", ratio=0.75, router_layers=1)
    assert str(checked).startswith("exact: route sequence, ratio 0.75, router of 1 of ")
    assert model.cggr.config.route == "sequence"


def test_check_of_every_row_needs_no_stack() -> None:
    model = RandomModel(dataclasses.replace(SPEC, layers=1))
    assert str(cggr.check(model, random_ids(), ratio=1.0)).startswith("exact: everything kept, with all of 0 layers")


def test_check_wants_labels_that_count_and_a_ratio() -> None:
    given = random_ids()
    with pytest.raises(ValueError, match="all labels of a batch are -100"):
        cggr.check(RandomModel(SPEC), {**given, "labels": torch.full_like(given["labels"], -100)}, ratio=1.0)
    with pytest.raises(cggr.ConfigError, match=r"ratio='0\.5'"):
        cggr.check(RandomModel(SPEC), given, ratio="0.5")


def test_check_sees_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that is one layer too deep selects other rows."""
    right = build_router_module.router_layers
    torch.manual_seed(0)
    model = RandomModel(SPEC)
    given = [random_ids(seed) for seed in range(3)]
    assert cggr.check(model, *given).exact
    torch._dynamo.reset()
    monkeypatch.setattr(build_router_module, "router_layers", lambda *arguments: right(*arguments) + 1)
    outcome = cggr.check(model, *given)
    assert outcome.selected != outcome.expected
    assert not outcome.within_rounding
    assert str(outcome).endswith("by the eager router")


def test_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: torch.nn.Module, config: cggr.RoutingConfig) -> torch.nn.Module:
        model.out.weight.register_hook(lambda gradient: gradient * 1.01)
        return cggr.optimize(model, config)

    monkeypatch.setattr("cggr_compile.checking.check.optimize", slightly_wrong)
    outcome = cggr.check(RandomModel(SPEC), random_ids())
    assert outcome.selected == outcome.expected
    assert outcome.where == "out.weight"
    assert not outcome.within_rounding


def _stub(subject: Candidate, runs: Callable[[str], None]) -> Record:
    """A worker that behaves as the candidate's type says."""
    if subject.model_type == "unbuildable":
        raise ImportError("no such extension")
    runs("")
    if subject.model_type == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if subject.model_type == "hangs":
        while True:
            pass
    if subject.model_type == "raises":
        raise RuntimeError("first line\nsecond line")
    if subject.model_type == "hungry":
        torch.empty(2**32, dtype=torch.float32).fill_(1)
    return Record(subject, "exact", captured=True, layers=2, difference=0.0)


def test_workers_cost_only_their_own_class() -> None:
    types = ("fine", "unbuildable", "crashes", "raises", "hungry", "hangs", "fine-too")
    records: dict[str, Record] = {}
    run(
        [Candidate("causal", name, name) for name in types],
        jobs=1,
        time_limit=1,
        memory_limit=4,
        done=lambda record: records.update({record.candidate.model_type: record}),
        work=_stub,
        context=multiprocessing.get_context("fork"),
    )
    assert {name: record.status for name, record in records.items()} == {
        "fine": "exact",
        "unbuildable": "not runnable",
        "crashes": "failure",
        "raises": "failure",
        "hungry": "failure",
        "hangs": "failure",
        "fine-too": "exact",
    }
    assert records["unbuildable"].reason.startswith("ImportError: no such extension (at ")
    assert records["crashes"].reason == "killed by SIGKILL"
    assert records["raises"].reason.startswith("RuntimeError: first line")
    assert "memory" in records["hungry"].reason
    assert records["hangs"].reason == "stopped after 1 s"


def test_reasons_name_no_folder_of_the_machine() -> None:
    text = (
        "noise\nTraceback (most recent call last):\n"
        '  File "/home/somebody/site-packages/transformers/models/x/modeling_x.py", line 7, in forward\n    f()\n'
        "torch._dynamo.exc.BackendCompilerFailed: backend='cggr' raised:\nValueError: bad\n"
    )
    expected = "torch._dynamo.exc.BackendCompilerFailed: backend='cggr' raised: ValueError: bad"
    assert last_error(text) == f"{expected} (at transformers/models/x/modeling_x.py:7)"
    assert last_error("only a warning") == ""
    elsewhere = text.replace("/transformers/models/x/modeling_x.py", "/huggingface_hub/a.py")
    assert last_error(elsewhere).endswith(" (at huggingface_hub/a.py:7)")
    standard = text.replace("site-packages/transformers/models/x/modeling_x.py", "lib/python3.11/functools.py")
    assert last_error(standard).endswith(" (at functools.py:7)")


def test_results_are_kept_and_the_page_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    records = [
        Record(candidate("llama"), "exact", "", True, "", 2, "model.layers", "metadata", 0.0, 3.0, "abc"),
        Record(candidate("ctrl"), "refused", "a | b", commit="abc"),
        Record(candidate("git"), "not runnable", "ValueError: x", commit="abc"),
    ]
    assert load(path) == {}
    surroundings = {"command": "python", "device": "cpu", "versions": {"torch": "2", "triton": "absent"}}
    save(path, {record.candidate: record for record in records}, surroundings)
    assert list(load(path).values()) == records
    page = render(records, [candidate("bert")], surroundings)
    assert "| causal | 1 | 0 | 1 | 1 | 0 | 1 | 1 of 2 (50.0%) |" in page
    assert "| llama | LlamaForCausalLM | yes | 2 (model.layers) | metadata | exact | 0 | 3 |" in page
    assert "* ctrl (CTRLLMHeadModel, refused): a \\| b" in page
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no results of this command"):
        load(path)


@pytest.mark.parametrize(
    ("name", "route", "objectives"),
    [
        ("architectures", "sequence", TEXT),
        ("architectures-token", "token", TEXT),
        ("architectures-oldest", "sequence", TEXT),
        ("architectures-multimodal", "sequence", IMAGES),
    ],
)
def test_the_documented_table_is_that_of_the_committed_results(
    name: str, route: str, objectives: tuple[str, ...]
) -> None:
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    surroundings = json.loads(path.read_text(encoding="utf-8"))["environment"]
    made_with = surroundings["versions"]["transformers"]
    if transformers.__version__ != made_with and "oldest" not in name:
        pytest.skip(f"made with transformers {made_with}, which has other classes")
    results, every = load(path), candidates(objectives)
    records = [results[c] for c in every if c in results]
    # An older transformers lacks some classes.
    missing = [c for c in every if c not in results] if "oldest" not in name else []
    page = render(records, missing, surroundings, route, objectives)
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == page
    assert not re.search(r"/(home|work|usr|root)/", path.read_text(encoding="utf-8"))


def test_models_without_images_are_counted_apart() -> None:
    """Never mixed with those that had images; what failed says what it had."""
    some = [c for c in candidates(IMAGES) if c.model_type in ("llava", "qwen2_vl", "evolla")]
    records = [
        Record(some[0], "exact", "", True, "two a row", 2, "model.layers", "metadata", 0.0, 3.0, "abc"),
        Record(some[1], "failure", "stopped", images="two a row", commit="abc"),
        Record(some[2], "exact", "", True, "text only", 2, "model.layers", "metadata", 0.0, 3.0, "abc"),
    ]
    surroundings = {"command": "python", "device": "cpu", "versions": {}}
    page = render(records, [], surroundings, objectives=IMAGES)
    assert "| multimodal, with images | 1 | 0 | 0 | 0 | 1 | 0 | 1 of 2 (50.0%) |" in page
    assert "| multimodal, text only | 1 | 0 | 0 | 0 | 0 | 0 | 1 of 1 (100.0%) |" in page
    assert f"| {some[2].model_type} | {some[2].model_class} | text only | yes |" in page


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"'lama' is no model type or class of transformers' mappings.*llama"):
        sweep(["lama"], 1, 60, 8, tmp_path / "r.json", tmp_path / "r.md", "sequence", TEXT)


@pytest.mark.long
@pytest.mark.parametrize("name", ["architectures-token", "architectures"])
def test_the_script_examines_a_page(name: str, tmp_path: Path) -> None:
    for folder in ("benchmarks/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    script = [sys.executable, str(ROOT / "benchmarks" / "architectures.py"), "--root", str(tmp_path)]
    subprocess.run(
        [*script, "--page", name, "--only", "gpt2"], check=True, capture_output=True, timeout=300, env=environment()
    )
    (record,) = load(tmp_path / "benchmarks" / "results" / f"{name}-cpu.json").values()
    assert (record.candidate.model_class, record.status) == ("GPT2LMHeadModel", "exact")
    assert "| gpt2 | GPT2LMHeadModel | yes |" in (tmp_path / "docs" / f"{name}.md").read_text(encoding="utf-8")
