"""The depth route: the first layers train alone, then all of them; the oracle cuts the list of layers by hand."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, build, token_batch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from logs import logged_warnings
from oracle import gradients, truncated
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.optimizer import _global_optimizer_post_hooks
from toys import AS_IT_IS, WIDTH, Toy, toy_batch
from transformers import LlamaConfig, LlamaForCausalLM

import cggr_compile as cggr
from cggr_compile.run import uncounted
from cggr_compile.run.not_computed import NOT_COMPUTED

STEPS = 5
PHASES = [Phase.explicit] if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else list(Phase)


def llama() -> nn.Module:
    """Four layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_hidden_layers=4, use_cache=False)
    return LlamaForCausalLM(config).train()


class Block(nn.Linear):
    """A layer with its residual."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + super().forward(hidden).tanh()


class Blocks(Toy):
    """Four layers that are modules, captured in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH, WIDTH) for _ in range(4))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def toy() -> Blocks:
    torch.manual_seed(0)
    return Blocks().train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: range,
    batch_of: Callable[..., dict[str, torch.Tensor]] = token_batch,
) -> list[float]:
    """Losses of some steps; each has a batch of its own."""
    found = []
    for number in numbers:
        loss = model(**batch_of(seed=number))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def grown_by_hand(stages: list[tuple[int, int]], grow: str) -> tuple[nn.Module, list[float]]:
    """A plain model whose list of layers is cut, put back and filled, and its losses. `stages`: layers, until when."""
    model = llama()
    whole = model.model.layers
    optimizer = optimizer_of(model)
    losses: list[float] = []
    trained = 0
    for layers, until in [*stages, (len(whole), STEPS)]:
        model.model.layers = whole[:layers]
        for index in range(trained, layers if trained and grow == "copy" else trained):
            whole[index].load_state_dict(whole[index % trained].state_dict())
        losses += steps(model, optimizer, range(len(losses), until))
        trained = layers
    return model, losses


def equal(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def several(most: int, count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, most), min_size=count, max_size=count, unique=True).map(sorted)


@settings(max_examples=18, phases=PHASES)
@given(
    stages=st.integers(1, 3).flatmap(lambda count: st.tuples(several(3, count), several(STEPS - 1, count))),
    grow=st.sampled_from(["copy", "random"]),
)
@example(stages=([1, 3], [1, 3]), grow="copy")
@example(stages=([2], [2]), grow="random")
def test_a_whole_schedule_is_the_one_made_by_hand(stages: tuple[list[int], list[int]], grow: str) -> None:
    torch._dynamo.reset()
    eager, expected = grown_by_hand(list(zip(*stages, strict=True)), grow)
    layers, until = (each[0] if len(each) == 1 else tuple(each) for each in stages)
    options = {"route": "depth", "depth_layers": layers, "depth_until": until, "grow": grow, "inner": "eager"}
    model = cggr.optimize(llama(), **options)
    optimizer = optimizer_of(model)
    cggr.attach(model, optimizer)
    assert steps(model, optimizer, range(STEPS)) == expected
    assert equal(model, eager)
    assert model.cggr.captures == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("at", [2, 1, 3])
def test_a_run_that_is_resumed_is_the_whole_one(at: int) -> None:
    """Also where the checkpoint lies between the last step of the first layers and the first of all."""
    options = {"route": "depth", "depth_layers": (1, 2), "depth_until": (1, 2), "inner": "eager"}
    whole = cggr.optimize(toy(), **options)
    optimizer = optimizer_of(whole)
    cggr.attach(whole, optimizer)
    expected = steps(whole, optimizer, range(STEPS), toy_batch)
    first = cggr.optimize(toy(), **options)
    optimizer = optimizer_of(first)
    cggr.attach(first, optimizer)
    losses = steps(first, optimizer, range(at), toy_batch)
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict(), first.cggr.state_dict()), file)
    file.seek(0)
    weights, moments, routed = torch.load(file, weights_only=True)
    second = toy()
    second.load_state_dict(weights)
    cggr.optimize(second, **options)
    second.cggr.load_state_dict(routed)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(moments)
    cggr.attach(second, optimizer)
    assert losses + steps(second, optimizer, range(at, STEPS), toy_batch) == expected
    assert equal(second, whole)


