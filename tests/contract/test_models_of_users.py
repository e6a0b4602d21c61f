"""What models of users do and library models hardly: state changed in place, losses divided by hand, odd signatures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from toys import WIDTH, WORDS, Statistics, Toy, toy_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.5, "router_layers": 2, "inner": "eager", "seed": 0}


def agrees(model: nn.Module, eager: nn.Module, batch: dict[str, Any], tolerance: float = 0.0) -> None:
    """One routed step of `model` equals one of `eager` on the rows that it selected: loss, gradients and parameters,
    within a tolerance, and buffers."""
    model.zero_grad()
    eager.zero_grad()
    loss = model(**batch)[0]
    loss.backward()
    rows, entries = model.cggr.selected, batch["input_ids"].shape[:1]
    by_row = {name: x[rows] for name, x in batch.items() if isinstance(x, Tensor) and x.shape[:1] == entries}
    expected = eager(**{**batch, **by_row})[0]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for (name, tensor), wanted in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (tensor.grad is None) == (wanted.grad is None), name
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, wanted.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(tensor, wanted, rtol=tolerance, atol=tolerance)
    for (name, tensor), wanted in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(tensor, wanted), name


def pair(kind: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A routed model, and an eager one of the same weights."""
    torch.manual_seed(0)
    eager = kind().train()
    return cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, **options}), eager


class Reassigned(Toy):
    """Puts another tensor into a buffer's place, beside one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("unread", torch.zeros((), dtype=torch.long))

    def middle(self, hidden: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + hidden.detach().mean((0, 1)) * 0.1
        return super().middle(hidden + self.mean)


@pytest.mark.parametrize("kind", [Statistics, Reassigned])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_state_is_that_of_eager_on_the_selected_rows(kind: type[Toy], ratio: float) -> None:
    model, eager = pair(kind, ratio=ratio, selection="random")
    for seed in range(3):
        agrees(model, eager, toy_batch(8, seed=seed))
    assert eager.mean.abs().sum() > 0


def test_state_is_kept_under_the_backend_too() -> None:
    torch.manual_seed(0)
    model = torch.compile(Statistics().train(), backend="cggr", options={**OPTIONS, "selection": "random"})
    for seed in range(2):
        model(**toy_batch(8, seed=seed))[0].backward()
    assert model._orig_mod.norm.num_batches_tracked == 2
    assert model._orig_mod.mean.abs().sum() > 0


class ChangesIds(Toy):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple:
        input_ids.clamp_(min=1)
        return super().forward(input_ids, labels)


class ChangesWeights(Toy):
    """Each layer changes its weight before it reads it."""

    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            self.change(layer)
            hidden = hidden + layer(hidden).tanh()
        return hidden

    def change(self, layer: nn.Linear) -> None:
        layer.weight.data.clamp_(-0.1, 0.1)


class Shrinks(ChangesWeights):
    """A change that another one in the same step would add to."""

    def change(self, layer: nn.Linear) -> None:
        with torch.no_grad():
            layer.weight.mul_(0.9)
            layer.bias.add_(0.01)


class Normalises(ChangesWeights):
    def change(self, layer: nn.Linear) -> None:
        layer.weight.detach().div_(layer.weight.data.norm(dim=1, keepdim=True))


CHANGING = [ChangesWeights, Shrinks, Normalises]


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "random"},
        {"ratio": 1.0},
        {"inner": "aot_eager"},
        pytest.param({"inner": "inductor"}, marks=pytest.mark.long),
        {"inner": "aot_eager", "outline_layers": True},
    ],
    ids=str,
)
def test_parameters_change_as_in_eager(kind: type[Toy], options: dict[str, Any]) -> None:
    model, eager = pair(kind, **options)
    before = eager.layers[2].weight.clone()
    for seed in range(3):
        agrees(model, eager, toy_batch(8, seed=seed), tolerance=1e-6 if options.get("inner") == "inductor" else 0.0)
    assert not torch.equal(eager.layers[2].weight, before)


@pytest.mark.parametrize("kind", CHANGING)
def test_the_router_reads_changed_parameters_and_changes_none(kind: type[Toy]) -> None:
    model, eager = pair(kind, selection="topk")
    for seed in range(2):
        batch = toy_batch(8, seed=seed)
        router = copy.deepcopy(eager)
        router.layers = router.layers[:2]
        logits = router(batch["input_ids"])[0][:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)
        agrees(model, eager, batch)
        assert torch.equal(model.cggr.selected, losses.topk(4).indices.sort().values)


class Checkpointed(ChangesWeights):
    def middle(self, hidden: Tensor) -> Tensor:
        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            self.change(layer)
            return hidden + layer(hidden).tanh()

        for layer in self.layers:
            hidden = checkpoint(run, layer, hidden, use_reentrant=False)
        return hidden


class ShrinksCheckpointed(Checkpointed, Shrinks):
    pass


@pytest.mark.parametrize(("kind", "like"), [(Checkpointed, Checkpointed), (ShrinksCheckpointed, Shrinks)])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_checkpointed_region_changes_a_parameter_once(kind: type[Toy], like: type[Toy], inner: str) -> None:
    """Eager's backward computes a region again, and changes it a second time."""
    model, eager = pair(kind, inner=inner)[0], pair(like)[1]
    for seed in range(2):
        agrees(model, eager, toy_batch(8, seed=seed))


