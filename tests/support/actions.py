"""What people do to a model between two training steps, as actions on a `World`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig
from peft import __version__ as peft_version
from small import Small, small
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers.integrations.peft import MIN_PEFT_VERSION

import cggr_compile as cggr

IGNORED = -100
ROUTER_LAYERS = 1


class World:
    """One model, how it is trained, and the batch of the next step."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.hooks: list[Any] = []
        self.rows, self.length, self.mask, self.labels, self.around = 6, 9, "none", "all", "nothing"
        self.seed = 0
        self.model: Small = cggr.optimize(small(), **self.options)

    def batch(self) -> dict[str, Tensor]:
        """The next batch; its labels are those of `self.labels`."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        shape, words = (self.rows, self.length), self.model.config.vocab_size
        ids = torch.randint(0, words, shape, generator=generator)
        labels, batch = ids.clone(), {"input_ids": ids}
        if self.mask != "none":
            padding = torch.randint(0, self.length - 1, (self.rows, 1), generator=generator)
            place = torch.arange(self.length).expand(shape)
            real = place >= padding if self.mask.endswith("left") else place < self.length - padding
            labels = labels.masked_fill(~real, IGNORED)
            batch["attention_mask"] = real.to(MASKS[self.mask])
        if self.labels == "completion":
            start = torch.randint(0, self.length, (self.rows, 1), generator=generator)
            labels = labels.masked_fill(torch.arange(self.length) < start, IGNORED)
        elif self.labels == "some rows":
            labels[torch.rand(self.rows, generator=generator) < 0.6] = IGNORED
        elif self.labels == "no row":
            labels.fill_(IGNORED)
        elif self.labels == "out of range":
            labels[-1, -1] = words
        return {**batch, "labels": labels}

    def forward(self, **inputs: Any) -> Any:
        """The class's own forward on the modules as they are: hooks of submodules run, those of the model do not."""
        return type(self.model).forward(self.model, **inputs)

    def route(self) -> Any:
        return self.model.cggr.config.routes[0]


MASKS = {
    "long, left": torch.int64,
    "long, right": torch.int64,
    "bool, right": torch.bool,
    "float, right": torch.float32,
    "none": torch.int64,
}

# ---- actions: each returns nothing and leaves a world in which a step can be made ----


def _freeze(world: World, layer: int) -> None:
    world.model.layers[layer].requires_grad_(False)


def _unfreeze(world: World, layer: int) -> None:
    world.model.layers[layer].requires_grad_(True)


def _resize(world: World, words: int) -> None:
    world.model.resize_token_embeddings(words, mean_resizing=False)


def _add_adapter(world: World, place: str) -> None:
    known = TorchVersion(peft_version) >= MIN_PEFT_VERSION  # transformers 5.24 wants a PEFT that is not out
    if known and not getattr(world.model, "peft_config", {}):
        world.model.add_adapter(LoraConfig(r=2, target_modules=[place], init_lora_weights=False), "lora")


def _remove_adapter(world: World, _: Any) -> None:
    if getattr(world.model, "peft_config", {}):
        world.model.delete_adapter("lora")
        world.model.requires_grad_(True)


def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


def halved(module: nn.Module, args: tuple) -> tuple:
    return (args[0] / 2, *args[1:])


