"""What is warned of, and that each warning is at the user's line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from architectures import build, token_batch
from padded import padded
from segment_oracle import packed

import cggr_compile as cggr

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
