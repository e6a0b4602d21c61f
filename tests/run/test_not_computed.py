"""What stands for logits that a routed step does not compute: it is passed on, and says so where it is used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from toys import Toy, toy_batch
from transformers.modeling_outputs import CausalLMOutput

import cggr_compile as cggr
from cggr_compile.run.not_computed import NOT_COMPUTED, NotComputed, OutputNotComputed


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits.argmax(-1),
        lambda logits: logits[:, 1:],
        lambda logits: torch.softmax(logits, -1),
        lambda logits: torch.ones(2) + logits,
        lambda logits: torch.tensor(logits),
        lambda logits: torch.ones(2)[logits],
        list,
        len,
        bool,
        int,
        float,
        abs,
        round,
        sum,
        lambda logits: 1 in logits,
        lambda logits: logits == 1,
        lambda logits: logits == torch.ones(2),
        lambda logits: torch.ones(2) != logits,
        lambda logits: logits != 1,
        lambda logits: logits > 0,
        lambda logits: max(logits, 0.0),
        lambda logits: -logits,
        lambda logits: 2 * logits,
        lambda logits: logits @ logits,
        lambda logits: logits**2,
        np.asarray,
        np.array,
        lambda logits: np.array([logits]),
        lambda logits: np.argmax(logits, -1),
        lambda logits: np.ones(2) * logits,
        lambda logits: np.float64(1) < logits,
    ],
)
def test_an_output_that_is_not_computed_says_so_where_it_is_used(use: Callable[[Any], Any]) -> None:
    with pytest.raises(OutputNotComputed, match="returns its loss, and no logits or activations; read them"):
        use(NOT_COMPUTED)


def test_an_output_that_is_not_computed_is_passed_on() -> None:
    """By whatever hands outputs on: as None is, which it does not equal."""
    operations = pytest.importorskip("accelerate.utils.operations")
    logits = cggr.optimize(Toy().train(), ratio=0.5, inner="eager")(**toy_batch())[1]
    assert logits is NOT_COMPUTED
    assert logits is not None
    assert logits != None  # noqa: E711
    assert None not in (logits, 1)
    assert logits in (logits, 1)
    assert {logits: 1}[logits] == 1
    assert (1, logits) == (1, logits)
    assert not hasattr(logits, "dtype")
    assert not isinstance(logits, torch.Tensor | tuple | list | dict)
    assert f"{logits}" == str(logits) == repr(logits) == "<not computed by a routed step>"
    for copied in (copy.copy(logits), copy.deepcopy([logits])[0], pickle.loads(pickle.dumps(logits))):
        assert isinstance(copied, NotComputed)
    output = CausalLMOutput(loss=torch.ones(()), logits=logits)
    assert list(output) == ["loss", "logits"]
    for passed in (
        tree_map(lambda x: x, output),
        operations.convert_to_fp32(output),
        operations.recursively_apply(torch.detach, output),
        copy.deepcopy(output),
    ):
        assert isinstance(passed.to_tuple()[1], NotComputed)