def tripled(module: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    return tuple(None if gradient is None else gradient * 3 for gradient in inputs)


def _hook(world: World, kind: str) -> None:
    part = world.model.layers[1].up
    register = {
        "forward": lambda: part.register_forward_hook(doubled),
        "pre": lambda: part.register_forward_pre_hook(halved),
        "backward": lambda: part.register_full_backward_hook(tripled),
    }[kind]
    world.hooks.append(register())


def _unhook(world: World, _: Any) -> None:
    while world.hooks:
        world.hooks.pop().remove()


def _dtype(world: World, dtype: torch.dtype) -> None:
    world.model.to(dtype)


def _dropout(world: World, probability: float) -> None:
    for module in world.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _set(name: str) -> Callable[[World, Any], None]:
    def action(world: World, value: Any) -> None:
        setattr(world, name, value)

    return action


def _copy(world: World, how: str) -> None:
    if how == "deepcopy":
        world.model = copy.deepcopy(world.model)
    elif how == "pickle":
        world.model = pickle.loads(pickle.dumps(world.model))
    else:
        buffer = io.BytesIO()
        torch.save(world.model, buffer)
        world.model = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    world.hooks = [_Copied(hooks) for module in world.model.modules() for hooks in _hooks_of(module)]


class _Copied:
    """Removes all hooks of one kind, whose handles belong to the model that was copied."""

    def __init__(self, hooks: dict) -> None:
        self.hooks = hooks

    def remove(self) -> None:
        self.hooks.clear()


def _hooks_of(module: nn.Module) -> list[dict]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ours = (doubled, halved, tripled)
    return [hooks for hooks in kinds if any(hook in ours for hook in hooks.values())]


def _restore(world: World, _: Any) -> None:
    plain = cggr.restore(world.model)
    assert plain is world.model
    assert "forward" not in vars(plain)
    assert "cggr" not in vars(plain)
    batch = {name: tensor for name, tensor in world.batch().items() if name != "labels"}
    assert plain(**batch).logits.shape[:2] == batch["input_ids"].shape
    world.model = cggr.optimize(plain, **world.options)


def _options(world: World, options: Mapping[str, Any]) -> None:
    world.options = dict(options)
    cggr.optimize(world.model, **options)


def _evaluate(world: World, _: Any) -> None:
    batch = world.batch() | {"labels": torch.zeros(world.rows, world.length, dtype=torch.int64)}
    world.model.eval()
    with torch.no_grad():
        assert torch.equal(world.model(**batch).logits, world.forward(**batch).logits)
    world.model.train()
    del batch["labels"]
    assert torch.equal(_seeded(world.model, batch).logits, _seeded(world.forward, batch).logits)


def _checkpointing(world: World, on: bool) -> None:
    world.model.gradient_checkpointing = on


def _seeded(forward: Callable[..., Any], batch: Mapping[str, Tensor]) -> Any:
    torch.manual_seed(3)
    return forward(**batch)


OPTIONS = st.one_of(
    st.fixed_dictionaries(
        {
            "route": st.just("sequence"),
            "selection": st.sampled_from(["topk", "topk", "random", "trimmed"]),
            "ratio": st.sampled_from([0.3, 0.5, 0.9, 1.0]),
        }
    ),
    st.fixed_dictionaries(
        {
            "route": st.sampled_from(["token", "loss"]),
            "selection": st.sampled_from(["topk", "random", "trimmed"]),
            "ratio": st.sampled_from([0.3, 0.5, 1.0]),
        }
    ),
).map(lambda drawn: {**drawn, "router_layers": ROUTER_LAYERS, "inner": "eager", "seed": 1})

ACTIONS: dict[str, tuple[Callable[[World, Any], None], st.SearchStrategy]] = {
    "train": (lambda world, _: None, st.none()),
    "evaluate": (_evaluate, st.none()),
    "freeze": (_freeze, st.integers(0, 2)),
    "unfreeze": (_unfreeze, st.integers(0, 2)),
    "resize": (_resize, st.sampled_from([29, 31, 40])),
    "add adapter": (_add_adapter, st.sampled_from(["qkv", "up"])),
    "remove adapter": (_remove_adapter, st.none()),
    "hook": (_hook, st.sampled_from(["forward", "pre", "backward"])),
    "remove hooks": (_unhook, st.none()),
    "dtype": (_dtype, st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    "dropout": (_dropout, st.sampled_from([0.0, 0.4])),
    "length": (_set("length"), st.integers(2, 12)),
    "batch size": (_set("rows"), st.integers(1, 9)),
    "mask": (_set("mask"), st.sampled_from(sorted(MASKS))),
    "labels": (_set("labels"), st.sampled_from(["all", "completion", "some rows", "no row", "out of range"])),
    "copy": (_copy, st.sampled_from(["deepcopy", "pickle", "save"])),
    "restore": (_restore, st.none()),
    "options": (_options, OPTIONS),
    "around": (_set("around"), st.sampled_from(["nothing", "checkpoint", "reentrant checkpoint"])),
    "checkpointing": (_checkpointing, st.booleans()),
}


@st.composite
def sequences(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Options, and up to eight actions with their arguments."""
    names = draw(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=8))
    return draw(OPTIONS), [(name, draw(ACTIONS[name][1])) for name in names]


def perform(world: World, name: str, argument: Any) -> None:
    """One action."""
    ACTIONS[name][0](world, argument)
