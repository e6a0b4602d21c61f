"""What is warned of, and that each warning is at the user's line."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from architectures import build, token_batch
from padded import padded
from segment_oracle import packed
from torch import nn

import cggr_compile as cggr
from cggr_compile.run import uncounted as uncounted_calls

Routed = Callable[..., torch.nn.Module]
DEPTH = {"route": "depth", "depth_layers": 1}
ONE_ROW = {name: tensor[:1] for name, tensor in token_batch().items()}


def routed(**options: Any) -> torch.nn.Module:
    return cggr.optimize(build("llama"), inner="eager", **options)


def of_another_model() -> None:
    cggr.attach(routed(), torch.optim.SGD(build("llama").parameters()))


def never_growing() -> None:
    model = routed(**DEPTH, depth_until=9)
    cggr.attach(model, torch.optim.SGD(model.parameters()), total_steps=5)


def without_routing() -> None:
    routed(ratio=0.5, route="segment", fallback="eager")(**ONE_ROW)


def uncounted() -> None:
    model = routed(ratio=0.5, warmup_steps=5)
    model(**token_batch()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(**token_batch())


def undecided() -> None:
    model = routed(selection="auto")
    model(**token_batch()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model(**token_batch())


def in_eval_mode() -> None:
    """As `from_pretrained` leaves it; said once, and not of evaluation without gradients."""
    model = routed().eval()
    with torch.no_grad():
        model(**token_batch())
    for _ in range(2):
        model(**token_batch())


def never_called() -> None:
    model = routed(**DEPTH, depth_until=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cggr.attach(model, optimizer, total_steps=4)
    for _ in range(2):
        model(input_ids=token_batch()["input_ids"]).logits.sum().backward()
        optimizer.step()


def too_long() -> None:
    model = routed(ratio=0.5, warmup_steps=9)
    cggr.attach(model, torch.optim.SGD(model.parameters()), total_steps=5)


SAID: dict[Callable[[], object], str] = {
    of_another_model: "the optimizer has no parameter of LlamaForCausalLM",
    never_growing: "depth_until=9 is not reached in 5 steps",
    without_routing: "training without routing: cannot optimize",
    in_eval_mode: "LlamaForCausalLM is in eval mode, so this call with labels is not routed; call train()",
    never_called: "the optimizer has stepped, and no training call with labels has reached LlamaForCausalLM",
    too_long: "warmup_steps=9 is not over in 5 steps",
    uncounted: "2 training calls and no optimiser step has been counted; the schedule stands still until one is",
    undecided: "2 training calls and no optimiser step has been counted",
    lambda: routed(ratio=0.5)(**ONE_ROW): "a batch of one row leaves no rows to choose from",
    lambda: routed(cuda_graphs=True)(**token_batch()): "running without CUDA graphs: the model is on cpu",
    lambda: routed(cuda_graphs=True, unpad=True)(
        **padded([7, 4, 9])
    ): "running without CUDA graphs: the model is on cpu",
    lambda: routed(ratio=0.2, route="segment")(**packed([[8, 7], [9, 6]])): (
        "none of the batch's 4 documents trains: 4 are longer than the 3 tokens that a sequence keeps"
    ),
}


@pytest.mark.parametrize("do", SAID)
def test_a_warning_is_at_the_line_of_the_user(do: Callable[[], object]) -> None:
    with pytest.warns(RuntimeWarning) as found:
        do()
    assert [(each.filename, str(each.message).startswith(SAID[do])) for each in found] == [(__file__, True)]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model(**token_batch()).loss.backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def another_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def a_hook_less(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    cggr.attach(model, optimizer).remove()
    return model, optimizer


def a_copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    return copy.deepcopy((model, optimizer))


def a_pickle(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = pickle.loads(pickle.dumps(model))
    return model, sgd(model)


def a_resumed_run(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    again = routed(ratio=0.5, warmup_steps=99)
    again.cggr.load_state_dict(model.cggr.state_dict())
    return again, sgd(again)


@pytest.mark.parametrize(
    ("then", "calls"),
    [(another_optimizer, 5), (a_hook_less, 5), (a_copy, 2), (a_pickle, 2), (a_resumed_run, 2)],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_steps_that_are_counted_no_longer_are_warned_of(
    then: Callable[..., tuple[nn.Module, torch.optim.Optimizer]], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, behind so many calls."""
    monkeypatch.setattr(uncounted_calls, "UNCOUNTED", 3)
    model = routed(ratio=0.5, warmup_steps=99)
    optimizer = sgd(model)
    cggr.attach(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 5)
        model, optimizer = then(model, optimizer)
        steps(model, optimizer, calls - 1)
    with pytest.warns(RuntimeWarning, match=f"^{calls} training calls .*the schedule stands still until one is"):
        steps(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 4)
    assert model.cggr.runtime.steps == 5


def test_a_schedule_that_is_over_needs_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncounted_calls, "UNCOUNTED", 1)
    model = routed(ratio=0.5, warmup_steps=2)
    optimizer = sgd(model)
    hook = cggr.attach(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 3)
        hook.remove()
        steps(model, optimizer, 5)


def test_each_reason_for_not_routing_is_warned_of_once() -> None:
    model = routed(ratio=0.5, fallback="eager")
    for unusual in ({"output_attentions": True}, {"output_hidden_states": True}):
        with pytest.warns(RuntimeWarning, match=f"^training without routing: .*{next(iter(unusual))}=True"):
            model(**token_batch(), **unusual)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**token_batch(), **unusual)


def test_calls_between_two_steps_of_the_optimizer_are_no_steps() -> None:
    """Accumulated gradients, and a loop that counts by itself."""
    model = routed(ratio=0.5, warmup_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for _ in range(2):
                oracle.step(model, token_batch())
            optimizer.step()
            model.cggr.step()


def test_a_step_of_documents_that_fit_is_not_warned_of() -> None:
    model = routed(ratio=0.6, route="segment")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**packed([[8, 7], [9, 6]]))
