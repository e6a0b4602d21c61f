"""Hooks on submodules, registered before or after the first step, run in the step, or it is refused by their name."""

from __future__ import annotations

import pytest
import torch
from routed_toys import assert_routed, toy
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.hooks import RemovableHandle
from toys import toy_batch

from cggr_compile import CannotOptimize


def doubled(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    return output * 2 if isinstance(module, nn.Linear) else None


def doubled_input(module: nn.Module, args: tuple) -> tuple | None:
    return (args[0] * 2,) if isinstance(module, nn.Linear) else None


def register(kind: str, module: nn.Module) -> RemovableHandle:
    return {
        "forward": lambda: module.register_forward_hook(doubled),
        "pre": lambda: module.register_forward_pre_hook(doubled_input),
        "with kwargs": lambda: module.register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True),
        "global": lambda: hooks_of_all.register_module_forward_hook(doubled),
        "global pre": lambda: hooks_of_all.register_module_forward_pre_hook(doubled_input),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    ["forward", "pre", "global", *(pytest.param(k, marks=pytest.mark.long) for k in ("with kwargs", "global pre"))],
)
def test_hooks_come_and_go_between_steps(kind: str) -> None:
    model, batch = toy(), toy_batch(8)
    assert_routed(model, batch)
    plain = model(**batch)[0]
    hook = register(kind, model.layers[1])
    try:
        assert_routed(model, batch)
        assert not torch.equal(model(**batch)[0], plain)
    finally:
        hook.remove()
    assert_routed(model, batch)
    assert torch.equal(model(**batch)[0], plain)


@pytest.mark.parametrize("first", [True, False])
def test_backward_hooks_are_refused_by_name(first: bool) -> None:
    model, batch = toy(), toy_batch(8)
    if not first:
        assert_routed(model, batch)
    hook = model.layers[1].register_full_backward_hook(lambda module, given, out: (given[0] * 2,))
    with pytest.raises(CannotOptimize, match=r"the backward hook on layers\.1 breaks .*; remove the hook"):
        model(**batch)
    hook.remove()
    assert_routed(model, batch)


def test_a_forward_hook_that_cannot_be_traced_is_named() -> None:
    model = toy()

    def shows(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        print(output)

    model.layers[1].register_forward_hook(shows)
    with pytest.raises(CannotOptimize, match=r"the forward hook shows on layers\.1 breaks .*print\(output\).*; remove"):
        model(**toy_batch(8))


def test_embeddings_made_to_require_grad_by_a_hook() -> None:
    """What PEFT and transformers do for reentrant checkpoints: only behind the embeddings is something trained."""
    model, batch = toy(), toy_batch(8)
    model.requires_grad_(False)
    model.layers[2].requires_grad_(True)
    model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    assert_routed(model, batch)
