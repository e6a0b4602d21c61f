"""Distributed models, in one process: Accelerate's FSDP2 around a routed model. Ways to distribute a model that cannot
be routed are named, with a remedy, and nothing is patched.

What several ranks compute is in `test_fsdp.py` and `test_integrations.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import oracle
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from architectures import ARCHITECTURES, build, token_batch
from documents import examples
from fsdp_models import assert_step_on_rows, whole_parameters
from small import Small, small
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile import CannotOptimize


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))


def sharded(**options: Any) -> Small:
    model = small()
    for layer in model.layers:
        fully_shard(layer, **options)
    return model


def tensor_parallel() -> Small:
    model = small()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh()["shard"], [Shard(0)]))
    return model


def zero_3() -> Small:
    model = small()
    model.head.weight.ds_id = 0  # as deepspeed.zero.Init marks parameters
    return model


WAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "HSDP": (lambda: sharded(mesh=mesh()), "a mesh of one dimension"),
    "CPUOffloadPolicy": (lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), "leave offload_policy"),
    "shard_placement_fn": (lambda: sharded(shard_placement_fn=lambda x: Shard(x.dim() - 1)), "first dimension"),
    "FSDP1": (lambda: FullyShardedDataParallel(small(), device_id=torch.device("cpu")), "fsdp_version: 2"),
    "head.weight is a DTensor": (tensor_parallel, "without tp_plan"),
    "DeepSpeed ZeRO-3": (zero_3, "ZeRO stage 0 to 2"),
    "DataParallel": (lambda: nn.DataParallel(small()), "DistributedDataParallel"),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_way_to_distribute_is_refused_by_name(name: str) -> None:
    make, remedy = WAYS[name]
    model = make()
    with pytest.raises(CannotOptimize) as error:
        cggr.optimize(model, ratio=0.5)
    assert name in str(error.value)
    assert remedy in str(error.value)
    assert "forward" not in vars(model)
    assert "cggr" not in vars(model)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    """One that shards by FSDP2, as it does on GPUs alone by itself."""
    AcceleratorState._reset_state(True)
    made = accelerate.Accelerator(cpu=True)
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    yield made
    AcceleratorState._reset_state(True)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_accelerate_shards_a_routed_model_and_saves_and_loads_it(
    name: str, accelerator: accelerate.Accelerator, tmp_path: Path
) -> None:
    """Its units are layers, the embedding, and norm and head together; the table of gpt2 is tied to its head."""
    eager = oracle.truncated(build(name), ARCHITECTURES[name], 2)
    routed = cggr.optimize(copy.deepcopy(eager), ratio=0.5, router_layers=1, inner="eager")
    batches = [token_batch(6, 12, seed=seed) for seed in range(2)]
    accelerator.state.distributed_type = DistributedType.FSDP
    model, optimizer = accelerator.prepare(routed, torch.optim.AdamW(routed.parameters()))
    for batch in batches:
        assert_step_on_rows(model, eager, batch)
        torch.testing.assert_close(model.eval()(**batch).logits, eager.eval()(**batch).logits)
        model.train(), eager.train()

    def step(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return whole_parameters(model)

    step(batches[0])
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.save_state(str(tmp_path))
    expected = step(batches[1])
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in step(batches[1]).items())


def test_the_pages_example_shards_a_model_and_routes_it() -> None:
    eager = oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2)
    sharded_and_routed = examples("distributed.md", "sharded")["sharded"]
    assert_step_on_rows(sharded_and_routed(copy.deepcopy(eager)), eager, token_batch(6, 12))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(31, (4, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def test_cuda_graphs_of_a_sharded_model_are_refused_before_and_after_optimize() -> None:
    with pytest.raises(CannotOptimize, match="cuda_graphs=True with fully_shard"):
        cggr.optimize(fully_shard(sharded()), ratio=0.5, cuda_graphs=True)
    late = cggr.optimize(small(), ratio=0.5, cuda_graphs=True)
    fully_shard(late)
    with pytest.raises(CannotOptimize, match="cuda_graphs=True with fully_shard"):
        late(**batch())


def test_a_model_of_which_parts_are_sharded_is_refused_at_its_first_step() -> None:
    model = cggr.optimize(sharded(), ratio=0.5)
    with pytest.raises(CannotOptimize, match=r"parts of the model only.*call fully_shard\(model\)"):
        model(**batch())


class Clamped(nn.Linear):
    """Clamps its weight in its forward, as Gemma 3n does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.weight.data.clamp_(-1, 1)
        return super().forward(input)


def test_a_parameter_that_the_forward_changes_is_not_sharded() -> None:
    model = small()
    model.layers[1].up.__class__ = Clamped
    with pytest.raises(
        CannotOptimize, match=r"parameter layers\.1\.up\.weight in place, of which each rank has a shard"
    ):
        cggr.optimize(fully_shard(model), ratio=0.5)(**batch())


def test_with_fallback_a_step_that_is_refused_is_fsdps_own() -> None:
    model = cggr.optimize(fully_shard(sharded()), ratio=0.5, fallback="eager")
    with pytest.warns(RuntimeWarning, match="training without routing"):
        loss = model(**batch(), stop=torch.tensor(1)).loss
    loss.backward()
    expected = small()(**batch(), stop=1).loss
    expected.backward()
    assert torch.equal(loss, expected)


def test_backend_cggr_names_the_front_end_that_can() -> None:
    model = torch.compile(fully_shard(sharded()), backend="cggr", options={"ratio": 0.5})
    with pytest.raises(CannotOptimize, match=r"FSDP2 \(fully_shard\).*use cggr.optimize\(model\)"):
        model(**batch())


def test_layers_that_do_not_train_yet_are_said_to_ddp() -> None:
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, inner="eager")
    with pytest.raises(
        CannotOptimize, match="waits for gradients of layers that do not train yet; give it find_unused"
    ):
        DistributedDataParallel(model)(**toy_batch())
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        wrapper(**toy_batch())[0].backward()
    assert model.layers[1].weight.grad is None
    assert model.layers[0].weight.grad is not None
