"""Labels that are shifted already, transformers' `shift_labels`: the step is the one with labels that it shifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import build, token_batch

import cggr_compile as cggr

IGNORED = -100


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"selection": "topk"},
        {"selection": "random"},
        {"ratio": 1.0},
        {"ratio": 1.0, "padding": "right"},
        {"route": "token"},
        {"route": "loss"},
        {"route": ("sequence", "loss"), "selection": "topk"},
        {"route": ("depth", "loss"), "depth_layers": 1, "depth_until": 9},
    ],
)
def test_shifted_labels_are_routed_as_labels_are(options: dict[str, Any]) -> None:
    found = []
    for shifted in (False, True):
        model = cggr.optimize(build("llama"), **{"ratio": 0.5, "inner": "eager", "seed": 0, **options})
        for seed in range(2):
            batch = token_batch(6, 10 + seed, seed=seed)
            batch["labels"][1, 4:] = IGNORED
            if "padding" in options:
                batch["attention_mask"] = batch["attention_mask"].sort(dim=1, descending=True).values
                batch["labels"][batch["attention_mask"] == 0] = IGNORED
            if shifted:
                batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].contiguous()
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            found.append((loss.detach(), *(x.grad for x in model.parameters())))
    for plain, other in zip(found[:2], found[2:], strict=True):
        for expected, actual in zip(plain, other, strict=True):
            assert (expected is None) == (actual is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_step_by_shifted_labels_is_eagers_on_the_selected_rows(ratio: float) -> None:
    """Of shifted labels that are others than the labels, of square batches and other shapes, with and without them."""
    model, eager = cggr.optimize(build("llama"), ratio=ratio, selection="topk", inner="eager"), build("llama")
    for rows, length, shifted in ((6, 10, True), (6, 6, True), (4, 9, False), (4, 9, True)):
        batch = token_batch(rows, length)
        if shifted:
            batch["shift_labels"] = batch["input_ids"].roll(1, 1)
        model.zero_grad()
        eager.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        selected = model.cggr.selected
        expected = eager(**{name: tensor[selected] for name, tensor in batch.items()}).loss
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for x, y in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


def test_targets_of_another_shape_are_told() -> None:
    model = cggr.optimize(build("llama"), route="loss", inner="eager", fallback="eager")
    batch = token_batch(6, 10)
    flat = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    with pytest.warns(RuntimeWarning, match="shift_labels"):
        loss = model(**batch, shift_labels=flat).loss
    assert torch.equal(loss, build("llama")(**batch).loss)