def test_parameters_change_in_layers_that_run_on_some_tokens() -> None:
    model, eager = pair(Shrinks, route="token", selection="random", router_layers="auto")
    model(**toy_batch(8))[0].backward()
    eager(**toy_batch(8))[0].backward()
    for name, wanted in eager.named_parameters():
        assert torch.equal(model.get_parameter(name), wanted), name


def test_layers_that_do_not_train_yet_do_not_change() -> None:
    model, eager = pair(
        Shrinks, route="depth", depth_layers=2, depth_until=2, grow="random", ratio=1.0, router_layers=1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cggr.attach(model, optimizer)
    small = copy.deepcopy(eager)
    small.layers = small.layers[:2]
    batch = toy_batch(8)
    for step in range(4):
        model(**batch)[0].backward()
        (small if step < 2 else eager)(**batch)
        optimizer.step()
        changed = small.layers if step < 2 else eager.layers
        wanted = [*changed, *eager.layers[len(changed) :]]
        for layer, other in zip(model.layers, wanted, strict=True):
            assert torch.equal(layer.weight, other.weight), step
        if step == 1:
            eager.load_state_dict({**eager.state_dict(), **small.state_dict()})


class ReadsBefore(ChangesWeights):
    def change(self, layer: nn.Linear) -> None:
        self.seen = layer.weight.sum()
        super().change(layer)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) + self.seen


class ChangesTwice(ChangesWeights):
    def logits(self, hidden: Tensor) -> Tensor:
        self.change(self.layers[0])
        self.layers[0].weight.data.mul_(0.5)
        return super().logits(self.layers[0](hidden))


class ChangesHead(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        self.head.weight.data.clamp_(-0.1, 0.1)
        return super().logits(hidden)


class ChangesByBatch(ChangesWeights):
    def middle(self, hidden: Tensor) -> Tensor:
        self.layers[0].weight.data.sub_(hidden.mean())
        return Toy.middle(self, hidden)


class ChangesByChance(ChangesWeights):
    def change(self, layer: nn.Linear) -> None:
        layer.weight.data.add_(torch.randn_like(layer.weight))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (ChangesIds, {}, "the forward changes input_ids in place"),
        *(
            (kind, {}, r"the forward changes the parameter layers\.0\.weight in place, .*: (self\.)?layer.*\.data\.")
            for kind in (ReadsBefore, ChangesTwice, ChangesByBatch, ChangesByChance)
        ),
        (ChangesHead, {}, r"the forward changes head\.weight, a parameter of the head, in place .*: self\.head\."),
    ],
)
def test_what_may_not_be_changed_is_named(kind: type[Toy], options: dict[str, Any], reason: str) -> None:
    model, _ = pair(kind, **options)
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**toy_batch(8))


class Casting(nn.Linear):
    """A layer that casts its input to what it is."""

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(torch.float32).to(input.device)
        return input + super().forward(input).tanh()


class ReadsEmbeddingsLater(Toy):
    """Its layers are chained by one tensor, and what enters them is added behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Casting(WIDTH, WIDTH) for _ in range(3))

    def middle(self, hidden: Tensor) -> Tensor:
        entered = hidden
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden + entered


def test_a_cast_that_gives_the_tensor_itself_is_no_layers() -> None:
    """A trace takes what the first layer's cast gives for what enters it, so that seems to leave the layer, too."""
    model, eager = pair(ReadsEmbeddingsLater, selection="random")
    agrees(model, eager, toy_batch(8))
    assert "layers: 3 layers, found by metadata" in str(model.cggr.report())


DIVISORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda total, labels: total,
    "a number": lambda total, labels: total / 7.0,
    "counted labels": lambda total, labels: total / (labels != -100).sum(),
    "elements": lambda total, labels: total / labels.numel(),
    "rows": lambda total, labels: total / labels.shape[0],
}


def divided(divisor: str) -> type[Toy]:
    class Divided(Toy):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            total = F.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1), reduction="sum")
            return DIVISORS[divisor](total, labels)

    return Divided


@pytest.mark.parametrize("divisor", DIVISORS)
def test_a_sum_that_the_model_divides_is_eagers_of_the_selected_rows(divisor: str) -> None:
    model, eager = pair(divided(divisor))
    agrees(model, eager, toy_batch(8, ignored=0.2))


def test_where_tokens_enter_the_loss_a_sum_over_counted_labels_is_their_mean() -> None:
    model, eager = pair(divided("counted labels"), route="loss", selection="random")
    batch = toy_batch(8, ignored=0.2)
    loss = model(**batch)[0]
    predicted = model.cggr.selected.roll(1, 1)  # a position predicts the label behind it
    expected = eager(batch["input_ids"], batch["labels"].where(predicted, -100))[0]
    torch.testing.assert_close(loss, expected)


class Items(Toy):
    """Divides a sum by a number that the call is given, as transformers does."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, items: Any = None) -> tuple:
        logits = self.logits(self.middle(self.embed(input_ids)))
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return (F.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1), reduction="sum") / items, logits)


@pytest.mark.parametrize("backend", [False, True])
def test_a_number_that_counts_the_batch_is_as_good_as_a_tensor(backend: bool) -> None:
    """From the first step, in which Dynamo takes the number for a constant: half of the rows stand for all."""
    torch.manual_seed(0)
    eager = Items().train()
    model = copy.deepcopy(eager)
    routed = torch.compile(model, backend="cggr", options=OPTIONS) if backend else cggr.optimize(model, **OPTIONS)
    batch = toy_batch(8)
    for items in (40, 36):
        loss = routed(**batch, items=items)[0]
        rows = cggr.handle(routed).selected
        expected = eager(**{name: x[rows] for name, x in batch.items()}, items=items)[0] * 2
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_has_the_dtype_that_eagers_has(dtype: torch.dtype) -> None:
    model, eager = pair(lambda: Toy().to(dtype))
    batch = toy_batch(8)
    loss = model(**batch)[0]
    rows = model.cggr.selected
    expected = eager(**{name: x[rows] for name, x in batch.items()})[0]
    torch.testing.assert_close(loss, expected, rtol=3 * torch.finfo(dtype).eps, atol=0)  # eager rounds thrice


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, batch: model.double(), "the loss is computed in float64"),
        (lambda model, batch: batch.update(labels=batch["labels"].int()), "labels of torch.int32"),
    ],
)
def test_dtypes_that_the_loss_is_not_routed_in_are_refused(change: Callable[..., Any], reason: str) -> None:
    model, _ = pair(Toy)
    batch = toy_batch(8)
    change(model, batch)
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**batch)


def test_weighted_selections_of_a_sum_that_the_model_divides_are_refused() -> None:
    model, _ = pair(divided("counted labels"), selection="importance")
    with pytest.raises(cggr.CannotOptimize, match="divides by what it counts itself"):
        model(**toy_batch(8))


def test_another_function_in_the_place_of_torchs_cross_entropy_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of fused losses do it."""
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **options: original(*args, **options) * 2)
    model, eager = pair(Toy)
    agrees(model, eager, toy_batch(8))


