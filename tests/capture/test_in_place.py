"""What only the graph knows may change in place without functionalising the graph, and the step stays eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.torch_internals import tracing

OLDEST = torch.__version__.startswith("2.11.")
BEFORE_2_13 = TorchVersion(torch.__version__) < "2.13"


class Changing(Toy):
    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(self.change(hidden))


def _own(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    before = moved + 1
    moved.add_(hidden, alpha=2)  # a factor that rounds nothing, in one step or two
    moved += before
    moved.masked_fill_(moved > 3, 0.5)
    largest, _ = moved.topk(3, -1)
    largest /= largest.exp().sum(-1, keepdim=True)
    undone = torch.empty(16, dtype=torch.long)
    undone[torch.arange(16).flip(0)] = torch.arange(16)
    added = torch.zeros_like(hidden).scatter_add_(-1, (hidden > 0).long(), hidden)
    return moved[..., undone].view(hidden.shape) + largest.sum(-1, keepdim=True) + added


def _a_view_of_it(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved[..., 0] += 1
    return moved


def _known_by_a_view(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    half = moved[..., :8]
    moved.add_(1)
    return moved + torch.cat((half, half), -1)


def _in_another_dtype(hidden: torch.Tensor) -> torch.Tensor:
    moved = (hidden * 2).bfloat16()
    moved.add_(hidden)
    return hidden + moved


def _dropped_nothing(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    kept = torch.nn.functional.dropout(moved, 0.0)
    kept += 1
    return moved + kept


def _what_was_not_dropped(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    kept = torch.nn.functional.dropout(moved, 0.0)
    moved += 1
    return moved + kept


def _mapped(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    halves = torch.vmap(lambda row: row[:, :8])(moved)
    moved += 1
    return moved + torch.cat((halves, halves), -1)


def _a_number(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved[torch.tensor([0, 1])] = 0.0
    return moved


def _with_leading_ones(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved[torch.arange(2)] = hidden[None, :2]
    return moved


class _InBodies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.mul_(3)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient * 6
        changed.clamp_(-1e-3, 1e-3)
        return changed


class _Augmented(_InBodies):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y *= 3
        return y


class _Given(_InBodies):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.mul(y, 3, out=y)
        return y


class _View(_InBodies):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 6).view(x.shape)


def test_autograd_functions_that_return_views_are_eagers() -> None:
    eager: nn.Module = Changing(lambda hidden: _View.apply(hidden * 1.0))
    model = cggr.optimize(copy.deepcopy(eager), inner="eager")
    oracle.assert_same_step(*oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))


@pytest.mark.parametrize("function", [_InBodies, _Augmented, _Given])
def test_what_the_bodies_of_autograd_functions_change_stays_changed(function: Any) -> None:
    eager: nn.Module = Changing(lambda hidden: function.apply(hidden * 1.0))
    model = cggr.optimize(copy.deepcopy(eager), inner="eager")
    if OLDEST:
        with pytest.raises(cggr.CannotOptimize, match=r"what it changed in place, whose gradient torch 2\.11 loses"):
            model(**toy_batch())
        return
    oracle.assert_same_step(*oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))


def _without_gradients(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    with torch.no_grad():
        moved += 1
    return moved


def _behind_its_back(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved.detach().add_(1)
    return moved


def _checkpointed(body: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return checkpoint(body, x, use_reentrant=False)


def _a_checkpoint_that_dropped_nothing(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    kept = _checkpointed(lambda x: torch.nn.functional.dropout(x, 0.0), moved)
    moved += 1
    return moved + kept


def _changed_within_and_behind_checkpoints(hidden: torch.Tensor) -> torch.Tensor:
    def body(x: torch.Tensor) -> torch.Tensor:
        moved = x * 2
        moved[..., 0] += 1
        other = (x * 2).bfloat16()
        other.add_(x)
        return moved + other + _checkpointed(lambda y: torch.nn.functional.dropout(y, 0.0) * 2, moved)

    moved = _checkpointed(body, hidden * 2)
    moved += 1
    return hidden + moved


def _an_einsum_that_gives_a_view(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    same = torch.einsum("bsd->bsd", moved)
    moved.add_(1)
    return moved + same


def _a_broadcast_that_gives_views(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    same, _ = torch.broadcast_tensors(moved, moved[:1])
    same[..., 0] = 0.5
    return moved + same


def _a_cast_to_its_own_dtype(hidden: torch.Tensor) -> torch.Tensor:
    def body(x: torch.Tensor) -> torch.Tensor:
        same = x.type_as(x)
        same += 1
        return x + same

    return _checkpointed(body, hidden * 2)


def _by_an_option(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    with torch.no_grad():
        torch.nn.functional.relu(moved, inplace=True)
    return moved


def _by_an_output(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    with torch.no_grad():
        torch.mul(moved, 3, out=moved)
    return moved


def _by_a_remainder(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    with torch.no_grad():
        moved %= 0.3
    return moved


def _in_a_list(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    same = moved.type_as(hidden)
    torch._foreach_add_([moved], 1.0)
    return moved + same


def _by_an_option_and_known_by_another_name(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    same = moved.type_as(hidden)
    torch.nn.functional.elu(moved, 1.0, True)
    return moved + same


def _in_a_body_and_known_outside(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    same = moved.type_as(hidden)
    return _checkpointed(lambda x: x.add_(1) * 2, moved) + same


def _detached_and_changed_in_a_body(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    detached = moved.detach()

    def body(x: torch.Tensor) -> torch.Tensor:
        detached.add_(1)
        return x * 2

    return _checkpointed(body, hidden) + moved


def _by_strides(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved.as_strided(moved.shape, moved.stride()).add_(1)
    return moved


def _one_name_is_read_no_more(hidden: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(hidden.shape[:2]).type_as(hidden)
    mask[:, 0] = 0
    moved = torch.einsum("bsd->bsd", hidden * 2)
    moved *= 0.25
    first, second = (hidden @ torch.ones(16, 32)).unsafe_split(16, -1)
    first.sigmoid_()
    before = hidden * 3
    product = torch.einsum("bsd->bsd", before) * 2
    before.add_(1)
    return moved * mask[..., None] + first * second + product + before


def _hooked(hidden: torch.Tensor) -> torch.Tensor:
    moved = hidden * 2
    moved.register_hook(lambda gradient: gradient * 2)
    return moved


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_gradients, r"changed in place where gradients do not see it .*moved \+= 1"),
        (_behind_its_back, r"changed in place where gradients do not see it .*add_\(1\)"),
        (
            _an_einsum_that_gives_a_view,
            r"what einsum gives is memory of its argument.*moved \+ same.*clone what einsum",
        ),
        (_a_broadcast_that_gives_views, r"what broadcast_tensors gives is memory of its argument.*moved \+ same"),
        (_a_cast_to_its_own_dtype, r"what type_as gives is memory of its argument.*x \+ same"),
        *((change, "changed in place where gradients do not see it") for change in (_by_an_option, _by_an_output)),
        (_by_a_remainder, "changed in place where gradients do not see it"),
        (_detached_and_changed_in_a_body, "changed in place where gradients do not see it"),
        (_in_a_list, "what type_as gives is memory of its argument"),
        (_by_an_option_and_known_by_another_name, "what type_as gives is memory of its argument"),
        (_in_a_body_and_known_outside, "what type_as gives is memory of its argument"),
        (_by_strides, "changed in place that as_strided gives"),
        pytest.param(
            lambda hidden: _checkpointed(_hooked, hidden),
            r"registers a hook on a tensor's gradient.*register_hook",
            marks=pytest.mark.skipif(BEFORE_2_13, reason="torch 2.11 and 2.12: refused in other words"),
        ),
        pytest.param(
            _hooked,
            r"registers a hook on a tensor's gradient.*register_hook",
            marks=pytest.mark.skipif(BEFORE_2_13, reason="torch 2.11 and 2.12: exact"),
        ),
    ],
)
def test_what_a_graph_cannot_say_is_refused(change: Callable[..., torch.Tensor], reason: str) -> None:
    with pytest.raises(cggr.CannotOptimize, match=reason):
        cggr.optimize(Changing(change), inner="eager")(**toy_batch())


@pytest.mark.parametrize(
    ("change", "functionalised"),
    [
        (_own, False),
        *((change, True) for change in (_a_number, _dropped_nothing, _what_was_not_dropped, _with_leading_ones)),
        pytest.param(
            _mapped, True, marks=pytest.mark.skipif(BEFORE_2_13, reason="torch 2.11 and 2.12 cannot trace this vmap")
        ),
        *((change, True) for change in (_a_checkpoint_that_dropped_nothing, _changed_within_and_behind_checkpoints)),
        (_one_name_is_read_no_more, True),
        *((change, True) for change in (_a_view_of_it, _known_by_a_view, _in_another_dtype)),
    ],
)
def test_the_step_is_eagers(
    change: Callable[[torch.Tensor], torch.Tensor], functionalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager: nn.Module = Changing(change)
    calls: list[Any] = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    original = tracing.functional_graph
    monkeypatch.setattr(tracing, "functional_graph", counted)
    model = cggr.optimize(copy.deepcopy(eager), ratio=1.0, inner="eager")
    oracle.assert_same_step(*oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))
    assert bool(calls) == functionalised


def _in_checkpoints(hidden: torch.Tensor) -> torch.Tensor:
    return _checkpointed(lambda x: _checkpointed(torch.tanh, _InBodies.apply(x * 1.0)) * 2, hidden)


@pytest.mark.parametrize(
    "twice",
    [
        pytest.param(_in_checkpoints, marks=pytest.mark.skipif(OLDEST, reason="refused there")),
        _changed_within_and_behind_checkpoints,
    ],
)
def test_checkpoints_in_checkpoints_are_regions_of_their_own(twice: Callable[[torch.Tensor], torch.Tensor]) -> None:
    eager = Changing(lambda hidden: twice(twice(hidden)))
    model = cggr.optimize(copy.deepcopy(eager), inner="eager")
    oracle.assert_same_step(*oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))
    nodes = model.cggr.runtime.plans[-1].captured.graph.nodes
    assert {node.meta.get("ac_graph_id") for node in nodes} == {None, 1, 2, 3, 4}


class _Counting(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._counted, hidden, use_reentrant=False)

    def _counted(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().middle(hidden)


def test_a_buffer_that_a_checkpoint_changes_changes_once() -> None:
    """As under torch.compile: eager's backward computes the region again, and changes it again."""
    eager, compiled = _Counting(), torch.compile(_Counting(), backend="aot_eager")
    model = cggr.optimize(copy.deepcopy(eager), ratio=1.0, inner="eager")
    oracle.assert_same_step(*oracle.step(model, toy_batch()), *oracle.step(eager, toy_batch()))
    oracle.step(compiled, toy_batch())
    assert [each.calls.item() for each in (model, compiled, eager)] == [1, 1, 2]
