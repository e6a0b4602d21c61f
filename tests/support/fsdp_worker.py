"""One of two ranks that train routed models sharded by FSDP2, on the CPU; a module of its own, because spawned
processes import it.

Every check compares with eager models that nobody sharded: gradients with the mean over the ranks of those on each
rank's rows. `run` leaves what came of the checks, by name, in a file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build, token_batch
from fsdp_models import (
    ATOL,
    LAYERS,
    RTOL,
    assert_step_on_rows,
    expected_on,
    forget,
    mean_over_ranks,
    on_each_route,
    own_rows,
    routed,
    routed_on,
    rows_for,
    shard,
    whole_gradients,
    whole_parameters,
)
from fsdp_training import on_one_rank, on_two_ranks_again, training
from padded import padded
from ranks import found_wrong, process_group, write_outcomes
from small import small
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Toy, noisy

import cggr_compile as cggr
from cggr_compile.run import auto
from cggr_compile.run.variant import Variant


def gradients(name: str, route: str) -> None:
    """Of one architecture and route; the vocabulary, 97, is uneven over two ranks. The model generates as ever."""
    architecture = ARCHITECTURES[name]
    eager = oracle.truncated(build(name), architecture, LAYERS)
    batch = token_batch(6, 12, seed=dist.get_rank())
    model = shard(copy.deepcopy(eager), architecture.layers)
    model = routed_on(model, route)
    loss = model(**batch).loss
    loss.backward()
    selected = model.cggr.selected
    wanted, expected_loss, expected = expected_on(eager, name, batch, route)
    assert torch.equal(selected, wanted)
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=RTOL, atol=0)
    oracle.assert_same_gradients(whole_gradients(model), expected, RTOL, ATOL)
    for each in (model, eager):  # transformers 5.17 fails to generate with mixtral's auxiliary loss
        each.config.output_router_logits = False
    ids = [each.eval().generate(batch["input_ids"], max_new_tokens=2, do_sample=False) for each in (model, eager)]
    assert torch.equal(*ids)


def mixed_precision() -> None:
    """Parameters gathered in bfloat16, gradients reduced in fp32: FSDP2's own step on the rows, bit for bit."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, own = routed(shard(small(), mp_policy=policy)), shard(small(), mp_policy=policy)
    batch = own_rows()
    loss = model(**batch).loss
    loss.backward()
    expected = own(**oracle.rows_of(batch, model.cggr.selected)).loss
    expected.backward()
    assert torch.equal(loss, expected)
    oracle.assert_same_gradients(whole_gradients(model), whole_gradients(own))
    assert all(gradient.dtype == torch.float32 for gradient in whole_gradients(model).values())


class Watch(TorchDispatchMode):
    """The names of the operators that run. Not torch's profiler, which a collective outlives that ends behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__.removesuffix("_out"))
        return func(*args, **(kwargs or {}))


def watched(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and the operators of a routed step or of its backward that run in it."""
    watch, run = Watch(), Variant.__call__

    def watched_run(variant: Variant, *inputs: Any) -> Any:
        with watch:  # around the step's code alone: Dynamo leaves calls in a mode alone
            return run(variant, *inputs)

    with patch.object(Variant, "__call__", watched_run):
        if getattr(call, "__name__", "") != "backward":
            return call(), watch.names
        with watch:
            return call(), watch.names