def test_layers_that_do_not_train_yet_have_no_gradient_and_do_not_move() -> None:
    model = cggr.optimize(toy(), route="depth", depth_layers=2, depth_until=3, inner="eager")
    before = copy.deepcopy(model.layers[2:].state_dict())
    optimizer = optimizer_of(model)
    for number in range(2):
        model(**toy_batch(seed=number))[0].backward()
        assert all(parameter.grad is None for parameter in model.layers[2:].parameters())
        assert all(parameter.grad is not None for parameter in model.layers[:2].parameters())
        optimizer.step()
    assert all(torch.equal(before[name], x) for name, x in model.layers[2:].state_dict().items())
    assert not any(parameter in optimizer.state for parameter in model.layers[2:].parameters())


def test_growing_by_hand_and_the_model_in_use() -> None:
    model = cggr.optimize(llama(), route="depth", depth_layers=1, inner="eager")
    batch = token_batch()
    model(**batch).loss.backward()
    small = truncated(model, ARCHITECTURES["llama"], 1).eval()
    model.eval()
    whole = model(**batch).loss
    with model.cggr.in_use():
        assert torch.equal(model(**batch).loss, small(**batch).loss)
    assert torch.equal(model(**batch).loss, whole)
    model.train()
    assert "depth           layer 0 of 4 until model.cggr.grow(), then all, as copies" in str(model.cggr.report())
    assert "depth: layer 0 of 4" in str(model.cggr.diff())
    model.cggr.grow()
    loss = model(**batch).loss
    model.eval()
    with model.cggr.in_use():
        assert torch.equal(model(**batch).loss, loss)
    assert "depth           all 4 layers" in str(model.cggr.report())


def test_a_share_of_all_steps() -> None:
    model = cggr.optimize(toy(), route="depth", depth_layers=2, depth_until=0.5, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"depth_until=0\.5 is a share of all steps, and their number is not"):
        model(**toy_batch())
    optimizer = optimizer_of(model)
    cggr.attach(model, optimizer, total_steps=4)
    grown = []
    for number in range(4):
        steps(model, optimizer, range(number, number + 1), toy_batch)
        grown.append(model.cggr.runtime.growths == 1)
    assert grown == [False, False, True, True]


@pytest.mark.sample(1)
@pytest.mark.parametrize("route", ["sequence", "token", "loss"])
def test_what_the_first_layers_select_is_what_a_model_of_them_selects(route: str) -> None:
    """`depth` in front of a route is that route on the cut model."""
    options = {"ratio": 0.5, "selection": "topk", "router_layers": 1, "seed": 0, "inner": "eager"}
    options |= {"last_layers": 0} if route == "token" else {}
    small = toy()
    small.layers = small.layers[:2]
    expected = cggr.optimize(small, route=route, **options)
    model = cggr.optimize(toy(), route=("depth", route), depth_layers=2, **options)
    for seed in range(2):
        batch = toy_batch(seed=seed, ignored=0.3)
        loss, wanted = model(**batch)[0], expected(**batch)[0]
        loss.backward()
        wanted.backward()
        assert torch.equal(loss, wanted)
        assert torch.equal(model.cggr.selected, expected.cggr.selected)
    found = {name: gradient for name, gradient in gradients(model).items() if gradient is not None}
    for name, gradient in gradients(expected).items():
        assert torch.equal(found.pop(name), gradient), name
    assert not found


