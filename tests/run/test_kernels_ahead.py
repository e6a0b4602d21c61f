"""Kernels that are compiled ahead are those that the step launches, and a step does without them."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from typing import Any

import head_oracle
import pytest
import torch
from architectures import build, token_batch
from torch import Tensor
from toys import Toy, toy_batch

import cggr_compile as cggr

triton = pytest.importorskip("triton")


def _specialization(x: Any) -> Any:
    """What a compiled kernel depends on in an argument that is no constant."""
    if hasattr(x, "block_shape"):
        return (x.base.dtype, tuple(x.block_shape))
    if hasattr(x, "dtype"):
        return x.dtype
    if type(x) is int:
        return (x == 1, x % 16 == 0, x.bit_length() > 31)
    return type(x)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bool, set[Any]]]:
    """The kernels that were compiled only (True) and those that were launched (False), each with what it is compiled
    for."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: dict[bool, set[Any]] = {True: set(), False: set()}
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        seen[warmup].add((self.fn.__name__, *map(_specialization, args), *sorted(options.items())))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", recording)
    return seen


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="reads the interpreter's launches")


@pytest.fixture(autouse=True)
def _bfloat16_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        head_oracle.shrink_tiles(monkeypatch)


@pytest.mark.sample(4)
@needs_interpreter
@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({"router_head": "sampled", "outline_layers": True}, True),
        ({"route": "loss", "selection": "topk", "scoring": "entropy"}, False),
        *(
            pytest.param(options, autocast, marks=pytest.mark.long)
            for options in (
                {"router_head": "exact"},
                {"router_head": "fp8", "kernels": {"masked_loss": "triton_recompute", "fp8_score": "triton"}},
                {"route": ("token", "loss"), "selection": "topk", "router_head": "sampled"},
                {"ratio": 1.0},
            )
            for autocast in (False, True)
        ),
    ],
    ids=str,
)  # fmt: skip
def test_every_launch_of_a_step_was_compiled_for(
    kernels: dict[bool, set[Any]], options: dict[str, Any], autocast: bool
) -> None:
    model = cggr.optimize(Toy().train(), **{"ratio": 0.5, "inner": "aot_eager", "kernels": "triton", **options})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**toy_batch(6, 16))[0]
    loss.backward()
    assert kernels[False]
    assert kernels[False] - kernels[True] == set()


@needs_interpreter
def test_a_step_says_so_and_goes_on_where_kernels_cannot_be_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from cggr_compile.kernels.triton import ahead

    def fails(*_: Any) -> None:
        raise ValueError("no such target")

    eager = Toy().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=1.0, inner="aot_eager", kernels="triton")
    monkeypatch.setattr(ahead, "compile_kernels", fails)
    with pytest.warns(RuntimeWarning, match="compiled as they run: ValueError: no such target"):
        loss = model(**toy_batch(6, 16))[0]
    torch.testing.assert_close(loss, eager(**toy_batch(6, 16))[0])


def _forget_kernels() -> None:
    """Makes every kernel of this package one that was never compiled in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("cggr_compile.kernels.triton.")]
    for member in (member for module in modules for member in vars(module).values()):
        if isinstance(member, triton.JITFunction):
            member.device_caches.clear()


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:kernels could not be compiled ahead")
@pytest.mark.parametrize("router_head", ["exact", "sampled"])
def test_a_step_compiles_no_kernel_itself(router_head: str) -> None:
    compiled: dict[str, set[str]] = {}

    def note(*_: Any, fn: Any, **__: Any) -> None:
        compiled.setdefault(threading.current_thread().name, set()).add(f"{fn.module}.{fn.name}")

    model = cggr.optimize(build("llama").cuda().bfloat16(), ratio=0.5, router_head=router_head)
    batch: dict[str, Tensor] = {key: tensor.cuda() for key, tensor in token_batch(48, 32).items()}
    _forget_kernels()
    hooks = triton.knobs.runtime
    before, hooks.jit_post_compile_hook = hooks.jit_post_compile_hook, note
    try:
        model(**batch).loss.backward()
    finally:
        hooks.jit_post_compile_hook = before
    ours = {thread: {name for name in names if "cggr" in name} for thread, names in compiled.items()}
    assert any(names for thread, names in ours.items() if thread.startswith("cggr-kernels"))
    assert not {name for thread, names in ours.items() if not thread.startswith("cggr-kernels") for name in names}
