"""The memory of a step as it is predicted, against what really stays alive between a forward and its backward, and
against peaks that are counted by hand."""

from __future__ import annotations

import gc
from typing import Any

import plans
import pytest
import torch
from architectures import build, token_batch
from cggr_compile.kernels.reference.rows import LossArguments
from cggr_compile.kernels.triton import loss
from torch import fx, nn
from torch._inductor.fx_passes import joint_graph
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import Toy, toy_batch

from cggr_compile.ir.liveness import Liveness
from cggr_compile.run.held import held_by

aten = torch.ops.aten

PARTITIONED = "aot_eager_decomp_partition"
"""torch's own backend that divides a step as inductor does and runs its operators one by one."""


class Alive(TorchDispatchMode):
    """The memory that operators make, and how much of it is alive at most and now."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and storage(x) not in given:
                self._made[storage(x)] = x.untyped_storage().nbytes()
        self.most = max(self.most, self.now)
        return found

    @property
    def now(self) -> int:
        return sum(size for ref, size in self._made.items() if not ref.expired())


def storage(x: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def saved_by_a_step(routed: plans.Routed, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a real forward leaves alive, once it has been compiled."""
    routed.step(batch)
    with Alive() as alive:
        outputs = routed.forward(batch)
        gc.collect()  # the interpreter of the kernels leaves circles
        saved = alive.now
    assert outputs
    return saved


OPTIONS = [{"ratio": 0.5}, {"ratio": 0.5, "route": "token", "selection": "random"}, {"ratio": 1.0}]


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_what_the_forward_leaves(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_saved(build(name), token_batch(masked=False), options, monkeypatch)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_the_forward_of_a_toy_leaves(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_saved(Toy(layers=4).train(), toy_batch(), options, monkeypatch)


def check_saved(
    model: nn.Module, batch: dict[str, torch.Tensor], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, by the partitioner alone: torch's own backend leaves inductor's rewriting of the joint graph out."""
    monkeypatch.setattr(joint_graph, "joint_graph_passes", lambda graph: graph)
    program = plans.captured(model, batch)
    routed = plans.Routed(model, program, inner=PARTITIONED, outline_layers=True, kernels="triton", **options)
    rows = len(batch["input_ids"])
    held = held_by(routed.plan, dict(model.named_parameters(remove_duplicate=False)), rows)
    numbers_of_rows = 0 if routed.plan.program.routing.rows is not None else 8 * rows  # the step's, beside its graph
    assert held.saved + numbers_of_rows == saved_by_a_step(routed, batch)
    assert held.gradients_of_parameters == sum(x.nbytes for x in model.parameters())


def test_frozen_parameters_have_no_gradients_and_save_less() -> None:
    model = Toy(layers=4).train()
    routed = plans.Routed(model, plans.captured(model, toy_batch()), ratio=1.0)
    every = dict(model.named_parameters())
    some = {path: x for path, x in every.items() if "layers.3" in path}
    held, less = held_by(routed.plan, every, 4), held_by(routed.plan, some, 4)
    assert less.gradients_of_parameters == sum(x.nbytes for x in some.values())
    assert less.saved < held.saved / 2


def test_a_graph_is_counted_by_kernels() -> None:
    """x is read by a product, whose result a chain of pointwise operators turns into what the second product reads."""
    graph = fx.Graph()
    x, w, v = (graph.placeholder(name) for name in "xwv")
    first = graph.call_function(aten.mm.default, (x, w))
    chain = graph.call_function(aten.tanh.default, (graph.call_function(aten.mul.Tensor, (first, 2.0)),))
    second = graph.call_function(aten.mm.default, (chain, v))
    graph.output((second,))
    shapes = {x: (8, 4), w: (4, 16), v: (16, 2), first: (8, 16), chain: (8, 16), second: (8, 2)}
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = torch.empty(shapes.get(node, (8, 16)), device="meta")
    big, small, given = 8 * 16 * 4, 8 * 2 * 4, 8 * 4 * 4
    liveness = Liveness(graph)
    assert liveness.most(()) == big + small  # the chain is one kernel, in place of the first product
    assert liveness.most((x,)) == max(big, big - given + small)


@pytest.mark.parametrize("algorithm", ["one_pass", "one_pass_small", "recompute"])
@pytest.mark.parametrize("selected", [False, True])
def test_what_the_loss_holds_for_a_moment(algorithm: str, selected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the memory that its kernels take under the interpreter; statistics of rows are not counted."""
    monkeypatch.setitem(loss.ONE_PASS_BYTES, "one_pass_small", 2**16)
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=random) for size in (192, 515))
    target = torch.randint(0, 515, (192,), generator=random)
    given = LossArguments(hidden, weight, None, target, rows=torch.arange(100) if selected else None)
    wanted = [True, True, False]
    with Alive() as alive:
        found = loss.forward(given, wanted, algorithm, summed=False, measured=False)
    made = sum(x.nbytes for x in found)
    of_rows = 64 * 8 * len(target)
    assert 0 <= alive.most - made - loss.forward_scratch(given, wanted, algorithm) <= of_rows
    if algorithm == "recompute":
        with Alive() as alive:
            gradients = loss.backward(torch.ones(()), given, found.divisor, found.log_total, found.missed, wanted)
        assert alive.most - sum(x.nbytes for x in gradients) <= loss.backward_scratch(given)
