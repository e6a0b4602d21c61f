"""One rank under DistributedDataParallel on the CPU; a module of its own, because spawned processes import it."""

from __future__ import annotations

import copy
import os
import re

import oracle
import pytest
import torch
import torch.distributed as dist
import transformers
from architectures import ARCHITECTURES, build, token_batch
from fsdp_models import rows_for
from fsdp_worker import Watch
from graphs_on_cpu import put_graphs_on_cpu
from ranks import process_group
from small import small
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from toys import Toy, noisy

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


def routed_rank(rank: int, ranks: int, folder: str) -> None:
    """Fails where the routed gradients are not the mean over the ranks of eager's on each rank's selected rows."""
    torch.set_num_threads(1)
    with process_group(rank, ranks, f"{folder}/store"):
        eager = oracle.truncated(build("gpt2"), ARCHITECTURES["gpt2"], 2)
        model = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="eager")
        batch = token_batch(6, 12, seed=rank)
        # Dynamo splits the graph of a model that fills several buckets; buckets as small as this model's it rejects.
        wrapper = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
        wrapper(**batch).loss.backward()
        _, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= ranks
        oracle.assert_same_gradients(oracle.gradients(model), expected, rtol=1e-6, atol=1e-8)
        assert cggr.handle(wrapper) is model.cggr


def trainer_rank(rank: int, ranks: int, folder: str) -> None:
    """Fails where transformers' Trainer, with accumulation and the tokens of all ranks counted together, trains another
    model when it is routed and keeps every row, or where a routed run that is resumed is not the whole one."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # Accelerate wants them, though the ranks have met
    with process_group(rank, ranks, f"{folder}/store"):
        plain, losses = _trained(folder, "plain")
        every, same_losses = _trained(folder, "every", ratio=1.0)
        assert losses == same_losses
        assert all(torch.equal(plain[name], tensor) for name, tensor in every.items())
        half, _ = _trained(folder, "half", ratio=0.5)
        assert not all(torch.equal(half[name], tensor) for name, tensor in every.items())
        resumed, _ = _trained(folder, "half", f"{folder}/half/checkpoint-2", ratio=0.5)
        assert all(torch.equal(half[name], tensor) for name, tensor in resumed.items())


def _trained(
    folder: str, name: str, checkpoint: str | None = None, **options: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters after four steps of two micro-batches, and the losses."""
    rows = token_batch(48, 10, seed=3)  # as many labels in some as in others there are not
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/{name}",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        average_tokens_across_devices=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2)
    data = [{key: tensor[row] for key, tensor in rows.items()} for row in range(48)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    if options:
        cggr.route(trainer, router_layers=1, inner="eager", **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {key: parameter.detach() for key, parameter in model.named_parameters()}, losses


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
