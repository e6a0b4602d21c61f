"""Report, diff and page of tiny models, against formulas and facts that are written down here independently."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest
import torch
from toys import Toy, toy_batch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cggr_compile as cggr
from cggr_compile.config import RoutingConfig
from cggr_compile.inspection.diff import compare
from cggr_compile.inspection.explanation import Diff, Explanation, Report
from cggr_compile.inspection.figure import figure
from cggr_compile.inspection.graph_text import Line
from cggr_compile.ir.cost import MEASURED, break_even
from cggr_compile.run.runtime import Runtime

LAYERS, HIDDEN, INNER, HEADS, KV, VOCABULARY = 3, 32, 48, 4, 2, 97
BATCH, SEQUENCE, RATIO = 8, 12, 0.25
HEAD_DIM = HIDDEN // HEADS
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )


def batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQUENCE), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Scaled(Toy):
    """With a buffer that is read where gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(7))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(hidden * self.scale.mean())


def test_buffers_are_none_of_the_routers_parameters() -> None:
    model = Scaled().train()
    router = cggr.explain(model, toy_batch(), ratio=0.5, selection="topk", router_layers=1).report().router
    read = (model.embed, model.layers[0], model.head)
    assert router is not None
    assert router.parameters == sum(parameter.numel() for module in read for parameter in module.parameters())


@pytest.fixture(scope="module")
def trained() -> cggr.Handle:
    """A model after one routed step."""
    torch.manual_seed(0)
    model = cggr.optimize(llama(), ratio=RATIO)
    model(**batch()).loss.backward()
    return model.cggr


@pytest.fixture(scope="module")
def at_random() -> Explanation:
    """A tied model on the meta device, rows drawn at random."""
    with torch.device("meta"):
        model = llama(tied=True)
    return cggr.explain(model, batch("meta"), ratio=0.5, selection="random")


def layer_flops() -> int:
    """Multiply-adds of one llama layer's matrices and of its attention, twice each."""
    matrices = HIDDEN * HEADS * HEAD_DIM * 2 + HIDDEN * KV * HEAD_DIM * 2 + 3 * HIDDEN * INNER
    attention = 2 * HEADS * SEQUENCE * SEQUENCE * HEAD_DIM
    return 2 * BATCH * (SEQUENCE * matrices + attention)


def head_flops() -> int:
    return 2 * BATCH * SEQUENCE * HIDDEN * VOCABULARY


def test_flops_are_those_of_the_formula(trained: cggr.Handle) -> None:
    cost = trained.report().cost
    assert cost.layer_flops == (layer_flops(),) * LAYERS
    assert cost.head_flops == head_flops()
    assert cost.rest_flops < 0.01 * cost.forward_flops
    assert cost.uncounted == ()


