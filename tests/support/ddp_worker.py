"""One rank under DistributedDataParallel on the CPU; a module of its own, because spawned processes import it.

Checks compare with eager models that nobody wrapped: gradients with the mean over the ranks of those on each rank's
rows.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from architectures import ARCHITECTURES, build, token_batch
from fsdp_models import (
    ATOL,
    LAYERS,
    RTOL,
    expected_on,
    mean_over_ranks,
    on_each_route,
    routed,
    routed_on,
    rows_for,
    whole_parameters,
)
from fsdp_training import adamw, micro_batch
from fsdp_worker import Watch
from graphs_on_cpu import put_graphs_on_cpu
from ranks import make_checks, process_group
from small import small
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import FSDPModule
from toys import Statistics, Toy, noisy, toy_batch

import cggr_compile as cggr
from cggr_compile.run import auto

SHARES = {"one": (0.3, 0.0), "none": (0.0, 0.0)}
"""Of noise in the rows of two ranks."""


def deciding_rank(rank: int, ranks: int, folder: str, case: str) -> None:
    """Fails where two ranks do not select in the same steps, or not by what both of them have seen."""
    torch.set_num_threads(1)
    with process_group(rank, ranks, f"{folder}/{case}"):
        torch.manual_seed(0)
        auto.EVERY = 2
        model = cggr.optimize(Toy().train(), selection="auto", router_layers=2, inner="eager", seed=0)
        wrapper = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        cggr.attach(model, optimizer)
        selects = []
        for number in range(80):
            wrapper(**noisy(32, 2 * number + rank, SHARES[case][rank]))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            selects.append(int(model.cggr.runtime.auto.selects))
        own = torch.tensor(selects)
        others = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(others, own)
        assert torch.equal(*others), "the ranks switched in different steps"
        assert any(selects) is (case == "one")


Wrapper = torch.nn.parallel.DistributedDataParallel


def gradients(name: str, route: str) -> None:
    """Of one architecture and route; the wrapper's handle is the model's."""
    eager = oracle.truncated(build(name), ARCHITECTURES[name], LAYERS)
    batch = token_batch(6, 12, seed=dist.get_rank())
    model = routed_on(copy.deepcopy(eager), route)
    wrapper = Wrapper(model, bucket_cap_mb=0.01)
    loss = wrapper(**batch).loss
    loss.backward()
    wanted, expected_loss, expected = expected_on(eager, name, batch, route)
    assert torch.equal(model.cggr.selected, wanted)
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=RTOL, atol=0)
    oracle.assert_same_gradients(oracle.gradients(model), expected, RTOL, ATOL)
    assert cggr.handle(wrapper) is model.cggr


def training(wrapped_with: dict[str, bool], routed_with: dict[str, Any]) -> None:
    """Five steps of AdamW, each of two micro-batches, the first without reducing (but for a static graph, where torch
    fails on that), and clipped; then a run that is resumed at the third is the whole one, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        if "cuda_graphs" in routed_with:
            put_graphs_on_cpu(patch)
        run, eager = Run(wrapped_with, routed_with), tied()
        optimizer = adamw(eager)
        states: list[Any] = []
        kept = []
        for number in range(5):
            if number == 3:
                states = copy.deepcopy([each.state_dict() for each in run.parts])
            rows = run.step(number)
            kept.append(len(rows[0]))
            eager.zero_grad()
            for micro, own in enumerate(rows):
                (eager(**oracle.rows_of(micro_batch(number, micro), own)).loss / 2).backward()
            mean_over_ranks(oracle.gradients(eager))
            torch.nn.utils.clip_grad_norm_(eager.parameters(), 0.3)
            optimizer.step()
            for name, parameter in run.model.named_parameters():
                torch.testing.assert_close(parameter, eager.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert kept[0] == len(micro_batch(0, 0)["labels"]) > kept[-1]
        again = Run(wrapped_with, routed_with)
        for part, state in zip(again.parts, states, strict=True):
            part.load_state_dict(state)
        for number in range(3, 5):
            again.step(number)
        for (name, one), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(one, other), name


class Run:
    """A model with a tied table, random rows of it on a schedule, under the wrapper, and its optimiser: what trains
    hangs on all that `cggr` saves."""

    def __init__(self, wrapped_with: dict[str, bool], routed_with: dict[str, Any]) -> None:
        self.model = routed(tied(), selection="random", warmup_steps=6, **routed_with)
        self.wrapper = Wrapper(self.model, bucket_cap_mb=0.002, **wrapped_with)
        self.reduced = 0
        self.wrapper.register_comm_hook(None, self._reduced)
        self.reduces = (bool(wrapped_with.get("static_graph")), True)
        self.optimizer = adamw(self.model)
        cggr.attach(self.model, self.optimizer)

    def _reduced(self, group, bucket):  # torch reads annotations, and takes none in text
        self.reduced += 1
        return default_hooks.allreduce_hook(None, bucket)

    @property
    def parts(self) -> list[Any]:
        """What a checkpoint has."""
        return [self.wrapper, self.optimizer, self.model.cggr]

    def step(self, number: int) -> list[torch.Tensor]:
        """One optimiser step; the rows that each micro-batch trained."""
        rows = []
        for micro, reduces in enumerate(self.reduces):
            before = self.reduced
            with nullcontext() if reduces else self.wrapper.no_sync():
                (self.wrapper(**micro_batch(number, micro)).loss / 2).backward()
            assert (self.reduced > before) is reduces
            rows.append(self.model.cggr.selected)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rows


def tied() -> torch.nn.Module:
    model = small()
    model.head.weight = model.embed.weight
    return model


def buffers() -> None:
    """Statistics of rank 0 are everybody's before each forward, as the wrapper says."""
    eager = Statistics().train()
    model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="eager", selection="random", seed=0)
    wrappers = [Wrapper(each) for each in (model, eager)]
    for number in range(3):
        batch = toy_batch(8, seed=10 * number + dist.get_rank())
        wrappers[0](**batch)[0].backward()
        wrappers[1](**oracle.rows_of(batch, model.cggr.selected))[0].backward()
        for (name, found), wanted in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(found, wanted), name
    oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager), RTOL, ATOL)
    assert eager.mean.abs().sum() > 0


