"""Selection rules inside a routed step: which rows, and a loss that weighs them as the rule says."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, build, token_batch
from cggr_compile.kernels.reference import selection
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toys import Toy, route, row_losses, toy_batch

import cggr_compile as cggr

RATIO, SEED = 0.5, 3


def optimized(eager: torch.nn.Module, **options: Any) -> torch.nn.Module:
    return cggr.optimize(copy.deepcopy(eager), ratio=RATIO, router_layers=2, inner="eager", seed=SEED, **options)


def drawn(eager: torch.nn.Module, batch: dict[str, torch.Tensor], rule: str, **options: float) -> tuple:
    """Rows and weights by the rule, from an eager router's scores and the model's own generator."""
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = oracle.truncated(eager, ARCHITECTURES["llama"], 2)(**inputs).logits
    counts = oracle.counted(batch["labels"], True)
    scores = oracle.token_scores(logits, batch["labels"], "loss", True).sum(1) / counts.clamp(min=1)
    noise = torch.rand(len(scores), generator=torch.Generator().manual_seed(SEED))
    k = -(-len(scores) // 2)
    return selection.RULES[rule].function(scores, counts > 0, k, noise, **options)


def row_sums(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row's sum of token losses, with a gradient."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("rule", "options", "items"),
    [
        ("trimmed", {"tau": 0.2, "epsilon": 0.5}, None),
        pytest.param("stratified", {"num_strata": 3}, None, marks=pytest.mark.long),
        ("stratified", {}, 50),
        pytest.param("importance", {}, None, marks=pytest.mark.long),
        ("importance", {"floor": 0.5}, 50),
    ],
)
def test_rows_loss_and_gradients_are_the_rules(rule: str, options: dict[str, float], items: int | None) -> None:
    """Ragged counts of labels in the rows; `num_items_in_batch` as Trainer passes it under gradient accumulation."""
    eager = build("llama")
    batch = token_batch(9, 16)
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    model = optimized(eager, selection=rule, selection_options=options)
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **extra).loss
    loss.backward()
    rows, weights = drawn(eager, batch, rule, **options)
    assert torch.equal(model.cggr.selected, rows)

    counts = oracle.counted(batch["labels"], True)
    sums = row_sums(eager, oracle.rows_of(batch, rows))
    total = counts.sum() if items is None else items
    if rule == "importance":
        expected = (weights * (counts > 0).sum() * sums).sum() / total
    else:
        # A mean over what the weights stand for, scaled to the batch where the caller divides by its own count.
        expected = (weights * sums).sum() / (weights * counts[rows]).sum() * counts.sum() / total
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager), rtol=1e-4, atol=1e-6)


def test_every_label_ignored_is_a_connected_zero() -> None:
    batch = toy_batch(6)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = oracle.step(optimized(Toy().train(), selection="importance"), batch)
    assert loss.item() == 0
    assert all(gradient is not None and gradient.count_nonzero() == 0 for gradient in gradients.values())


def middling(
    scores: torch.Tensor, valid: torch.Tensor, k: int, noise: torch.Tensor, *, skip: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The easiest valid rows but some, the easiest with the largest weight; on the host, as nothing traced could."""
    if skip == 9:
        return scores, valid
    rows = [row for row in scores.argsort().tolist() if valid[row].item()][skip : skip + k]
    return torch.tensor(rows), torch.arange(k, 0, -1.0)


def test_a_users_function_selects_and_weighs_as_one_operator_for_any_k() -> None:
    torch.manual_seed(0)
    eager = Toy().train()
    options = {"selection": middling, "selection_options": {"skip": 1}, "ratio": RATIO, "router_layers": 2}
    model = cggr.optimize(copy.deepcopy(eager), inner="aot_eager", **options)
    for rows in (7, 10):
        batch = toy_batch(rows, seed=rows, ignored=0.3)
        k, routed = -(-rows // 2), route(eager, batch)
        order = [row for row in routed.scores.argsort().tolist() if routed.counts[row]][1 : 1 + k]
        for trained in (model, eager):
            trained.zero_grad(set_to_none=True)
        loss = model(**batch)[0]
        loss.backward()
        assert model.cggr.selected.tolist() == sorted(order)
        weights = torch.arange(k, 0, -1.0)
        expected = (weights * row_losses(eager, batch)[order]).sum() / (weights * routed.counts[order]).sum()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager), rtol=1e-4, atol=1e-6)
    assert model.cggr.captures == 1
    report = model.cggr.report()
    assert report.to_dict()["config"]["selection"] == "middling"
    assert "selection       middling, k = ceil(0.5 · B)" in str(report)
    assert "+ select: middling, k" in model.cggr.diff().summary()
    assert pickle.loads(pickle.dumps(model)).cggr.config == model.cggr.config


