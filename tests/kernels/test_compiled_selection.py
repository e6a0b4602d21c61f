"""What inductor makes of the selection rules and of the sampled columns is what they are: it sees through both."""

from __future__ import annotations

import pytest
import torch
from cggr_compile.kernels.reference import router_heads, selection
from torch import Tensor

ROWS, KEPT = 300, 64
"""Enough that an index times a unit of the rules' fixed-point numbers is beyond 32 bits."""


def everything(scores: Tensor, valid: Tensor, noise: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    calls = {
        **{rule: (selection.RULES[rule].function, scores, valid, KEPT, noise) for rule in selection.RULES},
        "over two rows": (selection.importance, scores.view(2, -1), valid.view(2, -1), KEPT, noise.view(2, -1)),
        "columns": (router_heads.sample_columns, target, noise[:1], 32768, 100, 1024),
    }
    return {name: function(*args) for name, (function, *args) in calls.items()}


# A compiler for C++ takes its time.
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_compiled_rules_are_the_rules(device: str) -> None:
    # In one file: most of what a compiler for C++ reads are headers.
    compiled = torch.compile(everything, fullgraph=True, dynamic=False, options={"cpp_wrapper": device == "cpu"})
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores, noise = torch.rand((2, ROWS), generator=generator)
        valid = torch.rand(ROWS, generator=generator) < 0.9
        target = torch.randint(0, 32768, (2000,), generator=generator)
        expected = everything(scores, valid, noise, target)
        found = compiled(*(x.to(device) for x in (scores, valid, noise, target)))
        for name, (index, weight) in expected.items():
            assert torch.equal(found[name][0].cpu(), index), name
            torch.testing.assert_close(found[name][1].cpu(), weight, rtol=1e-6, atol=0, msg=name)
        assert found["importance"][0].unique().numel() == KEPT