def uneven() -> None:
    """`join`: a rank with fewer batches takes part in the others' reductions."""
    model, eager = routed(small()), small()
    wrappers = [Wrapper(each) for each in (model, eager)]
    rows = []
    with wrappers[0].join():
        for number in range(2 + dist.get_rank()):
            wrappers[0](**micro_batch(number, 0)).loss.backward()
            rows.append(model.cggr.selected)
    with wrappers[1].join():
        for number, own in enumerate(rows):
            wrappers[1](**oracle.rows_of(micro_batch(number, 0), own)).loss.backward()
    oracle.assert_same_gradients(oracle.gradients(model), oracle.gradients(eager), RTOL, ATOL)


def frozen_and_unused() -> None:
    """A parameter that does not train, and one that a step on some ranks does not use."""
    model, eager = small(), small()
    for each in (model, eager):
        each.layers[0].qkv.bias.requires_grad_(False)
        each.spare = torch.nn.Parameter(torch.ones(3))
    wrapper = Wrapper(routed(model), find_unused_parameters=True, bucket_cap_mb=0.002)
    for number in range(2):
        batch = micro_batch(number, 0)
        wrapper(**batch).loss.backward()
        _, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
        oracle.assert_same_gradients(oracle.gradients(model), mean_over_ranks(expected), RTOL, ATOL)
        model.zero_grad()


WRAPPED: dict[str, dict[str, bool]] = {
    "plainly": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}
ROUTED: dict[str, dict[str, Any]] = {
    "whole": {},
    "outlined": {"inner": "aot_eager", "outline_layers": True},
    "replayed": {"inner": "aot_eager", "cuda_graphs": True},
}
TRAINED = {
    f"training, {how}, {what}": partial(training, wrapped_with, routed_with)
    for how, wrapped_with in WRAPPED.items()
    for what, routed_with in ROUTED.items()
}
LONG: dict[str, Callable[[], None]] = {**on_each_route(gradients), **TRAINED}
USUAL: dict[str, Callable[[], None]] = {
    **{name: LONG.pop(name) for name in ("llama, sequence", "gpt2, token", "mixtral, sequence", "gemma3, token")},
    **{name: LONG.pop(name) for name in ("training, plainly, whole", "training, views, replayed")},
    "buffers": buffers,
    "uneven": uneven,
    "frozen and unused": frozen_and_unused,
}


