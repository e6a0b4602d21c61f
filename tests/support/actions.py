"""What people do to a model between two training steps, as actions on a `World`, and the check that follows each.

After every action one labelled training call is made. It must equal eager on what was selected or raise
`CannotOptimize`. The eager side is the class's own forward on the very same modules (hooks, adapters and all), so it
shares nothing with the compiler; `selected` is checked against an eager router where the rule draws nothing.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from peft import LoraConfig
from small import Small, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    if not getattr(world.model, "peft_config", {}):
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


# ---- the check ----


def check(world: World) -> str:
    """One training step against eager; returns how it ended: "equal", "refused" or "raised as eager does".

    Raises AssertionError for another result, and the error itself where a step that must be routed was refused.
    """
    batch = world.batch()
    bad = batch["labels"][:, 1:].ge(world.model.config.vocab_size).any()
    try:
        loss, gradients = _step(world, batch)
    except (cggr.CannotOptimize, IndexError, RuntimeError) as error:
        # torch's checkpoint leaves its hooks on while the frames of an error from within live, for whoever comes next.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, cggr.CannotOptimize) and _may_be_refused(world):
            return "refused"
        if isinstance(error, IndexError) and bad and "out of bounds" in str(error):
            return "raised as eager does"
        raise
    assert not bad, "a label out of range passed unseen"
    expected_loss, expected = _expected(world, batch)
    exact = world.route() != "loss" and not _fills_up(world, batch) and world.labels != "no row"
    coarse = next(world.model.parameters()).dtype is torch.bfloat16
    close = {"rtol": 0.05, "atol": 0.02} if coarse else {"rtol": 1e-4, "atol": 1e-6}
    oracle.assert_same_step(loss, gradients, expected_loss, expected, **({} if exact else close))
    return "equal"


def _may_be_refused(world: World) -> bool:
    return bool(world.hooks) or world.around == "reentrant checkpoint"


def _step(world: World, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    world.model.zero_grad(set_to_none=True)
    torch.manual_seed(world.seed)
    if world.around == "nothing":
        loss = world.model(**batch).loss
    else:
        trained = (parameter for parameter in world.model.parameters() if parameter.requires_grad)
        given = next(trained) if world.around == "reentrant checkpoint" else None
        run = lambda _: world.model(**batch).loss  # noqa: E731  what is checkpointed, with an input that has a gradient
        loss = checkpoint(run, given, use_reentrant=world.around == "reentrant checkpoint")
    loss.backward()
    return loss.detach(), oracle.gradients(world.model)


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:] != IGNORED


def _fills_up(world: World, batch: Mapping[str, Tensor]) -> bool:
    """Whether fewer rows are selectable than are kept: the rest repeats, which reorders sums."""
    if world.route() != "sequence" or world.options["ratio"] == 1 or world.rows == 1:
        return False
    return int(_counted(batch).any(1).sum()) < math.ceil(world.options["ratio"] * world.rows - 1e-9)


def _expected(world: World, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Eager's loss and gradients on what the step before selected, which an eager router must confirm."""
    kept = world.model.cggr.selected
    _check_selection(world, batch, kept)
    world.model.zero_grad(set_to_none=True)
    torch.manual_seed(world.seed)
    if world.route() == "sequence":
        if not _counted(batch).any():  # eager's mean over nothing is NaN; here it is a connected zero
            loss = world.forward(**batch | {"labels": batch["labels"].clamp(min=0)}).loss * 0
        else:
            loss = world.forward(**oracle.rows_of(batch, kept) | {"labels": _once(batch["labels"], kept)}).loss
    elif world.route() == "token":
        whole = kept.shape[1] == world.length
        loss = world.forward(**batch, kept=None if whole else {1: kept}).loss
        if not _counted(batch).any():
            loss = world.forward(**batch | {"labels": batch["labels"].clamp(min=0)}).loss * 0
    else:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = world.forward(**inputs).logits.float()
        targets = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        loss = F.cross_entropy(logits[kept], targets[kept], reduction="sum") / kept.sum().clamp(min=1)
    loss.backward()
    return loss.detach(), oracle.gradients(world.model)


def _once(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels of the kept rows; those that only fill up, which come again, are ignored."""
    again = torch.tensor([row in kept[:place] for place, row in enumerate(kept)])
    return labels[kept].masked_fill(again[:, None], IGNORED)


@torch.no_grad()
def _scores(world: World, batch: Mapping[str, Tensor]) -> Tensor:
    """An eager router's losses [B, S - 1], 0 where the label is ignored."""
    drops = [module for module in world.model.modules() if isinstance(module, nn.Dropout)]
    for module in drops:
        module.eval()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = world.forward(**inputs, stop=ROUTER_LAYERS).logits[:, :-1].float()
    for module in drops:
        module.train()
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _check_selection(world: World, batch: Mapping[str, Tensor], kept: Tensor) -> None:
    """What was selected is of the right number and counts, and is the hardest where the rule is topk."""
    counted, ratio, rule = _counted(batch), world.options["ratio"], world.options["selection"]
    exact = next(world.model.parameters()).dtype is not torch.bfloat16  # coarse scores tie
    if world.route() == "sequence":
        wanted = world.rows if world.rows == 1 else math.ceil(ratio * world.rows - 1e-9)
        assert len(kept) == wanted
        rows = kept.unique()
        if wanted == world.rows or not counted.any():
            return
        assert len(rows) == min(wanted, int(counted.any(1).sum()))
        assert counted[rows].any(1).all()
        if rule == "topk" and exact:
            scores = _scores(world, batch).sum(1) / counted.sum(1).clamp(min=1)
            assert rows.tolist() == _best(scores, counted.any(1), len(rows))
    elif world.route() == "token":
        assert kept.shape == (world.rows, math.ceil(ratio * world.length - 1e-9))
        real = batch.get("attention_mask", torch.ones(kept.shape[0], world.length)) != 0
        for row, places in enumerate(kept):
            least = min(len(places), int(real[row].sum()))
            assert len(set(places.tolist())) == len(places)
            assert real[row][places].sum() == least, "padding was kept in place of a token"
    else:
        targets = F.pad(counted, (0, 1), value=False)
        assert not (kept & ~targets).any()
        assert kept.sum() == min(math.ceil(ratio * world.rows * world.length - 1e-9), int(targets.sum()))


def _best(scores: Tensor, of: Tensor, number: int) -> list[int]:
    places = of.nonzero().flatten().tolist()
    return sorted(sorted(places, key=lambda place: (-scores[place].item(), place))[:number])
