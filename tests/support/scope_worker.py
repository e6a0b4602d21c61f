"""One of two ranks that select together, on the CPU; a module of its own, because spawned processes import it.

The oracle has the rows of both ranks in one batch: an eager router scores them, the rule selects, and the gradients are
the mean over the ranks of eager's on each rank's part. `run` leaves what came of the checks, by name, in a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from architectures import ARCHITECTURES, Architecture, build, token_batch
from cggr_compile.kernels.reference.selection import rule_of
from fsdp_models import mean_over_ranks, rows_for, shard, whole_gradients
from fsdp_worker import watched
from logs import logged_warnings
from ranks import make_checks
from small import small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toys import Toy, noisy, toy_batch

import cggr_compile as cggr
from cggr_compile.run import plan

RANKS, ROWS, LENGTH, KEPT = 2, 6, 12, 3
RULES = ("topk", "random", "trimmed", "stratified", "importance")
SMALL = Architecture("small", small, "layers")
RTOL, ATOL = 1e-6, 1e-8
OPTIONS: dict[str, Any] = {"selection_scope": "global", "ratio": 0.5, "router_layers": 1, "inner": "eager", "seed": 0}
Batch = Mapping[str, Tensor]


def routed(model: nn.Module, **options: Any) -> nn.Module:
    return cggr.optimize(model, **{**OPTIONS, **options})


def joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def batches_of(seed: int, make: Callable[..., Batch] = rows_for) -> list[Batch]:
    """The batches of both ranks; some labels are ignored, all of one row."""
    return [make(seed + rank, ROWS, LENGTH, masked=True) for rank in range(RANKS)]


def llama_batch(seed: int, rows: int, length: int, masked: bool) -> Batch:
    return token_batch(rows, length, seed=seed, masked=masked)


@contextmanager
def noise_seen() -> Iterator[list[Tensor]]:
    """The noise that this rank's rows are drawn by."""
    seen: list[Tensor] = []
    original = plan.Route._of_rows

    def drawn(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    with patch.object(plan.Route, "_of_rows", drawn):
        yield seen


def of_both(own: Tensor) -> Tensor:
    found = [torch.empty_like(own) for _ in range(RANKS)]
    dist.all_gather(found, own.contiguous())
    return torch.cat(found)


def selected_of(
    eager: nn.Module, architecture: Architecture, whole: Batch, rule: str, noise: Tensor | None, kept: int = KEPT
) -> tuple[Tensor, Tensor]:
    """The rule on the rows of both ranks: all that it selects, and this rank's part, with weights."""
    scores = oracle.row_scores(eager, architecture, whole, 1)
    valid = scores.isfinite()
    index, weight = rule_of(rule).function(scores.where(valid, 0.0), valid, RANKS * kept, noise)
    part = torch.arange(kept) * RANKS + dist.get_rank()
    return index[part], weight[part]


def eager_loss(eager: nn.Module, whole: Batch, rows: Tensor, weights: Tensor, rule: str) -> Tensor:
    """A rank's loss by definition: the mean over its part of the selection, weighed as the rule says."""
    inputs = {name: tensor[rows] for name, tensor in whole.items() if name != "labels"}
    counted = whole["labels"][:, 1:] != -100
    logits, labels = eager(**inputs).logits[:, :-1], whole["labels"][rows, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    each = weights.unsqueeze(1) * counted[rows]
    if rule_of(rule).weighting == "inverse":
        return (losses * each).sum() * counted.any(1).sum() / (counted.sum() / RANKS)
    return (losses * each).sum() / each.sum()


def rule_on_both(make: Callable[[], nn.Module], architecture: Architecture, rule: str, **options: Any) -> None:
    """The selection is the rule's on the rows of both ranks, and loss and gradients are eager's on each rank's part."""
    make_batch = rows_for if architecture is SMALL else llama_batch
    atol = 1e-6 if "inner" in options else 1e-7  # inductor's sums have another order
    eager = make()
    model = routed(copy.deepcopy(eager), selection=rule, **options)
    wrapper = DistributedDataParallel(model)
    for seed in (0, 10):
        batches = batches_of(seed, make_batch)
        whole = joined(batches)
        with noise_seen() as noise:
            loss = wrapper(**batches[dist.get_rank()]).loss
        loss.backward()
        both = of_both(noise[-1]) if noise else None
        rows, weights = selected_of(eager, architecture, whole, rule, both)
        assert torch.equal(model.cggr.selected, rows), (model.cggr.selected, rows)
        if both is not None:
            assert len(both.unique()) == len(both)  # though the ranks have one seed
        eager.zero_grad(set_to_none=True)
        expected = eager_loss(eager, whole, rows, weights, rule)
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=RTOL, atol=0)
        found = oracle.gradients(model)
        oracle.assert_same_gradients(found, mean_over_ranks(oracle.gradients(eager)), RTOL, atol)
        model.zero_grad()
    metrics = model.cggr.metrics()
    assert (metrics["rows_total"], metrics["rows_selected"]) == (RANKS * ROWS, RANKS * KEPT)
    assert metrics["tokens_total"] == (whole["labels"][:, 1:] != -100).sum()
    assert metrics["steps_selected_locally"] == 0
    assert "2 ranks select of the rows of all" in str(model.cggr.report())


def truncated(name: str) -> nn.Module:
    return oracle.truncated(build(name), ARCHITECTURES[name], 2)


SIZES = {3: ((6, 12), (4, 12)), 5: ((6, 12), (6, 9)), 7: ((1, 12), (6, 12)), 8: ((1, 12), (1, 12))}
"""Of the ranks' batches in steps of a training in which they are not 6 × 12."""
SAVED = 4


class Training:
    """AdamW on a model that both ranks train by DistributedDataParallel, through a warm-up."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel, **options: Any) -> None:
        self.model = routed(small(), warmup_steps=6, selection="trimmed", **options)
        self.wrapper = wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4)
        cggr.attach(self.model, self.optimizer)

    def step(self, number: int) -> Tensor:
        self.wrapper(**batches_in(number)[dist.get_rank()]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.cggr.selected


def batches_in(number: int) -> list[Batch]:
    sizes = SIZES.get(number, ((ROWS, LENGTH),) * RANKS)
    return [rows_for(100 * number + rank, *sizes[rank], masked=False) for rank in range(RANKS)]


def training(steps: int = 10, inner: str = "eager") -> None:
    """Steps are those of an eager model that is given the selected rows; where sizes differ each rank selects locally;
    a resumed run is the whole one."""
    run, eager = Training(inner=inner), small()
    optimizer = torch.optim.AdamW(eager.parameters(), lr=1e-2, eps=1e-4)
    saved: dict[str, Any] = {}
    apart = 0
    for number in range(steps):
        if number == SAVED:
            states = run.model.state_dict(), run.optimizer.state_dict(), run.model.cggr.state_dict()
            saved = copy.deepcopy(dict(zip(("model", "optimizer", "handle"), states, strict=True)))
        with noise_seen() as found:
            rows = run.step(number)
        batches = batches_in(number)
        sizes = {tuple(batch["input_ids"].shape) for batch in batches}
        apart += len(sizes) > 1
        together = len(sizes) == 1 and len(rows) < len(batches[0]["input_ids"])
        whole = joined(batches) if together else batches[dist.get_rank()]
        if together:
            noise = of_both(found[-1])
            assert torch.equal(rows, selected_of(eager, SMALL, whole, "trimmed", noise, len(rows))[0])
        expected = oracle.step(eager, oracle.rows_of(whole, rows))[1]
        mean_over_ranks(expected)
        optimizer.step()
        for name, parameter in run.model.named_parameters():
            torch.testing.assert_close(parameter, eager.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert run.model.cggr.metrics()["steps_selected_locally"] == apart
    assert apart == sum(number < steps for number in (3, 5, 7))
    if not saved:
        return
    again = Training(inner=inner)
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.model.cggr.load_state_dict(saved["handle"])
    for number in range(SAVED, steps):
        again.step(number)
    for (name, one), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def two_collectives() -> None:
    """The arguments, which are of one dtype, and the scores are gathered once each; a step whose batches differ, or
    that keeps every row, gathers nothing."""
    for inner in ("eager", "aot_eager"):
        model = routed(small(), inner=inner, selection="trimmed")
        for number, expected in ((0, 2), (3, 0), (8, 0), (0, 2)):
            batch = batches_in(number)[dist.get_rank()]
            model(**batch)
            loss, names = watched(lambda model=model, batch=batch: model(**batch).loss)
            assert names.count("all_gather_into_tensor") == expected, (inner, number)
            assert "all_gather_into_tensor" not in watched(loss.backward)[1]


def nothing_is_compiled_late() -> None:
    """What a warm-up keeps later is compiled in the first step, together."""
    model = routed(small(), inner="aot_eager", warmup_steps=4)
    counts = []
    for _ in range(6):
        model(**batches_in(0)[dist.get_rank()]).loss.backward()
        model.cggr.step()
        variants = model.cggr.runtime.plans[-1].variants
        counts.append({name: variant.compilations for name, variant in variants.items()})
    assert all(count == counts[0] for count in counts), counts


def given_scores() -> None:
    """Scores from outside are of each rank's rows; where one rank has none, all select locally."""
    model, rank = routed(small()), dist.get_rank()
    scores = [torch.arange(6.0), torch.tensor([9.0, 8.0, 0.5, 0.6, 7.0, -1.0])]
    hardest = torch.cat(scores).topk(RANKS * KEPT).indices.sort().values
    model.cggr.use_scores(scores[rank])
    model(**batches_in(0)[rank]).loss.backward()
    assert torch.equal(model.cggr.selected, hardest[rank::RANKS])
    if rank == 0:
        model.cggr.use_scores(scores[rank])
    with logged_warnings() as logged:
        model(**batches_in(0)[rank]).loss.backward()
    told = ["cggr: the ranks differ in whether scores are given"]
    assert [text.partition(" (")[0] for text in logged] == (told if rank == 0 else [])
    assert model.cggr.metrics()["steps_selected_locally"] == 1
    if rank == 0:
        assert torch.equal(model.cggr.selected, torch.tensor([3, 4, 5]))


def few_labels() -> None:
    """Where fewer rows have labels than are kept, those that only fill up are spread over the ranks."""
    model, batch = routed(small()), dict(batches_in(0)[dist.get_rank()])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0 if dist.get_rank() == 0 else 2 :] = -100
    eager, whole = small(), joined([batch])
    loss = model(**batch).loss
    loss.backward()
    own = model.cggr.runtime.last.found.weights.view(KEPT, RANKS)[:, dist.get_rank()]
    row = model.cggr.selected[own > 0]
    assert row.tolist() == [ROWS + dist.get_rank()]
    sent = {name: of_both(tensor) for name, tensor in whole.items()}
    expected = oracle.step(eager, oracle.rows_of(sent, row))
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), *expected, rtol=1e-5, atol=1e-6)