def test_under_a_compiling_backend_both_programs_are_compiled_before_the_second_step() -> None:
    model = cggr.optimize(toy(), route="depth", depth_layers=2, depth_until=2, inner="aot_eager", seed=0)
    plain = cggr.optimize(toy(), route="depth", depth_layers=2, depth_until=2, inner="eager")
    optimizers = optimizer_of(model), optimizer_of(plain)
    cggr.attach(model, optimizers[0])
    cggr.attach(plain, optimizers[1])
    torch.manual_seed(7)
    losses = steps(model, optimizers[0], range(1), toy_batch)
    drawn = torch.rand(1)
    plan = model.cggr.runtime.plans[0]
    codes = (plan.stages[0].unrouted.compilations, plan.unrouted.compilations)
    losses += steps(model, optimizers[0], range(1, STEPS), toy_batch)
    assert codes == (1, 1) == (plan.stages[0].unrouted.compilations, plan.unrouted.compilations)
    torch.testing.assert_close(losses, steps(plain, optimizers[1], range(STEPS), toy_batch), rtol=1e-5, atol=0)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1)), "the preparation drew from torch's generator"


def in_turn() -> nn.Module:
    """Every second layer has one parameter more."""
    model = toy()
    for layer in model.layers[::2]:
        layer.bias = None
    return model


class Penalised(Toy):
    """The loss reads what the second layer puts out."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen = []
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
            self.seen.append(hidden)
        return hidden

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, labels) + self.seen[1].square().mean()


class Decayed(Toy):
    """The loss punishes the size of every layer's weights."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, labels) + sum(x.square().sum() for x in self.layers.parameters())


class DecayedByHand(Decayed):
    """Layers that no path tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = self.layers
        self.layers = [self.first, self.second, self.third]  # type: ignore[assignment]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return Toy.loss(self, logits, labels) + self.third.weight.square().sum()


class DecayedInFront(Decayed):
    """The loss punishes what trains at first, and returns the size of what does not."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> tuple:
        loss, _ = super().forward(input_ids, labels)
        return loss, self.layers[-1].weight.square().sum()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return Toy.loss(self, logits, labels) + self.layers[0].weight.square().sum()


def test_a_penalty_on_what_trains_is_part_of_the_loss() -> None:
    eager = DecayedInFront().train()
    model = cggr.optimize(copy.deepcopy(eager), route="depth", depth_layers=1, inner="eager")
    loss, other = model(**toy_batch())
    loss.backward()
    assert other is NOT_COMPUTED
    eager.layers = eager.layers[:1]
    eager(**toy_batch())[0].backward()
    assert torch.equal(model.layers[0].weight.grad, eager.layers[0].weight.grad)
    assert model.layers[2].weight.grad is None


class Counting(nn.Linear):
    """A layer that keeps statistics, as batch norm does, or puts another tensor into a buffer's place."""

    def __init__(self, replaced: bool) -> None:
        super().__init__(WIDTH, WIDTH)
        self.replaced = replaced
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mean = hidden.detach().mean((0, 1))
        if self.replaced:
            self.mean = self.mean * 0.9 + mean
        else:
            self.mean.copy_(mean)
        return super().forward(hidden)


class Counted(nn.Linear):
    """A layer that counts its calls, whatever they are given."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(hidden) / self.calls


def with_layers(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = Toy()
        model.layers = nn.ModuleList(layer() for _ in range(3))
        return model

    return made


CHANGES_STATE = "a layer that does not train yet changes state of the model's"


def sharing() -> nn.Module:
    """The last two layers share a parameter."""
    model = toy()
    model.layers[3].weight = model.layers[2].weight
    return model


def test_frozen_weights_that_will_be_overwritten_are_warned_of() -> None:
    """They may be an adapter's base, which its checkpoint lacks."""
    for frozen, grow in ((True, "copy"), (False, "copy"), (True, "random")):
        model = toy()
        model.layers[3].weight.requires_grad_(not frozen)
        cggr.optimize(model, route="depth", depth_layers=2, grow=grow, inner="eager")
        with logged_warnings() as logged:
            model(**toy_batch())
        told = [text for text in logged if "will overwrite 1 frozen parameters" in text]
        assert len(told) == (frozen and grow == "copy")


class CountedBlock(Counted, Block):
    """With its residual inside, so that modules tell the layers."""