def run(rank: int, ranks: int, folder: str, checks: Sequence[str]) -> None:
    """Some checks in one process group."""
    make_checks(rank, ranks, Path(folder), {name: {**USUAL, **LONG}[name] for name in checks})


def trainer_rank(rank: int, ranks: int, folder: str, shards: bool) -> None:
    """Fails where transformers' Trainer, with accumulation and the tokens of all ranks counted together, trains another
    model when it is routed and keeps every row, or where a routed run that is resumed is not the whole one. With
    `shards` it is FSDP2's, which sums in another order."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # Accelerate wants them, though the ranks have met
    trained = partial(_trained, folder, shards)
    with process_group(rank, ranks, f"{folder}/store"):
        plain, losses = trained("plain")
        every, same_losses = trained("every", ratio=1.0)
        assert losses == (pytest.approx(same_losses, rel=1e-6) if shards else same_losses)
        for name, parameter in every.items():
            torch.testing.assert_close(parameter, plain[name], rtol=0, atol=1e-7 if shards else 0)
        half, _ = trained("half", ratio=0.5)
        assert any((half[name] - parameter).abs().max() > 1e-5 for name, parameter in every.items())
        resumed, _ = trained("half", f"{folder}/half/checkpoint-2", ratio=0.5)
        assert all(torch.equal(half[name], parameter) for name, parameter in resumed.items())


SHARDS = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "SHARDED_STATE_DICT",
}


def _trained(
    folder: str, shards: bool, name: str, checkpoint: str | None = None, **options: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters after four steps of two micro-batches, and the losses of training and evaluation."""
    rows = token_batch(48, 10, seed=3)  # as many labels in some as in others there are not
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/{name}",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        average_tokens_across_devices=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **({"fsdp": True, "fsdp_config": SHARDS} if shards else {}),
    )
    if shards:  # Accelerate shards on GPUs alone
        AcceleratorState._reset_state(True)
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2)
    data = [{key: tensor[row] for key, tensor in rows.items()} for row in range(48)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:12])
    if options:
        cggr.route(trainer, router_layers=1, inner="eager", **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert isinstance(trainer.model_wrapped, FSDPModule if shards else Wrapper)
    losses = [log[key] for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log]
    parameters = whole_parameters(model) if shards else dict(model.named_parameters())
    return {key: parameter.detach() for key, parameter in parameters.items()}, losses


def overlapping_rank(rank: int, ranks: int, folder: str) -> None:
    """Fails where DistributedDataParallel does not get the gradients of a layer, or of a part of a replayed backward,
    while the layers in front of it run backward, or gets any before the backward's end where the step is one piece."""
    torch.set_num_threads(1)
    with process_group(rank, ranks, f"{folder}/store"):
        assert _handed_over(outline_layers=False) == ".BBBBBBB"
        assert _handed_over(outline_layers=True) == ".B.B.B.B.B.BB"
        with pytest.MonkeyPatch.context() as patch:
            put_graphs_on_cpu(patch)
            assert _handed_over(cuda_graphs=True) == ".B.B.B.B.B.BB"
            assert _handed_over(cuda_graphs=True, outline_layers=False) == ".BBBBBBB"


def _handed_over(**options: bool) -> str:
    """What a backward does: products (.) and buckets that are handed over to be reduced (B)."""
    model = cggr.optimize(small(layers=6), ratio=0.5, router_layers=1, inner="aot_eager", **options)
    wrapper = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.002)
    watch = Watch()

    def handed_over(group, bucket):  # torch reads annotations, and takes none in text
        watch.names.append("bucket")
        return default_hooks.allreduce_hook(None, bucket)

    wrapper.register_comm_hook(None, handed_over)
    for _ in range(2):  # buckets are made anew once the order of gradients is known
        wrapper(**rows_for(dist.get_rank())).loss.backward()
        model.zero_grad()
    loss = wrapper(**rows_for(dist.get_rank())).loss
    watch.names.clear()
    with watch:
        loss.backward()
    signs = {"bucket": "B", "mm": ".", "addmm": ".", "bmm": "."}
    return re.sub(r"\.+", ".", "".join(signs.get(name, "") for name in watch.names))