def num_items() -> None:
    """A loss that is a sum over a given number stands for a rank's share of all labels."""
    eager = truncated("llama")
    model, batches = routed(copy.deepcopy(eager)), batches_of(0, llama_batch)
    whole = joined(batches)
    counted = (whole["labels"][:, 1:] != -100).sum()
    loss = model(**batches[dist.get_rank()], num_items_in_batch=counted).loss
    rows = model.cggr.selected
    mean = eager(**oracle.rows_of(whole, rows)).loss
    torch.testing.assert_close(loss, mean / RANKS, rtol=1e-5, atol=0)


def sharded() -> None:
    """FSDP2's ranks select together as DistributedDataParallel's do."""
    eager = small()
    for inner in ("eager", "aot_eager"):
        model = routed(shard(small()), inner=inner)
        for number in (0, 3, 1):
            batches = batches_in(number)
            model.zero_grad()
            loss = model(**batches[dist.get_rank()]).loss
            loss.backward()
            whole = batches[dist.get_rank()] if number == 3 else joined(batches)
            expected_loss, expected = oracle.step(eager, oracle.rows_of(whole, model.cggr.selected))
            torch.testing.assert_close(loss.detach(), expected_loss, rtol=RTOL, atol=0)
            oracle.assert_same_gradients(whole_gradients(model), mean_over_ranks(expected), RTOL, ATOL)


