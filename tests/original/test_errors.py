"""What the original's surface refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from original_models import Fixed, Plain

from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer, TruncatedRouter, create_truncated_router


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "best"}, "scoring is 'best', expected one of entropy, margin, loss, combined"),
        ({"selection": "best"}, "selection is 'best', expected one of topk"),
        ({"min_tokens_ratio": 0.0}, r"min_tokens_ratio is 0\.0, expected in \(0, 1\]"),
        ({"min_tokens_ratio": 1.1}, r"min_tokens_ratio is 1\.1"),
        ({"min_tokens_ratio": math.nan}, "min_tokens_ratio is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected at least 0"),
        ({"threshold_sensitivity": 1.5}, r"threshold_sensitivity is 1\.5, expected in \[0, 1\]"),
        ({"threshold_sensitivity": -0.1}, r"threshold_sensitivity is -0\.1"),
        ({"num_strata": 0}, "num_strata is 0, expected at least 1"),
        ({"min_tokens_per_sequence": 0}, "min_tokens_per_sequence is 0, expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    for make in (CGGRLoss, lambda **o: CGGRScorer(Plain(), **o), lambda **o: CGGRModel(Plain(), **o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_bad_shapes() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    scorer, model = CGGRScorer(Plain()), CGGRModel(Plain())
    for bad in (ids[None], ids[0]):
        with pytest.raises(ValueError, match="input_ids has shape"):
            scorer(bad)
        with pytest.raises(ValueError, match="input_ids has shape"):
            model(bad, labels=bad)
    with pytest.raises(ValueError, match=r"targets must match input_ids: shapes \(2, 5\) and \(2, 6\)"):
        scorer(ids, targets=ids[:, 1:])
    with pytest.raises(ValueError, match="labels must match input_ids"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match=r"Unsupported logits shape \(2, 3, 4, 5\)"):
        CGGRLoss()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"logits shape \(2, 6, 5\) does not match targets shape \(2, 5\)"):
        CGGRLoss()(torch.zeros(2, 6, 5), ids[:, 1:])
    with pytest.raises(ValueError, match=r"the router returned logits of shape \(2, 5\), expected \[B, S, V\]"):
        CGGRScorer(Fixed(torch.zeros(2, 5)))(ids)


def test_bad_modules() -> None:
    with pytest.raises(ValueError, match=r"model is NoneType, expected a torch\.nn\.Module"):
        CGGRModel(None)
    with pytest.raises(ValueError, match="router is function"):
        CGGRModel(Plain(), router=lambda ids: ids)
    with pytest.raises(ValueError, match="router is str"):
        CGGRScorer("router")
    with pytest.raises(ValueError, match="model is NoneType"):
        create_truncated_router(None)
    with pytest.raises(ValueError, match="num_layers is 0, expected at least 1"):
        create_truncated_router(Plain(), 0)
    with pytest.raises(ValueError, match="architecture is 'rnn', expected one of auto, llama"):
        TruncatedRouter(Plain(), architecture="rnn")