def collectives(call: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a call gives, and how many collectives ran in it."""
    given, found = watched(call)
    names = {"gathers": "all_gather_into_tensor", "scatters": "reduce_scatter_tensor"}
    return given, {name: found.count(operator) for name, operator in names.items()}


def gathered_twice() -> None:
    """A compiled step gathers each unit once, router and main pass together, and again in the backward."""
    _gathers(reshards=True)


def gathered_once() -> None:
    """With reshard_after_forward=False what was gathered is kept for the backward."""
    _gathers(reshards=False)


def _gathers(reshards: bool) -> None:
    units = small().config.layers + 1
    model, batch = routed(shard(small(), reshard_after_forward=reshards), inner="aot_eager"), own_rows()
    assert_step_on_rows(model, small(), batch)
    loss, forward = collectives(lambda: model(**batch).loss)
    _, backward = collectives(loss.backward)
    assert forward == {"gathers": units, "scatters": 0}
    assert backward == {"gathers": units if reshards else 0, "scatters": units}


def one_unit_ahead() -> None:
    """The next unit is gathered (G) while one is waited for (w) and computes (.), its gradients are scattered (R) while
    the one before computes; inductor keeps that order, and has it in the backward too."""
    signs = {"all_gather_into_tensor": "G", "reduce_scatter_tensor": "R", "wait_tensor": "w", "mm": ".", "addmm": "."}

    def order(call: Callable[[], Any]) -> tuple[Any, str]:
        given, names = watched(call)
        return given, re.sub(r"\.+", ".", "".join(signs.get(name, "") for name in names))

    # Where the last gradients but one are waited for is inductor's choice, which is another one in torch 2.14.
    backwards = {
        "aot_eager": (".Gw.RGw.RwGw.RwRww",),
        "inductor": (".GGw.RGw.Rww.RwRww", ".GGw.RGw.Rww.RRwww"),
    }
    for inner, backward in backwards.items():
        model = routed(shard(small()), inner=inner)
        model(**own_rows()).loss.backward()
        loss, forward = order(lambda model=model: model(**own_rows()).loss)
        assert forward == "GGwGw.Gw.w.", inner
        assert order(loss.backward)[1] in backward, inner


def adapters() -> None:
    """LoRA: what is frozen has no gradient, and none is scattered; thawed, it has one in the next step."""
    import peft  # takes seconds, in every rank

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return peft.inject_adapter_in_model(
            peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False), small()
        ).train()

    model = routed(shard(adapted()))
    assert_step_on_rows(model, adapted(), own_rows())
    trained = [name for name, gradient in whole_gradients(model).items() if gradient is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    model.requires_grad_(True)
    assert_step_on_rows(model, adapted().requires_grad_(True), own_rows())


def differentiated_twice() -> None:
    """Gradients of shards have no history: what asks for one is told, and not given gradients without it."""
    model = routed(shard(small()), inner="eager")
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(**own_rows()).loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(each.to_local().square().sum() for each in found).backward()


def checkpointed_layers() -> None:
    """Activation checkpoints of the layers, as they are and compiled."""
    for inner in ("eager", "aot_eager"):
        model = small()
        model.gradient_checkpointing = True
        assert_step_on_rows(routed(shard(model), inner=inner), small(), own_rows())


def outlined_layers() -> None:
    """A step that is compiled in pieces: layers of a kind, gathering included, are one compiled function."""
    model = routed(shard(small(layers=4)), inner="aot_eager", outline_layers=True)
    assert_step_on_rows(model, small(layers=4), own_rows())
    variant = model.cggr.runtime.plans[-1].route.variant
    assert (variant.pieces, variant.bodies) == (5, 3)


def other_calls() -> None:
    """Evaluation, calls without labels or without gradients and FSDP2's training steps are FSDP2's, before and after
    routed steps; sharded after it was optimised, a model trains all the same."""
    eager, model, batch = small(), shard(routed(small())), own_rows()
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    for _ in range(2):
        assert_step_on_rows(model, eager, batch)
        with torch.no_grad():
            assert torch.equal(model(**batch).loss, eager(**batch).loss)
        assert torch.equal(model.eval()(**batch).logits, eager.eval()(**batch).logits)
        for each in (model, eager):
            forget(each.train())
            each(**unlabelled).logits.square().mean().backward()
        expected = mean_over_ranks(oracle.gradients(eager))
        oracle.assert_same_gradients(whole_gradients(model), expected, RTOL, ATOL)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    cggr.restore(model)
    assert sum(hooks) - 1 == sum(len(module._forward_pre_hooks) for module in model.modules())
    forget(model)
    model(**batch).loss.backward()
    _, expected = oracle.step(eager, batch)
    oracle.assert_same_gradients(whole_gradients(model), mean_over_ranks(expected), RTOL, ATOL)


def ranks_that_differ() -> None:
    """Batches of other sizes, a single row too, and other lengths do not hang."""
    eager, model = small(), routed(shard(small()))
    for sizes in [((6, 12), (4, 10)), ((1, 12), (6, 12)), ((5, 8), (1, 8))]:
        assert_step_on_rows(model, eager, rows_for(7, *sizes[dist.get_rank()], masked=False))


def deciding_together() -> None:
    """With selection="auto" both ranks begin to select in the same step, though one has no noise in its rows."""
    auto.EVERY = 2
    model = routed(shard(Toy().train()), ratio=None, router_layers=2, selection="auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cggr.attach(model, optimizer)
    selects = []
    for number in range(80):
        model(**noisy(32, 2 * number + dist.get_rank(), 0.3 * (1 - dist.get_rank())))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        selects.append(model.cggr.runtime.auto.selects)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, selects)
    assert found[0] == found[1]
    assert any(selects)


def growing() -> None:
    """The first layer trains alone, then all, each a copy of it at first, shard by shard, read or not."""
    model = small()
    for index, layer in enumerate(model.layers):
        layer.off = nn.Parameter(torch.full((3, 2), float(index)))
    model = routed(shard(model), ratio=None, router_layers="auto", route="depth", depth_layers=1, depth_until=1)
    for steps in range(2):
        forget(model)
        model(**own_rows()).loss.backward()
        eager = small(layers=1) if steps == 0 else small()
        eager.load_state_dict(whole_parameters(model), strict=False)
        _, expected = oracle.step(eager, own_rows())
        found = whole_gradients(model)
        oracle.assert_same_gradients({name: found[name] for name in expected}, mean_over_ranks(expected), RTOL, ATOL)
        assert all(found[name] is None for name in found.keys() - expected.keys())
        model.cggr.step()
    whole = whole_parameters(model)
    assert all(torch.equal(whole[name], whole[name.replace("s.1.", "s.0.")]) for name in whole if "s.1." in name)


def policies_that_change() -> None:
    """What FSDP2 lets a user change between steps is followed."""
    model, batch = routed(shard(small())), own_rows()
    assert_step_on_rows(model, small(), batch)
    before = whole_gradients(model)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(4.0)
    model.zero_grad()
    model(**batch).loss.backward()
    half = {name: None if gradient is None else gradient / 2 for name, gradient in before.items()}
    oracle.assert_same_gradients(whole_gradients(model), half, RTOL, ATOL)


def padding_left_out() -> None:
    """Ranks with padding train on their real tokens, beside ranks without."""
    architecture = ARCHITECTURES["llama"]
    eager = oracle.truncated(build("llama"), architecture, LAYERS)
    model = routed(shard(copy.deepcopy(eager), architecture.layers), ratio=1.0, unpad=True)
    rounding = oracle.rounding(COMMON["hidden_size"], COMMON["intermediate_size"], VOCABULARY, 64)
    for lengths in (([7, 4, 9], [3, 9, 2]), ([9, 1, 5], [9, 9, 9])):
        batch = padded(lengths[dist.get_rank()], seed=dist.get_rank())
        forget(model)
        loss = model(**batch).loss
        loss.backward()
        expected_loss, expected = oracle.step(eager, batch)
        found = loss.detach(), whole_gradients(model)
        oracle.assert_step_within(rounding, *found, expected_loss, mean_over_ranks(expected))
    done, places = model.cggr.runtime.plans[-1].unpadded.batch.last
    assert (done < places) == (dist.get_rank() == 0)


USUAL: dict[str, Callable[..., None]] = {"training": training}
LONG: dict[str, Callable[..., None]] = {
    **on_each_route(gradients),
    "mixed precision": mixed_precision,
    "other calls": other_calls,
    "adapters": adapters,
    "differentiated twice": differentiated_twice,
    "ranks that differ": ranks_that_differ,
    "gathered twice": gathered_twice,
    "gathered once": gathered_once,
    "one unit ahead": one_unit_ahead,
    "checkpointed layers": checkpointed_layers,
    "outlined layers": outlined_layers,
    "policies that change": policies_that_change,
    "auto": deciding_together,
    "depth": growing,
    "padding left out": padding_left_out,
}


def run(rank: int, ranks: int, folder: str, checks: Sequence[str]) -> None:
    """Some checks; `outcomes.json` has what rank 0 found wrong, or else rank 1, by the check's name."""
    torch.set_num_threads(1)
    outcomes: dict[str, str] = {}
    path = Path(folder)
    with process_group(rank, ranks, path / "first"):
        for name in checks:
            check = {**USUAL, **LONG}[name]
            outcomes[name] = found_wrong(partial(check, path) if check is training else check)
    if "training" in checks:
        if rank == 0:
            with process_group(0, 1, path / "second"):
                outcomes["on one rank"] = found_wrong(partial(on_one_rank, path))
        with process_group(rank, ranks, path / "third"):
            outcomes["on two ranks again"] = found_wrong(partial(on_two_ranks_again, path))
    if rank == 0:
        write_outcomes(path, outcomes)