def schedules_that_differ() -> None:
    """Ranks that have counted other numbers of steps are told so, both of them."""
    model = routed(small(), warmup_steps=4)
    if dist.get_rank() == 0:
        model.cggr.step()
        model.cggr.step()
    with pytest.raises(cggr.CannotOptimize, match=r"of 6 rows one rank keeps 5, another 6.*cggr\.attach"):
        model(**batches_in(0)[dist.get_rank()])


def options_that_differ() -> None:
    """Ranks that would select by other rules are told so, both of them; seeds may differ."""
    rank = dist.get_rank()
    model = routed(small(), selection=("topk", "trimmed")[rank])
    with pytest.raises(cggr.CannotOptimize, match="the ranks have other options"):
        model(**batches_in(0)[rank])
    assert routed(small(), seed=rank)(**batches_in(0)[rank]).loss.isfinite()


def a_rank_that_does_not_come() -> None:
    """A rank whose batch has no labels leaves the other waiting, which says why."""
    model, batch = routed(small()), dict(batches_in(0)[dist.get_rank()])
    with patch.object(dist, "new_group", partial(dist.new_group, timeout=timedelta(seconds=3))):
        model(**batch)
    if dist.get_rank() == 1:
        del batch["labels"]
        model(**batch)
    else:
        with pytest.raises(RuntimeError, match="one whose batch has no labels"):
            model(**batch)
    dist.barrier()