def test_split_attention_belongs_to_its_layer() -> None:
    """GPT-2 computes queries, keys and values in one linear and splits them."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY))
    cost = cggr.explain(model, batch("meta"), ratio=RATIO).report().cost
    matrices = HIDDEN * 3 * HIDDEN + HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN
    attention = 2 * HIDDEN * SEQUENCE * SEQUENCE
    assert cost.layer_flops == (2 * BATCH * (SEQUENCE * matrices + attention),) * 2
    assert cost.rest_flops == 0


def test_cost_model_follows_the_formula(trained: cggr.Handle) -> None:
    cost = trained.report().cost
    router = 2  # max(2, LAYERS // 8)
    eta = head_flops() / (LAYERS * layer_flops())
    c = router / LAYERS + eta
    assert cost.phi == router / LAYERS
    assert cost.eta == pytest.approx(eta)
    assert cost.c == pytest.approx(c)
    assert cost.break_even == pytest.approx(1 + c / (3 * RATIO * (1 + eta)))
    # A routed step over a step on random rows is what ω says it is.
    assert cost.step_ratio / cost.random_ratio == pytest.approx(cost.break_even, rel=0.01)
    forward = LAYERS * layer_flops() + head_flops()
    assert cost.router_share == pytest.approx((router * layer_flops() + head_flops()) / forward, rel=0.01)


def test_the_report_says_how_far_off_the_cost_model_is() -> None:
    ratios = []
    for path in sorted(RESULTS.glob("step_time-*.json")):
        if path.name == "step_time-outlined-h100.json":  # when the host still waited for the device after every step
            continue
        measured = json.loads(path.read_text())["samples"]
        runs = {arm: found[-1] for arm, found in measured.items() if found and "matmul" not in arm}
        runs = {arm: run for arm, run in runs.items() if "steps" in run}
        medians = {arm: median(run["steps"]) for arm, run in runs.items()}
        whole = [seconds for arm, seconds in medians.items() if arm.partition("+")[0] == "all"]
        routed = [arm for arm, run in runs.items() if "graphs" in arm and "predicted_share" in run]
        for arm in routed if whole else ():
            # Predicted are forward and backward; fused AdamW's kernels come on top.
            profile = runs[arm].get("profile", [])  # older results have none, and no optimiser
            update = sum(micros for name, _, micros in profile if "multi_tensor_apply" in name) / 1e6
            ratios.append(medians[arm] / (runs[arm]["predicted_share"] * (min(whole) - update) + update))
    assert len(ratios) > 20
    assert tuple(round(ratio, 2) for ratio in (min(ratios), max(ratios))) == MEASURED


@pytest.mark.parametrize(
    ("c", "ratio", "eta", "omega"), [(0.0, 0.5, 1.0, 1.0), (0.6, 0.2, 0.0, 2.0), (1.5, 0.25, 1.0, 2.0)]
)
def test_break_even(c: float, ratio: float, eta: float, omega: float) -> None:
    assert break_even(c, ratio, eta) == pytest.approx(omega)


def test_report_states_what_was_found_and_chosen(trained: cggr.Handle) -> None:
    report = trained.report()
    model = trained.model
    assert report.stack is not None
    assert report.router is not None
    assert (report.stack.path, report.stack.layers) == ("model.layers", LAYERS)
    assert report.stack.residual == f"f32[B, S, {HIDDEN}]"
    read = [*model.model.layers[:2].parameters(), *model.lm_head.parameters()]
    read += [*model.model.norm.parameters(), *model.model.embed_tokens.parameters()]
    assert report.router.parameters == sum(parameter.numel() for parameter in read)
    assert (report.head.objective, report.head.label_shift, report.head.tied) == ("causal", 1, False)
    assert report.head.weight_shape == (VOCABULARY, HIDDEN)
    assert dict(report.gathered) == {"input_ids": 0, "attention_mask": 0, "labels": 0}
    assert (report.sizes.batch, report.sizes.sequence, report.sizes.kept) == (BATCH, SEQUENCE, 2)
    assert set(report.providers) == {"score", "draw", "gather", "masked_loss"}
    assert (report.captures, report.inner) == (1, "eager")
    assert report.passes[-1] == "lower_kernels"
    assert all(len(line) <= 100 for line in str(report).splitlines())


def test_report_survives_json(trained: cggr.Handle) -> None:
    report = trained.report()
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict()["cost"]["break_even"] == report.cost.break_even
    assert report.to_dict()["config"] == json.loads(json.dumps(vars(trained.config)))


def test_report_of_a_random_selection_has_no_router(at_random: Explanation) -> None:
    report = at_random.report()
    assert report.router is None
    assert report.head.tied
    assert report.cost.break_even == 1
    assert report.cost.step_ratio == 0.5
    assert "needs no scores" in str(report)


def test_diff_speaks_of_the_model(trained: cggr.Handle) -> None:
    lines = trained.diff().summary().splitlines()
    assert lines[:4] == [
        "+ router: layers 0–1 of 3 (model.layers), final norm, head; exact body; shared weights, no gradient",
        "+ score: loss, exact head, fp32, mean over counted tokens",
        "+ select: trimmed, k = ceil(0.25 · B)",
        lines[3],
    ]
    assert set(re.findall(r"input_ids|attention_mask|labels", lines[3])) == {"input_ids", "attention_mask", "labels"}
    assert re.fullmatch(r"~ main pass: B → k in \d+ nodes", lines[4])
    assert lines[5:] == [
        "~ loss: cross-entropy over logits → cggr.masked_loss (no logits)",
        "- outputs dropped: logits",
    ]


def test_diff_of_a_random_selection_adds_no_router(at_random: Explanation) -> None:
    diff = at_random.diff()
    assert "router" not in diff.summary()
    assert "+ select: random, k = ceil(0.5 · B)" in diff.summary().splitlines()
    assert "cggr.score" not in str(diff)
    assert any(row.mark == "+" and "%noise" in row.text for row in diff.rows())


def test_main_pass_keeps_its_names(trained: cggr.Handle) -> None:
    """Only the inputs, the head and the loss differ in the main pass; the rest is the same node on k rows."""
    rows = trained.diff().rows()
    removed = [row.text.partition("(")[0].rpartition("= ")[2] for row in rows if row.mark == "-"]
    assert removed.count("aten.linear") == 1  # the head
    assert removed.count("aten.cross_entropy_loss") == 1
    assert not any("scaled_dot_product" in operator for operator in removed)
    assert sum(row.mark == "~" and "aten.scaled_dot_product" in row.text for row in rows) == LAYERS
    router = [row.text for row in rows if row.mark == "+" and row.text.startswith("%router.scaled_dot_product")]
    assert len(router) == 2
    assert all("[B, " in text for text in router)


def test_sides_of_the_diff_are_the_graphs(trained: cggr.Handle) -> None:
    """Either side, read off the rows, has a line for each node, numbered from 1 without gaps."""
    plan = trained.runtime.plans[-1]
    rows = trained.diff().rows()
    for graph, numbers in (
        (plan.captured.graph, [row.before for row in rows if row.before]),
        (plan.program.graph, [row.after for row in rows if row.after]),
    ):
        assert numbers == list(range(1, len(numbers) + 1))
        texts = [row.text for row in rows if (row.before if graph is plan.captured.graph else row.after)]
        assert sum(not text.startswith("── ") for text in texts) == len(graph.nodes)


def test_op_counts_are_counted_from_the_snapshots(trained: cggr.Handle) -> None:
    counts = trained.diff().op_counts()
    assert counts["find_loss"] == {}
    assert counts["gather_rows"]["cggr.gather"] == (0, 3)
    linears = LAYERS * 7 + 1
    assert counts["build_router"]["aten.linear"] == (linears, linears + 2 * 7)
    assert counts["mask_loss"]["aten.linear"] == (linears + 2 * 7, linears + 2 * 7 - 1)
    assert "cggr.gather: 0 -> 3 (+3)" in str(trained.diff())


def test_diff_survives_json(trained: cggr.Handle) -> None:
    diff = trained.diff()
    read = json.loads(diff.to_json())
    assert read["summary"] == diff.summary().splitlines()
    assert len(read["graph"]) == len(diff.rows())


def test_lines_that_differ_by_the_rows_only_are_one() -> None:
    before = [Line("%x: f32[B]", "%x: f32[B]", "main"), Line("%y: f32[B]", "%y: f32[B]", "main")]
    after = [Line("%x: f32[k]", "%x: f32[B]", "main"), Line("%z: f32[]", "%z: f32[]", "main")]
    assert [str(row) for row in compare(before, after)] == ["~ %x: f32[k]", "- %y: f32[B]", "+ %z: f32[]"]


class Page(HTMLParser):
    """Collects the text, checks that tags are balanced, and keeps every attribute."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, given or "") for name, given in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, given or "") for name, given in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_self_contained(trained: cggr.Handle) -> None:
    html = trained.diff().to_html()
    page = Page()
    page.feed(html)
    assert page.open == []
    fetching = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
    assert not fetching & {name for name, _ in page.attributes}
    addresses = re.findall(r"https?://[^\"'\s<)]+", html)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nothing fetches
    assert not re.search(r"@import|url\((?!#)|<script|<link|<iframe", html)
    for line in trained.diff().summary().splitlines():
        assert line in page.text
    assert all(row.text.partition("    # ")[0] in page.text for row in trained.diff().rows())