@pytest.mark.parametrize("grow", ["copy", "random"])
def test_what_a_layer_changes_by_itself_stays_until_it_trains(grow: str) -> None:
    torch.manual_seed(0)
    eager = toy()
    eager.layers = nn.ModuleList(CountedBlock() for _ in range(4))
    model = cggr.optimize(copy.deepcopy(eager), route="depth", depth_layers=2, depth_until=2, grow=grow, inner="eager")
    every, batch = eager.layers, toy_batch()
    for number in range(4):
        model.cggr.runtime.steps = number
        if number == 2 and grow == "copy":
            for old, new in zip(every[:2], every[2:], strict=True):
                new.load_state_dict(old.state_dict())
        eager.layers = every if number >= 2 else every[:2]
        loss, expected = model(**batch)[0], eager(**batch)[0]
        loss.backward()
        assert torch.equal(loss, expected)
        for name, buffer in model.layers.named_buffers():
            assert torch.equal(buffer, every.get_buffer(name)), name


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("kind", "layers", "reason"),
    [
        (with_layers(partial(Counting, False)), 1, CHANGES_STATE),
        (with_layers(partial(Counting, True)), 1, CHANGES_STATE),
        (with_layers(Counted), 1, CHANGES_STATE),
        (with_layers(lambda: spectral_norm(nn.Linear(WIDTH, WIDTH))), 2, CHANGES_STATE),
        (sharing, 2, "layers.2.weight belongs to several of the layers that do not train yet"),
        (
            in_turn,
            1,
            r"layer 1 of layers cannot become a copy of layer 0, .* no such \S+\.1\.bias",
        ),
        (Toy, 3, "depth_layers=3 and the model has 3 layers"),
        (Penalised, 1, "reads more of the layers than what the last one passes on"),
        (Decayed, 1, "reads more of the layers .*penalties on all layers off"),
        (DecayedByHand, 1, "reads more of the layers .*penalties on all layers off"),
    ],
)
def test_what_cannot_grow_is_refused_at_the_first_step(kind: Callable[[], nn.Module], layers: int, reason: str) -> None:
    model = cggr.optimize(kind().train(), route="depth", depth_layers=layers, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=reason):
        model(**toy_batch())


def test_first_layers_of_which_nothing_trains_are_refused() -> None:
    eager = Toy().train().requires_grad_(False)
    eager.layers[2].requires_grad_(True)
    model = cggr.optimize(eager, route="depth", depth_layers=2, grow="random", inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"nothing trains of the first 2 layers, .*up to one"):
        model(**toy_batch())
    eager.layers[1].requires_grad_(True)
    model(**toy_batch())[0].backward()
    assert all(x.grad is not None for x in eager.layers[1].parameters())


def test_what_becomes_no_copy_need_not_be_alike() -> None:
    for options in ({"depth_layers": 2}, {"depth_layers": 1, "grow": "random"}):
        model = cggr.optimize(in_turn(), route="depth", inner="eager", **options)
        model(**toy_batch())[0].backward()
        model.cggr.grow()
        model(**toy_batch())[0].backward()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"route": "depth"}, "route='depth' with depth_layers=None"),
        ({"route": "depth", "depth_layers": 2, "depth_until": 1.5}, "depth_until=1.5 is none of"),
        ({"route": "depth", "depth_layers": 2, "grow": "zeros"}, "grow='zeros'"),
        *(
            ({name: value}, "depth_layers, depth_until and grow are for route=.depth.")
            for name, value in (("depth_layers", 2), ("grow", "random"))
        ),
        ({"route": ("sequence", "depth"), "depth_layers": 2}, "is not a combination of routes"),
        ({"route": "depth", "depth_layers": 2, "ratio": 0.5}, "ratio with route='depth', which selects nothing"),
        ({"route": "depth", "depth_layers": 2, "selection": "random"}, "selection with route='depth', which selects"),
        ({"route": "depth", "depth_layers": True}, "give a positive integer"),
        ({"route": "depth", "depth_layers": (3, 2)}, r"depth_layers=\(3, 2\); give a positive integer, or several"),
        ({"route": "depth", "depth_layers": ()}, "give a positive integer"),
        ({"route": "depth", "depth_layers": (1, 2), "depth_until": 3}, "give one for each stage, rising"),
        ({"route": "depth", "depth_layers": (1, 2), "depth_until": (3, 3)}, "give one for each stage, rising"),
        ({"route": "depth", "depth_layers": (1, 2), "depth_until": (3, 0.5)}, r"depth_until=\(3, 0.5\) is none of"),
    ],
)
def test_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(cggr.ConfigError, match=reason):
        cggr.RoutingConfig.from_options(options)