class Scaled(Toy):
    """None and a number that is not the default mean different things."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, alpha: float | None = 0.1) -> tuple:
        loss, *rest = super().forward(input_ids, labels)
        return (loss if alpha is None else loss + alpha, *rest)


def test_an_argument_given_as_none_is_none() -> None:
    for alpha in (None, 0.5):
        model, eager = pair(Scaled)
        agrees(model, eager, {**toy_batch(8), "alpha": alpha})


REDUCED: dict[str, Callable[..., Tensor]] = {
    "mean": lambda loss, given, table: loss * given.mean(),
    "term": lambda loss, given, table: loss + given.amax(),
    "divisor": lambda loss, given, table: loss / (given > 0.1).sum(),
    "spread": lambda loss, given, table: (loss * given).mean(),
    "entry": lambda loss, given, table: loss * given[-1],
    "number": lambda loss, given, table: loss * given.shape[0],
    "share": lambda loss, given, table: loss * torch.full((), 1 / len(given)),
    "looked up": lambda loss, given, table: loss + table((given * 10).long()).square().mean(),
}


def reducing(reduced: str) -> type[Toy]:
    class Reducing(Toy):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, given: Any = None, w: Any = None) -> tuple:
            loss, *rest = super().forward(input_ids, labels)
            return (REDUCED[reduced](loss, given if w is None else w, self.embed), *rest)

    return Reducing


@pytest.mark.sample(5)
@pytest.mark.parametrize("reduced", REDUCED)
def test_entries_that_no_row_reads_by_itself_are_refused_where_there_are_as_many_as_rows(reduced: str) -> None:
    """They may be the rows' own, or not: eager on the selected rows would take half of them, or all."""
    batch = toy_batch(8)
    other = torch.rand(5, generator=torch.Generator().manual_seed(0))
    model, eager = pair(reducing(reduced))
    agrees(model, eager, {**batch, "given": other})
    every, eager = pair(reducing(reduced), ratio=1.0)
    agrees(every, eager, {**batch, "given": batch["input_ids"][:, 0] / 10})
    model, _ = pair(reducing(reduced))
    with pytest.raises(cggr.CannotOptimize, match=r"cannot tell whether given, with as many entries as the batch has"):
        model(**batch, given=batch["input_ids"][:, 0] / 10)


OWN: dict[str, Callable[..., Tensor]] = {
    "offset": lambda given, ids: given.flatten(0, 1)[torch.arange(len(ids)).unsqueeze(1) * given.shape[1] + ids % 2],
    "table": lambda given, ids: F.embedding(torch.arange(len(ids)).unsqueeze(1) * 2 + ids % 2, given.flatten(0, 1)),
    "select": lambda given, ids: given.flatten(0, 1).index_select(0, torch.arange(len(ids)) * 2).unsqueeze(1),
    "counted": lambda given, ids: given[torch.ones_like(ids[:, 0]).cumsum(0) - 1].mean(1, keepdim=True),
    "repeated": lambda given, ids: given[:, 0].repeat_interleave(ids.shape[1], 0).view(*ids.shape, -1),
}


@pytest.mark.parametrize("own", OWN)
def test_entries_that_rows_read_by_their_number_are_their_own(own: str) -> None:
    class Reading(Toy):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, given: Any = None) -> tuple:
            hidden = self.embed(input_ids)
            logits = self.logits(self.middle(hidden + OWN[own](given, input_ids)))
            return (self.loss(logits, labels), logits)

    model, eager = pair(Reading)
    agrees(model, eager, {**toy_batch(8), "given": torch.randn(8, 2, WIDTH)})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (list, "given"),
        (tuple, "given"),
        (np.asarray, "given"),
        (lambda numbers: [(number, 1) for number in numbers], "given"),
        (lambda numbers: [np.asarray([number]) for number in numbers], "given"),
        (lambda numbers: {"of rows": numbers}, r"given\['of rows'\]"),
    ],
)
def test_entries_in_no_tensor_are_refused_where_rows_are_selected(kind: Callable[..., Any], name: str) -> None:
    batch, given = toy_batch(8), kind([0.1 * row for row in range(8)])

    class Listed(Toy):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, given: Any = None) -> tuple:
            loss, logits = super().forward(input_ids, labels)
            numbers = torch.cat([torch.as_tensor(each).float().flatten() for each in tree_leaves(given)])
            return (loss * numbers[torch.arange(len(input_ids))].mean(), logits)

    model, _ = pair(Listed)
    with pytest.raises(
        cggr.CannotOptimize, match=rf"{name} is a \w+ with as many entries .*; pass torch\.as_tensor\({name}"
    ):
        model(**batch, given=given)
    every, eager = pair(Listed, ratio=1.0)
    torch.testing.assert_close(every(**batch, given=given)[0], eager(**batch, given=given)[0])


