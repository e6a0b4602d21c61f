"""Nothing but the training step changes: evaluation, generation, saving, copying, undoing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import processes
import pytest
import torch
from architectures import ARCHITECTURES, build, token_batch
from toys import Toy, toy_batch

import cggr_compile as cggr

OPTIONS = {"ratio": 0.4, "router_layers": 2, "inner": "eager"}


@pytest.fixture
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    eager = build("llama")
    return eager, cggr.optimize(copy.deepcopy(eager), **OPTIONS)


def test_optimize_returns_the_same_object_of_the_same_class() -> None:
    model = build("llama")
    cls, signature, keys = type(model), inspect.signature(model.forward), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    assert cggr.optimize(model, **OPTIONS) is model
    assert type(model) is cls
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("mode", ["eval", "no_grad", "no_labels"])
def test_calls_that_do_not_train_run_the_original(pair: tuple, mode: str) -> None:
    eager, model = pair
    batch = token_batch()
    if mode == "eval":
        eager.eval()
        model.eval()
    if mode == "no_labels":
        del batch["labels"]
    with torch.set_grad_enabled(mode != "no_grad"):
        actual, expected = model(**batch), eager(**batch)
    assert torch.equal(actual.logits, expected.logits)
    assert (actual.loss is None) == (expected.loss is None)
    assert actual.keys() == expected.keys()
    assert model.cggr.captures == 0


def test_a_step_leaves_the_callers_tensors_as_they_were(pair: tuple) -> None:
    """Also for a compiler of the caller's: marks of dynamic sizes stay where they were given, and only there."""
    batch = token_batch()
    torch._dynamo.mark_dynamic(batch["labels"], 1)
    before = {name: (x.clone(), copy.deepcopy(vars(x))) for name, x in batch.items()}
    for _ in range(2):
        pair[1](**batch).loss.backward()
    for name, (value, attributes) in before.items():
        assert torch.equal(batch[name], value)
        assert vars(batch[name]) == attributes


def test_generate_and_save_pretrained_behave_as_before(pair: tuple, tmp_path: Path) -> None:
    eager, model = pair
    prompt = torch.tensor([[5, 6, 7]])
    model(**token_batch()).loss.backward()
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.eval().generate(prompt, **options), eager.eval().generate(prompt, **options))
    model.save_pretrained(tmp_path)
    loaded = type(eager).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == eager.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in eager.state_dict().items())
    assert not hasattr(loaded, "cggr")


def toys() -> tuple[Toy, Toy]:
    """A toy, and its copy that is optimised."""
    torch.manual_seed(0)
    eager = Toy().train()
    return eager, cggr.optimize(copy.deepcopy(eager), **OPTIONS)


def test_restore_leaves_no_trace() -> None:
    model = Toy().train()
    before = set(vars(model))
    cggr.optimize(model, **OPTIONS)
    model(**toy_batch())[0].backward()
    assert set(vars(model)) != before
    assert cggr.restore(model) is model
    assert set(vars(model)) == before
    assert model.forward == type(model).forward.__get__(model)
    assert cggr.restore(model) is model


def test_optimizing_twice_is_optimizing_with_the_second_options() -> None:
    eager, model = toys()
    model(**toy_batch())
    cggr.optimize(model, ratio=0.9, inner="eager")
    assert model.cggr.config == cggr.RoutingConfig(ratio=0.9, inner="eager")
    batch = toy_batch(6, ignored=0.3)
    loss, gradients = oracle.step(model, batch)
    assert len(model.cggr.selected) == 6
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected.unique()))
    oracle.assert_same_step(loss, gradients, expected_loss, expected, rtol=1e-5, atol=1e-7)
    cggr.restore(model)
    assert "forward" not in vars(model)


def test_two_models_with_different_options_do_not_share_anything() -> None:
    few = cggr.optimize(Toy().train(), ratio=0.2, inner="eager")
    many = cggr.optimize(Toy().train(), ratio=0.7, inner="eager")
    for _ in range(2):
        few(**toy_batch(6))[0].backward()
        many(**toy_batch(6))[0].backward()
    assert (len(few.cggr.selected), len(many.cggr.selected)) == (2, 5)
    assert few.cggr.captures == many.cggr.captures == 1