def test_only_a_model_that_deepens_can_grow() -> None:
    model = cggr.optimize(Toy().train())
    with pytest.raises(ValueError, match="trains all layers"):
        model.cggr.grow()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "gemma2"])
def test_layers_are_copied_whatever_stands_in_front_of_them(name: str) -> None:
    """Positions, norms and scales between the ids and the first layer are no part of it."""
    model = cggr.optimize(build(name), route="depth", depth_layers=1, inner="eager")
    model(**token_batch()).loss.backward()
    model.cggr.grow()
    model(**token_batch()).loss.backward()
    layers = model.get_submodule(ARCHITECTURES[name].layers)
    for layer in layers[1:]:
        assert equal(layer, layers[0])


LATER = torch.rand(WIDTH)


class Gated(Block):
    """A layer that reads a part of what it has; what a checkpoint does not hold is made with it."""

    def __init__(self, number: int) -> None:
        super().__init__(WIDTH, WIDTH)
        self.gate, self.off = nn.Parameter(torch.rand(WIDTH)), nn.ModuleDict({"two": nn.Linear(WIDTH, 2)})
        self.register_buffer("seen", torch.rand(3))
        self.register_buffer("table", torch.full((WIDTH,), float(number)), persistent=False)
        self.register_buffer("unread", torch.rand(1 + number), persistent=False)
        self.register_buffer("local", torch.rand(WIDTH) if number < 2 else LATER, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden + self.table + self.local)


def gated() -> nn.Module:
    model = toy()
    model.layers = nn.ModuleList(map(Gated, range(4)))
    return model.train()


def test_all_of_a_layer_is_copied_read_or_not() -> None:
    """Also what was put into the layers since the step was captured; but no buffer that is not saved."""
    model = cggr.optimize(gated(), route="depth", depth_layers=2, inner="eager")
    model.layers[2].off["same"] = model.layers[0].off["same"] = nn.Linear(2, 2)  # a tensor of both
    model(**toy_batch())
    for layer in model.layers:
        layer.off["new"] = nn.Linear(WIDTH, 3)
    model.cggr.grow()
    model(**toy_batch())
    assert model.cggr.captures == 1
    for index, layer in enumerate(model.layers):
        assert equal(layer, model.layers[index % 2])
        assert torch.equal(layer.table, torch.full((WIDTH,), float(index)))
        assert (layer.local is LATER) == (index > 1)
    assert model.layers[2].gate is not model.layers[0].gate


def test_an_adapter_that_is_not_active_grows_with_its_layer() -> None:
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**lora, modules_to_save=["up_proj"]))
    model.add_adapter("two", peft.LoraConfig(**lora))
    cggr.optimize(model, route="depth", depth_layers=2, inner="eager")
    model(**token_batch())
    model.cggr.grow()
    model(**token_batch())
    layers = model.get_base_model().model.layers
    assert any("lora_A.two" in name for name in layers[2].state_dict())
    assert any("original_module" in name for name in layers[2].state_dict())
    assert equal(layers[2], layers[0])
    assert equal(layers[3], layers[1])


def another_shape(model: nn.Module) -> None:
    model.layers[3].gate = nn.Parameter(torch.rand(WIDTH + 1))


def none_there(model: nn.Module) -> None:
    model.layers[2].off["more"] = nn.Linear(2, 2)


def tied(model: nn.Module) -> None:
    model.layers[3].gate = model.layers[2].gate


def tied_to_the_head(model: nn.Module) -> None:
    model.norm_scale = model.layers[2].gate


