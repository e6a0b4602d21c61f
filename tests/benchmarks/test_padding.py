"""The batches and the table of `benchmarks/padding.py`."""

from __future__ import annotations

import padding
import pytest
import torch
from step_time import SHAPES

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("arm", padding.ARMS)
def test_batches(arm: str) -> None:
    """Padded rows have padding behind the tokens without labels; packed ones are full of documents."""
    batch = padding.batch_of(arm, TINY, torch.Generator().manual_seed(0))
    ids, labels = batch["input_ids"], batch["labels"]
    if arm in ("packed", "documents", "compile_packed", "segment", "floor"):
        length = TINY.sequence * (1 if arm == "floor" else 4)
        assert ids.shape == (TINY.batch // 4, length)
        starts = batch["position_ids"] == 0
        assert torch.equal(starts, labels == -100)
        assert starts[:, 0].all()
        assert starts.sum() > (len(ids) if arm != "floor" else 0)
        return
    assert ids.shape == (TINY.batch, TINY.sequence)
    if arm == "full":
        assert torch.equal(ids, labels)
        assert "attention_mask" not in batch
        return
    mask = batch["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    assert mask.sum(1).min() >= int(padding.SHORTEST * TINY.sequence)
    assert torch.equal(labels, ids.masked_fill(mask == 0, -100))


@pytest.mark.long
def test_real_tokens_alone_are_measured() -> None:
    record = padding.measure("unpad", TINY, "cpu", steps=2)
    assert len(record["steps"]) == 2
    assert "places; attention under a mask" in record["report"]


def test_the_table_compares_with_the_fastest_of_each_reference() -> None:
    arms = {"mask": [0.2, 0.2], "mask+graphs": [0.1, 0.1], "unpad": [0.05, 0.07], "segment": None}
    samples = {arm: [{"steps": steps} if steps else {"failed": "why"}] for arm, steps in arms.items()}
    shape = {"name": "tiny", "batch": 8, "sequence": 32}
    report = {"device": "cpu", "commit": "x", "versions": {"torch": "1", "transformers": "2"}, "shape": shape}
    rows = padding.table({**report, "samples": samples}).splitlines()
    assert "| unpad | 60.0 (50.0 to 70.0) | 0.60 |  |  |  |  |" in rows
    assert any(row.startswith("| segment | why |") for row in rows)