def test_figure_is_drawn_from_the_report(trained: cggr.Handle, at_random: Explanation) -> None:
    drawn = figure(trained.report())
    assert drawn.startswith("<svg")
    assert "layers 0–1 of 3" in drawn
    assert f"B = {BATCH} rows" in drawn
    assert "router" not in figure(at_random.report())


def test_inspection_before_the_first_step_says_what_to_do() -> None:
    runtime = Runtime(RoutingConfig())
    for read in (Report.of, Diff.of, lambda runtime: Explanation(runtime, Toy()).program):
        with pytest.raises(cggr.CannotOptimize) as raised:
            read(runtime)
        assert str(raised.value).splitlines()[0] == (
            "cannot optimize: nothing captured yet; run one training step with labels or call cggr.explain"
        )


def test_a_batch_of_one_row_is_reported_as_unrouted() -> None:
    with torch.device("meta"):
        model = Toy()
    ids = torch.zeros(1, SEQUENCE, dtype=torch.long, device="meta")
    explanation = cggr.explain(model, {"input_ids": ids, "labels": ids.clone()}, ratio=RATIO)
    assert not explanation.report().routed
    assert "one row" in str(explanation)
    assert "not routed" in explanation.diff().to_html()


def test_on_the_depth_route_a_report_says_what_its_layers_take_of_a_step_of_all() -> None:
    with torch.device("meta"):
        model = llama(tied=True)
    options = {"route": "depth", "depth_layers": 2}
    report = cggr.explain(model, batch("meta"), **options).report()
    share = (2 * layer_flops() + head_flops()) / (LAYERS * layer_flops() + head_flops())
    assert report.stage_share == pytest.approx(share, rel=0.01)
    assert f"{report.stage_share:.1%} of a step of all" in str(report)
    assert "routed step" not in str(report)
    assert cggr.explain(model, batch("meta"), ratio=RATIO).report().stage_share is None
