"""`explain` leaves no trace of itself, `restore` none of `optimize`: neither on the model nor in the process."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch
from oracle import truncated
from torch import nn
from torch._dynamo import utils
from toys import Toy, toy_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.5, "router_layers": 1, "inner": "eager"}


class Marked(Toy):
    """Buffers of both kinds, frozen parts, mixed modes, hooks and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.ones(1))
        self.passing = nn.Buffer(torch.ones(1), persistent=False)
        self.register_buffer("plain", torch.ones(1))
        self.note = {"of": ["the", "user"]}
        self.layers[0].weight.requires_grad_(False)
        self.layers[1].eval()
        self.embed.weight.tag = "kept"
        self.head.register_forward_hook(lambda module, args, output: output)
        self.layers[2].register_forward_pre_hook(lambda module, args: None)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh() * self.scale * self.passing * self.plain
        return hidden


def composite() -> nn.Module:
    """Records outputs, for which transformers installs hooks: with its router's logits."""
    model = truncated(build("mixtral"), ARCHITECTURES["mixtral"], 2)
    model.config.output_router_logits = True
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model, by place: types, attributes, flags, hooks, tensors and their attributes."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        seen[path] = type(module)
        for name, attribute in vars(module).items():
            place = f"{path}:{name}"
            if name.endswith("_hooks") or "_hooks_" in name:
                seen[place] = dict(attribute) if isinstance(attribute, dict) else attribute
            elif name in ("_parameters", "_buffers"):
                for key, tensor in attribute.items():
                    seen[f"{place}.{key}"] = None if tensor is None else _seen(tensor)
            elif name == "_modules":
                seen[place] = list(attribute)
            elif name == "_non_persistent_buffers_set":
                seen[place] = set(attribute)
            else:
                seen[place] = copy.deepcopy(attribute) if isinstance(attribute, (dict, list)) else attribute
    return seen


def _seen(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Dynamo marks every tensor that it traced, whoever asks it to.
    marks = {name: mark for name, mark in vars(tensor).items() if not name.startswith("_dynamo_")}
    flags = (tensor.requires_grad, tensor._version, tensor.data_ptr(), tensor.grad)
    return (id(tensor), type(tensor), isinstance(tensor, nn.Buffer), *flags, marks)


def process() -> dict[str, Any]:
    """What a compilation may change of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of options that torch keeps without effect
        options = torch._dynamo.config.get_config_copy()
    return {
        **options,
        "run_node": utils.run_node,
        "gc": gc.isenabled(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
    }


def explained(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    str(cggr.explain(model, batch, **OPTIONS))


def refused(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(cggr.CannotOptimize):
        cggr.explain(model, batch, **{**OPTIONS, "router_layers": 9})


def optimised_and_restored(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    cggr.restore(cggr.optimize(model, **OPTIONS))


def trained_and_restored(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    cggr.optimize(model, **OPTIONS)
    model(**batch)[0].backward()
    model.zero_grad()
    cggr.restore(model)


USES = (explained, refused, optimised_and_restored, trained_and_restored)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("kind", "use"), [*((Marked, use) for use in USES), (composite, trained_and_restored)])
def test_nothing_is_left(kind: Callable[[], nn.Module], use: Callable[..., None]) -> None:
    model = kind()
    batch = toy_batch() if kind is Marked else token_batch()
    around, before = process(), snapshot(model)
    use(model, batch)
    after = snapshot(model)
    assert {name: value for name, value in after.items() if before.get(name) != value} == {}
    assert before.keys() == after.keys()
    assert {name: value for name, value in process().items() if around[name] != value} == {}


def test_marks_survive_a_copy_of_the_optimised_model() -> None:
    copied = cggr.restore(copy.deepcopy(cggr.optimize(Marked().train(), **OPTIONS)))
    assert isinstance(copied.scale, nn.Buffer)
    assert isinstance(copied.passing, nn.Buffer)
    assert not isinstance(copied.plain, nn.Buffer)


def test_a_thread_that_compiles_meanwhile_has_torchs_own_functions() -> None:
    """Steps of a routed model in one thread, compilations in another: each sees what torch has when nothing runs."""
    run_node, seen, done = utils.run_node, [], threading.Event()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((utils.run_node, torch._dynamo.config.fake_tensor_cache_enabled))
        return gm

    def compile_others() -> None:
        while not done.is_set():
            torch._dynamo.reset_code(other.__code__)
            torch.compile(other, backend=backend)(torch.ones(2))

    def other(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    thread = threading.Thread(target=compile_others)
    thread.start()
    try:
        for rows in (4, 6):
            model = cggr.optimize(Toy().train(), **OPTIONS)
            for _ in range(3):
                model(**toy_batch(rows))[0].backward()
    finally:
        done.set()
        thread.join()
    assert seen
    assert set(seen) == {(run_node, torch._dynamo.config.fake_tensor_cache_enabled)}
    assert utils.run_node is run_node
