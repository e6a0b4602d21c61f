"""CUDA graphs: replayed steps are the run ones, whatever happens between forward and backward; on a GPU, and on the CPU
with stand-ins for the graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from architectures import build, token_batch
from graphs_on_cpu import graphs_on_cpu  # noqa: F401  a fixture
from torch import fx
from toys import Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.run import cuda_graphs, variant
from cggr_compile.run.backward_parts import Part, forward_and_parts
from cggr_compile.run.cuda_graphs import obstacle_of
from cggr_compile.torch_internals.distributed import Ranks

OPTIONS = {"ratio": 0.5, "router_layers": 1, "inner": "aot_eager", "seed": 0}


def test_without_cuda_the_step_runs_and_says_why() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, selection="random", cuda_graphs=True)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: the model is on cpu"):
        model(**toy_batch())[0].backward()
    assert "0 recorded" in str(model.cggr.report())


def test_a_step_that_changes_an_input_is_not_recorded() -> None:
    graph = fx.Graph()
    buffer, x = graph.placeholder("running_mean"), graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.copy_.default, (buffer, x)))
    assert obstacle_of(graph) == "the step changes its input running_mean"
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, x)))
    assert obstacle_of(graph) is None


# Whole models on a GPU and, with the long profile, on the CPU; else a toy on the CPU.
GPU, LONG = pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)


@pytest.fixture(params=[GPU, "toy", LONG])
def device(request: pytest.FixtureRequest) -> str:
    return _device(request)


@pytest.fixture(params=[GPU, LONG])
def any_device(request: pytest.FixtureRequest) -> str:
    """The CPU with the long profile only: `test_replayed.py` has such loops with a smaller model."""
    return _device(request)


def _device(request: pytest.FixtureRequest) -> str:
    if request.param != "cuda":
        request.getfixturevalue("graphs_on_cpu")
    return request.param


def pair(device: str, checkpoints: bool = False, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model twice, replayed and run; on the CPU nothing is compiled but for the replay."""
    replayed = {**OPTIONS, **options, "cuda_graphs": True}
    plain = {**OPTIONS, **options}
    if device != "cuda":
        replayed["inner"], plain["inner"] = "aot_eager", "eager"
    models = model_on(device), model_on(device)
    for model in models if checkpoints else ():
        model.gradient_checkpointing_enable()
    return tuple(cggr.optimize(model, **each) for model, each in zip(models, (replayed, plain), strict=True))