@pytest.mark.long
def test_more_models_of_one_class_than_dynamos_limit() -> None:
    """Dynamo counts recompilations by code object; each optimised model has its own."""
    model = build("llama")
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            cggr.optimize(model, **OPTIONS)
            model(**token_batch(4, 5))
            assert model.cggr.captures == 1


def test_a_deep_copy_is_optimized_and_independent() -> None:
    eager, model = toys()
    model.cggr.step()
    twin = copy.deepcopy(model)
    assert twin.cggr is not model.cggr
    assert twin.cggr.model is twin
    assert (twin.cggr.config, twin.cggr.runtime.steps) == (model.cggr.config, 1)
    with torch.no_grad():
        twin.head.weight.mul_(3)
    batch = toy_batch(6, ignored=0.3)
    loss, gradients = oracle.step(model, batch)
    oracle.step(twin, batch)
    assert twin.head.weight.grad is not None
    expected_loss, expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    oracle.assert_same_step(loss, gradients, expected_loss, expected)


def test_saving_whole_model_and_state_dict() -> None:
    eager, model = toys()
    batch = toy_batch(6, ignored=0.3)
    expected = oracle.step(model, batch)
    for saved in (model, model.state_dict()):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        if isinstance(loaded, torch.nn.Module):
            assert loaded.cggr.config == model.cggr.config
            oracle.assert_same_step(*oracle.step(loaded, batch), *expected)
        else:
            eager.load_state_dict(loaded)


class Float32Loss(Toy):
    """The loss of float64 logits is in float32, as transformers' is."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss(logits.float(), labels)


@pytest.mark.parametrize("when", ["before", "after"])
def test_moving_the_model(when: str) -> None:
    torch.manual_seed(0)
    eager = Float32Loss().train()
    model, batch = copy.deepcopy(eager), toy_batch(6, ignored=0.3)
    if when == "before":
        model.to(torch.float64)
    cggr.optimize(model, **OPTIONS)
    model(**batch)[0].backward()
    model.zero_grad()
    if when == "after":
        model.to(torch.float64)
    loss, gradients = oracle.step(model, batch)
    expected = oracle.step(eager.to(torch.float64), oracle.rows_of(batch, model.cggr.selected))
    oracle.assert_same_step(loss.double(), gradients, expected[0].double(), expected[1], rtol=1e-6, atol=1e-7)


def test_explain_neither_patches_nor_runs() -> None:
    model = Toy().eval()
    before = dict(vars(model))
    explanation = cggr.explain(model, toy_batch(), ratio=0.25)
    assert explanation.program.routing.router_layers == 2
    assert not model.training
    assert set(vars(model)) == set(before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.long
def test_an_optimised_model_is_explained_by_its_own_options_and_checked_as_it_was_before() -> None:
    model = cggr.optimize(build("llama"), ratio=0.25, router_layers=1, selection="random")
    batch = token_batch()
    assert cggr.explain(model, batch).runtime.config == model.cggr.config
    assert cggr.explain(model, batch, ratio=0.5).runtime.config.selection == "trimmed"
    assert cggr.check(model, batch).exact
    assert model.cggr.config.selection == "random"


class Dropping(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(self.drop(hidden))


@pytest.mark.parametrize("training", [True, False])
def test_explain_leaves_every_training_flag(training: bool) -> None:
    """A part of a training model that is kept in eval mode is captured so; a model in eval mode, as it would train."""
    model = Dropping().train(training)
    model.drop.eval()
    model.layers[0].train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    captured = cggr.explain(model, toy_batch(), ratio=0.25).captured
    dropped = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert [node.args[2] for node in dropped if node.args[2]] == [] if training else [True]
    assert {name: module.training for name, module in model.named_modules()} == before


class Drawing(Dropping):
    """It counts its calls, and draws from every generator where it is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        if not self.training:
            hidden = hidden + random.random() + torch.rand(()) + float(np.random.rand())
        return super().middle(hidden)


def everything(model: torch.nn.Module) -> tuple:
    """What a call that does not train leaves: every generator, flag, gradient and value."""
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    flags = {name: module.training for name, module in model.named_modules()}
    values = [(name, x.tolist(), x.requires_grad) for name, x in [*model.named_parameters(), *model.named_buffers()]]
    gradients = [None if x.grad is None else x.grad.tolist() for x in model.parameters()]
    modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    return generators, flags, values, gradients, modes