def of_a_kind_of_its_own(model: nn.Module) -> None:
    for layer in model.layers:
        layer.off["two"].weight = Scaled(torch.rand(2, WIDTH))


class Scaled(nn.Parameter):
    """As quantised weights are, which have scales beside them."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_shape, r"layers\.3 of layers cannot become a copy of layers\.1, which has no such layers\.3\.gate; "),
        (none_there, r"layers\.2 of layers cannot .* layers\.0, which has no such layers\.2\.off\.more\.weight"),
        (tied, r"layers\.2\.gate belongs to several of the layers"),
        (tied_to_the_head, r"layers\.2\.gate belongs to several .* or to something beside them"),
        (of_a_kind_of_its_own, r"layers\.2\.off\.two\.weight is a Scaled that the step does not read"),
    ],
)
def test_what_no_step_reads_and_cannot_be_copied_is_refused(change: Callable[[nn.Module], None], reason: str) -> None:
    """In the first step, or where it came later, in the one that grows; `grow="random"` needs no copy."""
    early, late, random = gated(), gated(), gated()
    options = {"route": "depth", "depth_layers": 2, "inner": "eager"}
    change(early)
    with pytest.raises(cggr.CannotOptimize, match=reason):
        cggr.optimize(early, **options)(**toy_batch())
    cggr.optimize(late, **options)(**toy_batch())
    change(late)
    late.cggr.grow()
    with pytest.raises(cggr.CannotOptimize, match=reason):
        late(**toy_batch())
    change(random)
    cggr.optimize(random, **options, grow="random")(**toy_batch())
    random.cggr.grow()
    random(**toy_batch())


def test_the_layers_of_a_compiled_function_s_model_are_known_or_refused() -> None:
    options = {"route": "depth", "depth_layers": 2, "inner": "eager"}
    model = toy()
    compiled = torch.compile(model, backend="cggr", options=options)
    compiled(**toy_batch())
    cggr.handle(model).grow()
    compiled(**toy_batch())
    assert equal(model.layers[2], model.layers[0])

    holder = SimpleNamespace(model=model)
    another = nn.Linear(1, 1)

    def of_a_holder(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return holder.model(**batch)[0]

    def beside_another(other: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch)[0]

    for function, arguments in ((of_a_holder, ()), (beside_another, (another, model))):
        with pytest.raises(cggr.CannotOptimize, match=r"layers\.2 is no module of a model that is known"):
            torch.compile(function, backend="cggr", options=options)(*arguments, toy_batch())


def test_a_layer_that_the_model_does_not_hold_is_not_known() -> None:
    model = toy()
    layers = list(model.layers)
    del model.layers
    model.layers = layers
    cggr.optimize(model, route="depth", depth_layers=2, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"layers\.2 is no module .*nn\.ModuleList, or choose grow='random'"):
        model(**toy_batch())


class Turned(nn.Module):
    """Two parameters of one shape, in either order."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), turned

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second = (self.b, self.a) if self.turned else (self.a, self.b)
        return second(first(hidden).tanh())


def test_parameters_are_copied_by_name_and_not_by_the_order_of_use() -> None:
    model = Toy()
    model.layers = nn.ModuleList(Turned(bool(index % 2)) for index in range(4))
    cggr.optimize(model.train(), route="depth", depth_layers=1, inner="eager")
    model(**toy_batch())
    model.cggr.grow()
    model(**toy_batch())
    assert all(equal(layer, model.layers[0]) for layer in model.layers)


def test_what_is_compiled_ahead_runs_no_hook_and_needs_no_gradient() -> None:
    options = {"ratio": 0.5, "warmup_steps": 8, "router_layers": 1, "inner": AS_IT_IS}
    model = cggr.optimize(Toy().train(), **options)
    calls: list[torch.Tensor] = []
    model.head.weight.register_hook(calls.append)
    model(**toy_batch(8))[0].backward()
    assert len(calls) == 1
    assert len(model.cggr.runtime.plans[0].routes) > 1, "nothing was compiled ahead"
    frozen = cggr.optimize(Toy().train().requires_grad_(False), **options)
    assert not frozen(**toy_batch(8))[0].requires_grad