class Shared(Toy):
    """A toy that adds a table to its embeddings, given with an entry for each row or none, and merges images."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        table: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Any:
        hidden = self.embed(input_ids)
        if images is not None:
            hidden = hidden.masked_scatter((input_ids == 1).unsqueeze(-1), images.expand(len(hidden), -1, -1))
        logits = self.logits(self.middle(hidden if table is None else hidden + table))
        return (logits,) if labels is None else (self.loss(logits, labels), logits)


def arguments() -> None:
    """One that is no row's, or has a gradient, is refused by name; floats of the rows travel with them."""
    torch.manual_seed(0)
    eager = Shared().train()
    batches = [toy_batch(ROWS, 8, seed) for seed in range(RANKS)]
    own, width = batches[dist.get_rank()], eager.embed.weight.shape[1]
    generator = torch.Generator().manual_seed(dist.get_rank())
    table = torch.rand(ROWS, 8, width, generator=generator)
    model = routed(copy.deepcopy(eager), router_layers=2)
    with pytest.raises(cggr.CannotOptimize, match="table has no entry for each row, so another rank's may differ"):
        model(**own, table=table[0])
    with pytest.raises(cggr.CannotOptimize, match="table requires a gradient"):
        model(**own, table=table.clone().requires_grad_())
    with pytest.raises(cggr.CannotOptimize, match="the entries of images are divided among the rows by the model"):
        model(**own, images=table)
    loss = model(**own, table=table)[0]
    loss.backward()
    whole = {**joined(batches), "table": of_both(table)}
    expected = oracle.step(eager, oracle.rows_of(whole, model.cggr.selected))
    oracle.assert_same_step(loss.detach(), oracle.gradients(model), *expected, rtol=RTOL, atol=ATOL)


def deep(number: int) -> None:
    """With the depth route, a rule of the user's and in pieces."""
    model = routed(
        small(),
        route=("depth", "sequence"),
        depth_layers=2,
        depth_until=1,
        selection=hardest,
        inner="aot_eager",
        outline_layers=True,
    )
    for layers in (2, 3):
        batches = batches_in(number)
        model.zero_grad()
        loss = model(**batches[dist.get_rank()]).loss
        loss.backward()
        eager = small(layers=layers)
        eager.load_state_dict(model.state_dict(), strict=False)
        rows, _ = selected_of(eager, SMALL, joined(batches), "topk", None)
        assert torch.equal(model.cggr.selected, rows)
        expected = oracle.step(eager, oracle.rows_of(joined(batches), rows))
        found = {name: gradient for name, gradient in oracle.gradients(model).items() if name in expected[1]}
        oracle.assert_same_step(loss.detach(), found, *expected, rtol=RTOL, atol=ATOL)
        model.cggr.step()


def hardest(scores: Tensor, valid: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    rows = scores.where(valid, -torch.inf).argsort(descending=True)[:k].sort().values
    return rows, torch.ones(k)


PERTURBED = 500


def perturbed(scope: str) -> None:
    """Ranks with batches of other sizes, a single row now and then, data of other hardness and a curriculum neither
    hang nor drift: their parameters are bitwise equal at the end."""
    rank = dist.get_rank()
    model = routed(Toy().train(), router_layers=2, selection="trimmed", selection_scope=scope, warmup_steps=200)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cggr.attach(model, optimizer)
    draw = torch.Generator().manual_seed(rank)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for number in range(PERTURBED):
        uneven = number % 7 == 3
        rows = int(torch.randint(2, 9, (), generator=draw)) if uneven else 8
        rows = 1 if number % 50 == 10 * (1 + rank) else rows
        wrapper(**noisy(rows, 2 * number + rank, 0.5 * rank * number / PERTURBED))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        one, other = of_both(parameter.detach().flatten()).chunk(RANKS)
        assert torch.equal(one, other), name
    assert all(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert ("steps_selected_locally" in model.cggr.metrics()) is (scope == "global")
    if scope == "global":
        assert 20 <= model.cggr.metrics()["steps_selected_locally"] <= PERTURBED // 7 + 20


USUAL: dict[str, Callable[[], None]] = {
    "stratified": partial(rule_on_both, small, SMALL, "stratified"),
    "training, some steps": partial(training, SAVED),
}
LONG: dict[str, Callable[[], None]] = {
    **{
        f"{name}, {rule}": partial(rule_on_both, partial(truncated, name), ARCHITECTURES[name], rule)
        for name in ("llama", "gpt2")
        for rule in RULES
    },
    "compiled": partial(rule_on_both, small, SMALL, "importance", inner="inductor"),
    "training": training,
    "training, compiled": partial(training, inner="aot_eager"),
    "few labels": few_labels,
    "schedules that differ": schedules_that_differ,
    "options that differ": options_that_differ,
    "given scores": given_scores,
    "arguments": arguments,
    "two collectives": two_collectives,
    "nothing is compiled late": nothing_is_compiled_late,
    "num_items": num_items,
    "sharded": sharded,
    "deep": partial(deep, 0),
    **{f"perturbed, {scope}": partial(perturbed, scope) for scope in ("local", "global")},
    "a rank that does not come": a_rank_that_does_not_come,
}


def run(rank: int, ranks: int, folder: str, checks: Sequence[str]) -> None:
    """Some checks in one process group."""
    make_checks(rank, ranks, Path(folder), {name: {**USUAL, **LONG}[name] for name in checks})