def score_ahead(model: torch.nn.Module) -> None:
    next(iter(model.cggr.score_ahead([toy_batch(), toy_batch()])))


def in_use(model: torch.nn.Module) -> None:
    with model.cggr.in_use():
        pass


def explained(model: torch.nn.Module) -> None:
    explanation = cggr.explain(model, toy_batch(), ratio=0.25)
    str(explanation.report()), str(explanation.diff()), str(explanation), explanation.memory()


def checked_in_vain(model: torch.nn.Module) -> None:
    with pytest.raises(cggr.TokensNotTold):
        cggr.check(model, toy_batch(), route="token")


def told(model: torch.nn.Module) -> None:
    report, diff = model.cggr.report(), model.cggr.diff()
    report.to_json(), diff.to_html(), str(report), str(diff), repr(model.cggr), model.cggr.metrics()


CALLS: dict[str, Callable[[torch.nn.Module], object]] = {
    "optimize": lambda model: cggr.optimize(model, ratio=0.25),
    "restore": cggr.restore,
    "handle": cggr.handle,
    "explain": explained,
    "explain for tokens": lambda model: cggr.explain(model, toy_batch(), route="token", ratio=0.5, last_layers=0),
    "check": lambda model: cggr.check(model, toy_batch()),
    "check in vain": checked_in_vain,
    "report": told,
    "score": lambda model: model.cggr.score(toy_batch()),
    "use_scores": lambda model: model.cggr.use_scores(torch.rand(4, generator=torch.Generator())),
    "score_ahead": score_ahead,
    "time_router": lambda model: model.cggr.time_router(),
    "in_use": in_use,
    "state": lambda model: model.cggr.load_state_dict(model.cggr.state_dict()),
    "attach": lambda model: cggr.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)),
    "step": lambda model: model.cggr.step(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "scorer": lambda model: cggr.CGGRScorer(cggr.create_truncated_router(model)),
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_train_draws_nothing_and_changes_nothing(call: str) -> None:
    """Dropout, generators of torch, NumPy and Python, buffers, modes of parts, gradients."""
    model = cggr.optimize(Drawing().train(), ratio=0.5, selection="topk", inner="eager")
    model.head.bias.requires_grad_(False)
    model(**toy_batch())[0].backward()
    model.layers[1].eval()
    before = everything(model)
    CALLS[call](model)
    assert everything(model) == before


def test_the_state_of_a_generator_outlives_the_pickle() -> None:
    """A pickle for a spawned process holds references to a tensor's memory, which is gone when the process opens it."""
    model = cggr.optimize(Toy().train(), selection="random", **OPTIONS)
    model(**toy_batch())
    states = model.cggr.state_dict()["generators"]
    assert states
    assert all(isinstance(state, bytes) for state in states.values())


@pytest.mark.long
def test_a_model_that_took_a_step_is_sent_to_a_spawned_process() -> None:
    model = cggr.optimize(build("llama"), selection="random", **OPTIONS)
    model(**token_batch())
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=processes.selected_rows, args=(model, token_batch(), queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    model(**token_batch())
    assert found == model.cggr.selected.tolist()


def test_explain_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Toy()
        batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long)}
    assert cggr.explain(model, batch).program.layers is not None


@pytest.mark.long
def test_the_backend_needs_no_import() -> None:
    """In a process that never imports the package, the entry point finds the backend."""
    script = (
        "import sys; sys.path.append('tests/support')\n"
        "import torch\n"
        "from architectures import build, token_batch\n"
        "assert 'cggr_compile' not in sys.modules\n"
        "model = build('llama')\n"
        "compiled = torch.compile(model, backend='cggr', options={'ratio': 0.4, 'inner': 'eager'})\n"
        "out = compiled(**token_batch())\n"
        "out.loss.backward()\n"
        "import cggr_compile as cggr\n"
        "print('rows', cggr.handle(compiled).selected.tolist())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    eager = build("llama")
    rows = oracle.expected_rows(eager, ARCHITECTURES["llama"], token_batch(), 0.4, 2)
    assert f"rows {rows.tolist()}" in done.stdout