def test_in_use_hands_modes_on_and_is_no_place_to_train_in() -> None:
    model = cggr.optimize(toy(), route="depth", depth_layers=1, inner="eager")
    model(**toy_batch())[0].backward()
    with model.cggr.in_use():
        with model.cggr.in_use():
            model.eval()
        assert len(model.layers) == 1
    assert not any(module.training for module in model.modules())
    with model.cggr.in_use():
        model.train()
        with pytest.raises(cggr.CannotOptimize, match=r"a training step inside of in_use\(\); leave it first"):
            model(**toy_batch())
    assert all(module.training for module in model.modules())
    model(**toy_batch())[0].backward()


@pytest.mark.parametrize("total", [0, -1, 2.5, "10", True])
def test_a_total_that_is_no_number_of_steps_is_refused(total: Any) -> None:
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, depth_until=0.5)
    with pytest.raises(ValueError, match=r"total_steps=.* is not a positive integer"):
        cggr.attach(model, optimizer_of(model), total_steps=total)
    assert model.cggr.runtime.total_steps is None


@pytest.mark.parametrize("until", [5, 6, 0.95, (2, 5)])
def test_steps_that_do_not_reach_the_growth_are_warned_of(until: Any) -> None:
    """Also by a model that is optimised anew, but not by one that has grown or is about to."""
    model = Toy().train()
    layers = (1, 2) if isinstance(until, tuple) else 1
    options = {"route": "depth", "depth_layers": layers, "depth_until": until, "inner": "eager"}
    cggr.optimize(model, **options)
    with pytest.warns(RuntimeWarning, match=r"depth_until=(5|6|0\.95) is not reached in 5 steps, so not all"):
        cggr.attach(model, optimizer_of(model), total_steps=5)
    with pytest.warns(RuntimeWarning, match="is not reached in 5 steps"):
        cggr.optimize(model, **options)
    model.cggr.grow()
    if layers == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cggr.attach(model, optimizer_of(model), total_steps=5)


def test_a_model_that_is_optimised_anew_keeps_what_was_said_of_its_steps() -> None:
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, depth_until=0.5, inner="eager")
    optimizer = optimizer_of(model)
    cggr.attach(model, optimizer, total_steps=2)
    cggr.optimize(model, route="depth", depth_layers=2, depth_until=0.5, inner="eager")
    with logged_warnings() as logged:
        steps(model, optimizer, range(2), toy_batch)
    assert model.cggr.runtime.growths == 1
    layers = len(model.layers)
    assert logged == [
        f"cggr: the first 2 of {layers} layers train until the model grows; model.cggr.in_use() evaluates them",
        f"cggr: step 1: the model has grown, {layers} layers train, filled by copies of the first 2",
    ]


def test_growing_is_asked_for_once_a_stage() -> None:
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=(1, 2), inner="eager")
    for growths in (1, 2, 2):
        model.cggr.grow()
        model.cggr.grow()
        model(**toy_batch())
        assert model.cggr.runtime.growths == growths
        assert model.cggr.selected.tolist() == list(range(len(toy_batch()["input_ids"])))
    model.cggr.grow()
    assert not model.cggr.state_dict()["grows"]


def test_a_schedule_that_nobody_counts_for_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncounted, "UNCOUNTED", 2)
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, depth_until=1, inner="eager")
    model(**toy_batch())
    with pytest.warns(RuntimeWarning, match=r"2 training calls and no optimiser step has been counted.*cggr\.attach"):
        model(**toy_batch())
    assert model.cggr.runtime.growths == 0


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_nobody_attached_is_noticed(fused: bool) -> None:
    """A fused one writes to parameters without a trace that autograd could see."""
    before = len(_global_optimizer_post_hooks)
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, depth_until=1, inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    model(**toy_batch())[0].backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"2 training calls and no optimiser step has been counted.*cggr\.attach"):
        model(**toy_batch())
    model(**toy_batch())
    assert len(_global_optimizer_post_hooks) == before