def model_on(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return Toy().train() if device == "toy" else build("llama").to(device)


def batches(device: str, count: int, batch: int = 6) -> list[dict[str, torch.Tensor]]:
    if device == "toy":
        return [toy_batch(batch, 12, seed, ignored=0.3) for seed in range(count)]
    return [{name: x.to(device) for name, x in token_batch(batch, seed=seed).items()} for seed in range(count)]


def assert_same(replayed: torch.nn.Module, plain: torch.nn.Module) -> None:
    # Up to the order in which attention and embedding kernels add.
    for (name, a), b in zip(replayed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"d {name}: {m}")


@pytest.mark.parametrize("options", [{"selection": "importance"}, {"route": "token", "selection": "topk"}])
def test_training_is_the_same(device: str, options: dict) -> None:
    replayed, plain = pair(device, **options)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (replayed, plain)]
    losses: list[list[torch.Tensor]] = [[], []]
    for batch in batches(device, 6):
        for kept, model, optimizer in zip(losses, (replayed, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**batch)[0]
            loss.backward()
            optimizer.step()
            kept.append(loss)
        torch.testing.assert_close(replayed.cggr.selected, plain.cggr.selected, rtol=0, atol=0)
        assert_same(replayed, plain)
    # Losses that are kept stay what they were.
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-5, atol=0)
    assert "1 recorded" in replayed.cggr.report().cuda_graphs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner": "inductor", "router_head": "sampled"},
        {"route": "loss", "selection": "topk", "inner": "inductor"},
        {"route": ("token", "loss"), "selection": "random"},
    ],
)
def test_training_with_other_options_is_the_same(any_device: str, options: dict) -> None:
    test_training_is_the_same(any_device, options)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"selection": "topk", "warmup_steps": 4}, 4),  # of six rows 6, 5, 4 and 3 are kept
        # The first stage, which no schedule changes, is recorded in its second step.
        ({"route": ("depth", "sequence"), "depth_layers": 1, "depth_until": 3, "selection": "random"}, 2),
    ],
)
def test_what_a_schedule_comes_to_is_recorded_in_the_first_step(
    device: str, options: dict, recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []  # in which epoch each recording was made: a gradient that is held begins another

    def record(run: Any, inputs: Any, pool: Any, make: Any = cuda_graphs._Recording) -> Any:
        made.append(pool.epoch)
        return make(run, inputs, pool)

    monkeypatch.setattr(cuda_graphs, "_Recording", record)
    monkeypatch.setattr(variant, "PATIENCE", 0)  # sizes that pass get no code of their own, however long they take
    replayed, plain = pair(device, **options)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (replayed, plain)]
    for model, optimizer in zip((replayed, plain), optimizers, strict=True):
        cggr.attach(model, optimizer)
    for step, batch in enumerate(batches(device, 6)):
        for model, optimizer in zip((replayed, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(**batch)[0].backward()
            optimizer.step()
        for (name, a), b in zip(replayed.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert made == [0] * (recorded if step or not replayed.cggr.config.deepens else 1), f"step {step}"


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_training_with_checkpoints_is_the_same(ratio: float) -> None:
    """Attention is run again, which torch counts among the operators that draw."""
    test_training_is_the_same("cuda", {"ratio": ratio, "inner": "inductor", "checkpoints": True})


def test_micro_batches_add_up_and_sizes_alternate(any_device: str) -> None:
    replayed, plain = pair(any_device)
    for batch in (*batches(any_device, 4), *batches(any_device, 2, batch=4), *batches(any_device, 3)):
        for model in (replayed, plain):
            model(**batch).loss.backward()
        assert_same(replayed, plain)
    assert "2 recorded" in replayed.cggr.report().cuda_graphs


def test_forwards_before_their_backwards_are_not_confused(any_device: str) -> None:
    replayed, plain = pair(any_device)
    for first, second in zip(batches(any_device, 4)[:2], batches(any_device, 4)[2:], strict=True):
        for model in (replayed, plain):
            losses = [model(**batch).loss for batch in (first, second, first)]
            sum(losses).backward()
        assert_same(replayed, plain)
    # A loss that is dropped frees the recording.
    replayed(**first)
    plain(**first)
    for model in (replayed, plain):
        model(**second).loss.backward()
    assert_same(replayed, plain)


def test_a_second_backward_raises(any_device: str) -> None:
    replayed, _ = pair(any_device)
    for batch in batches(any_device, 3):
        loss = replayed(**batch).loss
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran twice.*cuda_graphs=False"):
        loss.backward()


def cleared(model: torch.nn.Module) -> None:
    model.zero_grad(set_to_none=True)


@pytest.mark.gpu
def test_gradients_that_nobody_holds_are_not_copied() -> None:
    replayed, plain = pair("cuda", inner="inductor")  # whose gradients are laid out as autograd keeps them
    places = []
    for batch in batches("cuda", 6):
        for model in (replayed, plain):
            cleared(model)
            model(**batch).loss.backward()
        assert_same(replayed, plain)
        places.append([parameter.grad.data_ptr() for parameter in replayed.parameters()])
    assert places[2] == places[3] == places[4] == places[5]
    assert replayed.cggr.report().cuda_graphs == "1 recorded"


@pytest.mark.parametrize(
    "held",
    [
        lambda parameter: parameter.grad,
        lambda parameter: parameter.grad.view(-1)[1:],
        lambda parameter: parameter.grad.detach(),
    ],
)
def test_gradients_that_are_held_keep_their_values(
    any_device: str, held: Callable[[torch.nn.Parameter], torch.Tensor]
) -> None:
    replayed, plain = pair(any_device)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step, batch in enumerate(batches(any_device, 8)):
        for model in (replayed, plain):
            cleared(model)
            model(**batch).loss.backward()
        assert_same(replayed, plain)
        if step in (3, 4, 6):
            some = list(replayed.parameters())[::2]
            kept += [(held(parameter), held(parameter).clone()) for parameter in some]
        for now, then in kept:
            torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert "copied" in replayed.cggr.report().cuda_graphs


@pytest.mark.sample(1)
def test_micro_batches_after_steps_without(device: str) -> None:
    replayed, plain = pair(device)
    small, large = batches(device, 4, batch=4), batches(device, 4, batch=8)
    for batch in (*small, *large, *small):
        for model in (replayed, plain):
            cleared(model)
            model(**batch)[0].backward()
    assert replayed.cggr.report().cuda_graphs == "2 recorded"
    for pattern in (small[:1] + large[:2], large[:1] + small[:1] + large[:1], small):
        for model in (replayed, plain):
            cleared(model)
            for batch in pattern:
                model(**batch)[0].backward()
        assert_same(replayed, plain)
    assert replayed.cggr.report().cuda_graphs == "4 recorded; gradients copied: one was held over a step"


@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_that_live_up_to_the_next_backward(any_device: str, zeros: bool) -> None:
    replayed, plain = pair(any_device)
    for step, batch in enumerate(batches(any_device, 8)):
        for model in (replayed, plain):
            loss = model(**batch).loss
            model.zero_grad(set_to_none=not zeros)
            loss.backward()
        assert_same(replayed, plain)
        assert ("copied" in replayed.cggr.report().cuda_graphs) == (step > 0)


def test_parameters_that_moved_are_recorded_anew(any_device: str) -> None:
    replayed, plain = pair(any_device)
    for batch in batches(any_device, 6):
        for model in (replayed, plain):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            model(**batch).loss.backward()
        assert_same(replayed, plain)
    assert replayed.cggr.report().cuda_graphs == "5 recorded; gradients copied: one was held over a step"


@pytest.mark.parametrize(
    "options", [{"selection": "importance"}, {"route": "token", "selection": "topk"}, {"ratio": 1.0}]
)
def test_backwards_in_parts_are_the_same(device: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[Part]] = []

    def counted(*args: Any) -> tuple[Any, list[Part]]:
        outputs, found = forward_and_parts(*args)
        parts.append(list(found))
        return outputs, found

    monkeypatch.setattr(cuda_graphs, "all_ranks", lambda: Ranks(0, 2, ""))
    monkeypatch.setattr(cuda_graphs, "forward_and_parts", counted)
    test_training_is_the_same(device, options)
    assert len(parts[-1]) > 1
    places = sorted(place for part in parts[-1] for place in part.places)
    assert places == list(range(len(places)))


def test_a_table_that_is_the_head_too_is_complete_with_the_last_part(
    graphs_on_cpu: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tied(device: str) -> Toy:
        torch.manual_seed(0)
        model = Toy(layers=5)
        model.head.weight = model.embed.weight
        return model.train()

    monkeypatch.setitem(globals(), "model_on", tied)
    test_backwards_in_parts_are_the_same("toy", {"ratio": 1.0}, monkeypatch)


def test_a_part_has_its_gradients_before_the_next_one_runs(any_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "all_ranks", lambda: Ranks(0, 2, ""))
    replayed, _ = pair(any_device, ratio=1.0)
    order: list[str] = []
    for name, parameter in replayed.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    replay = cuda_graphs._RecordedPart.replay

    def noted(part: Any, pool: Any) -> Any:
        order.append("part")
        return replay(part, pool)

    monkeypatch.setattr(cuda_graphs._RecordedPart, "replay", noted)
    for batch in batches(any_device, 3):
        order.clear()
        replayed(**batch).loss.backward()
    last = [index for index, each in enumerate(order) if each == "part"]
    assert len(last) > 2
    assert all(after - before > 1 for before, after in pairwise(last))
    assert {"model.layers.2.mlp.down_proj.weight"} <= set(order[: last[1]])
    assert "model.embed_tokens.weight" in order[last[-1] :]


@pytest.mark.gpu
def test_a_replayed_step_does_not_synchronise() -> None:
    replayed, _ = pair("cuda")
    for index, batch in enumerate(batches("cuda", 6)):
        torch.cuda.set_sync_debug_mode("error" if index > 2 else "default")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                replayed(**batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
