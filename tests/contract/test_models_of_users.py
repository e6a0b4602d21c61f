"""What models of users do and library models hardly: state changed in place, losses divided by hand, odd signatures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import WIDTH, WORDS, Statistics, Toy, toy_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.5, "router_layers": 2, "inner": "eager", "seed": 0}


def agrees(model: nn.Module, eager: nn.Module, batch: dict[str, Any]) -> None:
    """One routed step of `model` equals one of `eager` on the rows that it selected: loss, gradients and buffers."""
    model.zero_grad()
    eager.zero_grad()
    loss = model(**batch)[0]
    loss.backward()
    rows = model.cggr.selected
    expected = eager(**{name: x[rows] if isinstance(x, Tensor) else x for name, x in batch.items()})[0]
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, tensor), wanted in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (tensor.grad is None) == (wanted.grad is None), name
        assert tensor.grad is None or torch.equal(tensor.grad, wanted.grad), name
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
    def middle(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.layers[0].weight.clamp_(-1, 1)
        return super().middle(hidden)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (ChangesIds, {}, "the forward changes input_ids in place"),
        (ChangesWeights, {}, "the forward changes a parameter in place"),
    ],
)
def test_what_may_not_be_changed_is_named(kind: type[Toy], options: dict[str, Any], reason: str) -> None:
    model, _ = pair(kind, **options)
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**toy_batch(8))


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