def easiest_in_place(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws in favour of low scores, and leaves nothing of what it was given."""
    rows = scores.neg_().add_(noise.log_().neg_().log_().neg_())[valid].argsort(descending=True)[:k]
    rows = valid.nonzero().flatten()[rows]
    scores.fill_(torch.nan)
    valid.fill_(False)
    noise.fill_(2)
    return rows, torch.ones(len(rows))


def easiest(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    return easiest_in_place(scores.clone(), valid.clone(), k, noise.clone())


@pytest.mark.parametrize("given", [False, True])
def test_a_function_may_write_to_what_it_is_given(given: bool) -> None:
    """It trains the rows, weighs them and counts them as one that does not, also in a backward that runs the step
    again, by eager's loss and gradients on these rows; scores of the user's stay what they are."""
    found = []
    for rule in (easiest, easiest_in_place):
        torch.manual_seed(0)
        model = optimized(Toy().train(), selection=rule)
        mine, steps = torch.arange(7.0), []
        for seed in range(3):
            if given:
                model.cggr.use_scores(mine)
            model.zero_grad()
            batch = toy_batch(7, seed=seed)
            loss = checkpoint(model, **batch, use_reentrant=False)[0]
            loss.backward()
            steps.append((model.cggr.selected.tolist(), loss, model.cggr.metrics()["score_mean"]))
            steps.append(oracle.gradients(model))
            eager = Toy().train()
            eager.load_state_dict(model.state_dict())
            wanted = eager(**oracle.rows_of(batch, model.cggr.selected))[0]
            wanted.backward()
            torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
            oracle.assert_same_gradients(steps[-1], oracle.gradients(eager), rtol=1e-4, atol=1e-6)
        assert mine.tolist() == list(range(7))
        found.append(steps)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_what_a_function_returns_is_checked_while_training() -> None:
    """By the other front end, whose runtimes are kept by their config; the error leaves no mode of the router's on."""
    options = {"selection": middling, "selection_options": {"skip": 9}, "router_layers": 2}
    model = torch.compile(Toy().train(), backend="cggr", options=options)
    with pytest.raises(TypeError, match=r"selection rule 'middling' returned index of torch\.float32, expected"):
        model(**toy_batch())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="'middling' returned"):
            model(**toy_batch())
        assert torch.is_grad_enabled()
        assert torch.is_autocast_cache_enabled()
        assert torch.autocast_increment_nesting() == 2
        assert torch.autocast_decrement_nesting() == 1


def test_a_config_holds_the_function_itself() -> None:
    config = cggr.RoutingConfig(selection=middling, selection_options={"skip": 2})
    twins = [pickle.loads(pickle.dumps(config)), copy.deepcopy(config), cggr.RoutingConfig(**vars(config))]
    assert all(twin == config and hash(twin) == hash(config) for twin in twins)
    assert all(twin.selection is middling for twin in twins)
    assert config != cggr.RoutingConfig(selection=functools.partial(middling), selection_options={"skip": 2})
    assert config.to_dict()["selection"] == "middling"
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(cggr.RoutingConfig(selection=lambda scores, valid, k, noise: (scores, valid)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "trimed"}, "did you mean 'trimmed'"),
        ({"selection": "trimmed", "selection_options": {"taw": 1}}, "has no option 'taw', did you mean 'tau'"),
        ({"selection": "topk", "selection_options": {"tau": 1}}, "'topk' has no option 'tau'; valid options: none"),
        (
            {"selection": "trimmed", "selection_options": {"tau": "a"}},
            r"selection_options\['tau'\]='a' is not a number",
        ),
        ({"selection": "trimmed", "selection_options": 3}, "neither None nor a mapping"),
        ({"selection": "stratified", "selection_options": {"num_strata": 2.5}}, "=2.5 is not an integer"),
        ({"selection": "fixed_quotta"}, "did you mean 'fixed_quota'"),
        (
            {"selection": middling, "selection_options": {"skp": 1}},
            r"'middling' has no option 'skp', did you mean 'skip'\? valid options: skip",
        ),
        (
            {"selection": middling, "selection_options": {"skip": True}},
            "=True is not a number",
        ),
        (
            {"selection": lambda scores, valid, k: 0},
            "selection=<lambda> cannot be called as .*too many",
        ),
        ({"selection": lambda s, v, k, n, *, tau: 0}, "cannot be called as .*missing a required argument: 'tau'"),
        ({"selection": min}, "selection=min: no signature found.*; wrap it in a function of your own"),
    ],
)
def test_bad_options_name_the_valid_ones(options: dict, message: str) -> None:
    with pytest.raises(cggr.ConfigError, match=message):
        cggr.RoutingConfig(**options)