class Averaging(Toy):
    """Keeps a mean of what it is given, or gives it out."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept = kept
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, given: Any = None) -> tuple:
        loss, logits = super().forward(input_ids, labels)
        if self.kept:
            self.mean.mul_(0.9).add_(given.mean())
        return (loss, logits) if self.kept else (loss, logits, given.sum())


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_step_leaves_of_such_entries_is_refused(kept: bool) -> None:
    batch = toy_batch(8)
    model, eager = pair(partial(Averaging, kept))
    agrees(model, eager, {**batch, "given": torch.rand(5)})
    model, _ = pair(partial(Averaging, kept))
    with pytest.raises(cggr.CannotOptimize, match="no row reads an entry of its own"):
        model(**batch, given=torch.rand(8))


def test_tokens_that_no_row_reads_by_itself_are_refused_too() -> None:
    model, _ = pair(reducing("mean"))
    batch = toy_batch(8)
    with pytest.raises(cggr.CannotOptimize, match="whether w, with"):
        model(**batch, w=batch["input_ids"] / 10)


class Signed(Toy):
    """Decides by the loss's value, without a branch."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple:
        loss, *rest = super().forward(input_ids, labels)
        return (loss * float(loss.item() > 0), *rest)


def test_a_decision_by_data_outlives_a_layer_that_is_frozen() -> None:
    model, eager = pair(Signed)
    agrees(model, eager, toy_batch(8))
    for each in (model, eager):
        each.layers[0].requires_grad_(False)
    agrees(model, eager, toy_batch(8))


class Louder(Toy):
    """Takes its arguments in another order, too."""

    def forward(self, labels: Tensor | None = None, input_ids: Tensor | None = None) -> tuple:
        loss, *rest = super().forward(input_ids, labels)
        return (loss * 5, *rest)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_another_forward_of_the_class_is_the_one_that_is_routed(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair(Toy, ratio=ratio)
    batch = toy_batch(8)
    agrees(model, eager, batch)
    for each in (model, eager):
        each.__class__ = Louder
    agrees(model, eager, batch)
    given = model(batch["labels"], batch["input_ids"])[0]
    torch.testing.assert_close(given, eager(**{name: x[model.cggr.selected] for name, x in batch.items()})[0])
    for each in (model, eager):
        each.__class__ = Toy
    agrees(model, eager, batch)
    plain = Toy.forward

    def tripled(self: Toy, **given: Any) -> tuple:
        loss, *rest = plain(self, **given)
        return (loss * 3, *rest)

    monkeypatch.setattr(Toy, "forward", tripled)
    agrees(model, eager, batch)


class Inner(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_method_of_a_submodules_class_is_seen_by_the_next_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch.compile it is not seen before."""

    def built() -> Toy:
        toy = Toy()
        toy.layers[1] = Inner(WIDTH, WIDTH)
        return toy

    model, eager = pair(built)
    batch, compiled = toy_batch(8), torch.compile(copy.deepcopy(eager), backend="eager")
    agrees(model, eager, batch)
    before = compiled(**batch)[0]
    plain = Inner.forward
    monkeypatch.setattr(Inner, "forward", lambda self, x: plain(self, x) * 3)
    assert torch.equal(compiled(**batch)[0], before)
    assert not torch.equal(eager(**batch)[0], before)
    with pytest.raises(AssertionError):
        agrees(model, eager, batch)
    agrees(cggr.optimize(model, **OPTIONS), eager, batch)


class Two(Toy):
    """Given two things of one name: weights of its rows, and a factor that no row reads by itself."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, rows: Any = None, others: Any = None) -> tuple:
        hidden = self.embed(input_ids) * rows["w"].view(-1, 1, 1)
        logits = self.logits(self.middle(hidden))
        return (self.loss(logits, labels) * others["w"].mean(), logits)


def test_entries_of_one_name_are_told_apart() -> None:
    model, _ = pair(Two)
    with pytest.raises(cggr.CannotOptimize, match="no row reads an entry of its own"):
        model(**toy_batch(8), rows={"w": torch.rand(8)}, others={"w": torch.rand(8)})


class Positional(Toy):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *factors: float, **others: Any) -> tuple:
        loss, *rest = super().forward(input_ids, labels)
        return (loss * (factors[0] if factors else 1.0), *rest)


def test_arguments_without_a_name_are_refused() -> None:
    model, _ = pair(Positional)
    batch = toy_batch(8)
    with pytest.raises(cggr.CannotOptimize, match="the forward takes factors by position only"):
        model(batch["input_ids"], batch["labels"], 2.0)


def test_a_shallow_copy_is_refused() -> None:
    model, _ = pair(Toy)
    copied = copy.copy(model)
    with pytest.raises(cggr.CannotOptimize, match="a shallow copy of an optimized model"):
        copied(**toy_batch(8))
    with pytest.raises(RuntimeError, match="a shallow copy"):
        cggr.restore(copied)
    model(**toy_batch(8))