def test_eager_steps_train_no_layers_that_growing_overwrites() -> None:
    """Before the first step they may, and the model stays unrouted; behind it they raise; behind growth they may."""
    options: dict[str, Any] = {"route": "depth", "depth_layers": 1, "inner": "eager", "fallback": "eager"}
    unusual = {**toy_batch(), "output_attentions": True}
    model = cggr.optimize(Outputs().train(), **options)
    model(**toy_batch())
    with pytest.raises(
        cggr.CannotOptimize, match=r"fallback='eager' would train layers that growing overwrites; output_at"
    ):
        model(**unusual)
    model.cggr.grow()
    model(**toy_batch())
    with pytest.warns(RuntimeWarning, match="training without routing: .*output_attentions=True"):
        model(**unusual)
    model = cggr.optimize(Outputs().train(), **options)
    with pytest.warns(RuntimeWarning, match="training without routing: .*output_attentions=True"):
        model(**unusual)
    with pytest.warns(RuntimeWarning, match="steps without routing have trained layers that growing would overwrite"):
        model(**toy_batch())
    model = cggr.optimize(Outputs().train(), **options)  # it is time to grow before a step was routed
    model.cggr.grow()
    with pytest.warns(RuntimeWarning, match="training without routing: .*output_attentions=True"):
        model(**unusual)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="steps without routing have trained layers that growing would overwrite"):
        model(**toy_batch())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model = cggr.optimize(Outputs().train(), grow="random", **options)
    model(**toy_batch())
    with pytest.warns(RuntimeWarning, match="training without routing: .*output_attentions=True"):
        model(**unusual)
    model(**toy_batch())
    assert model.cggr.selected is not None


class Outputs(Toy):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, output_attentions: bool = False) -> Any:
        return super().forward(input_ids, labels)


def test_what_has_trained_is_not_overwritten() -> None:
    """A run that is resumed without the routed state; moments of zeros, which some loaders make, are no training."""
    options = {"route": "depth", "depth_layers": 1, "depth_until": 1, "inner": "eager"}
    model = cggr.optimize(Toy().train(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cggr.attach(model, optimizer)
    for _ in range(3):
        model(**toy_batch())[0].backward()
        optimizer.step()
    state = model.cggr.state_dict()
    resumed = cggr.optimize(copy.deepcopy(cggr.restore(model)), **options)
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    cggr.attach(resumed, again)
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(cggr.CannotOptimize, match=r"overwrite layers\.1\.\w+, which has trained: .*load_state_dict"):
        resumed(**toy_batch())
    assert all(torch.equal(x, before[name]) for name, x in resumed.state_dict().items())
    resumed.cggr.load_state_dict(state)
    resumed(**toy_batch())[0].backward()
    assert resumed.layers[2].weight.grad is not None

    fresh = cggr.optimize(Toy().train(), **options)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.0)
    cggr.restore(fresh)(**toy_batch())[0].backward()
    for x in fresh.parameters():
        x.grad.zero_()
    optimizer.step()
    cggr.optimize(fresh, **options)
    cggr.attach(fresh, optimizer)
    fresh(**toy_batch())[0].backward()
    optimizer.step()
    assert fresh.cggr.runtime.growths == 0
    fresh(**toy_batch())
    assert fresh.cggr.runtime.growths == 1


def test_what_has_trained_is_not_guessed() -> None:
    model = cggr.optimize(Toy().train(), route="depth", depth_layers=1, depth_until=2, inner="eager")
    with pytest.raises(cggr.CannotOptimize, match="run one training step with labels first"), model.cggr.in_use():
        pass
    state = SimpleNamespace(stateful_callbacks={}, global_step=100, max_steps=200)
    with pytest.raises(cggr.CannotOptimize, match="the checkpoint of step 100 does not say which layers have trained"):
        cggr.CGGRCallback().on_train_begin(None, state, None, model=model)
    with pytest.raises(ValueError, match="route='depth' selects nothing"):
        model.cggr.score(toy_batch())
