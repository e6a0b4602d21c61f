"""What inductor makes of the selection rules and of the sampled columns is what they are: it sees through both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cggr_compile.kernels.reference import router_heads, selection
from torch import Tensor

ROWS, FEWER, KEPT = 300, 100, 64
"""Enough that an index times a unit of the fixed-point numbers of `importance` is beyond 32 bits. Of others fewer:
Triton takes 11 s to compile a sort of 300 numbers, and 4 s for one of 100."""


def calls(scores: Tensor, valid: Tensor, noise: Tensor, target: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    two_rows = scores.view(2, -1), valid.view(2, -1), KEPT, noise.view(2, -1)
    rows = {name: ROWS if name == "importance" else FEWER for name in selection.RULES}
    return {
        **{
            name: partial(selection.RULES[name].function, scores[:n], valid[:n], KEPT, noise[:n])
            for name, n in rows.items()
        },
        "over two rows": partial(selection.importance, *two_rows),
        "columns": partial(router_heads.sample_columns, target, noise[:1], 32768, 100, 1024),
    }


NAMES = (*selection.RULES, "over two rows", "columns")


# A compiler for C++ takes its time, most of it for headers: there they are in one file. Triton takes its own for each.
@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("device", "names"),
    [
        pytest.param("cpu", NAMES, id="cpu", marks=pytest.mark.long),
        *(pytest.param("cuda", (name,), id=f"cuda-{name}", marks=pytest.mark.gpu) for name in NAMES),
    ],
)
def test_compiled_rules_are_the_rules(device: str, names: tuple[str, ...]) -> None:
    def chosen(*args: Tensor) -> dict[str, tuple[Tensor, ...]]:
        made = calls(*args)
        return {name: made[name]() for name in names}

    compiled = torch.compile(chosen, fullgraph=True, dynamic=False, options={"cpp_wrapper": device == "cpu"})
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores, noise = torch.rand((2, ROWS), generator=generator)
        valid = torch.rand(ROWS, generator=generator) < 0.9
        target = torch.randint(0, 32768, (2000,), generator=generator)
        expected = chosen(scores, valid, noise, target)
        found = compiled(*(x.to(device) for x in (scores, valid, noise, target)))
        for name, (index, weight) in expected.items():
            assert torch.equal(found[name][0].cpu(), index), name
            torch.testing.assert_close(found[name][1].cpu(), weight, rtol=1e-6, atol=0, msg=name)
        if "importance" in names:
            assert found["importance"][0].unique().numel() == KEPT
