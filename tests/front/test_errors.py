"""Every refusal: its first line says what, where and what to do, and nothing is left half-patched."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import GROUPED, build, token_batch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.torch_version import TorchVersion
from toys import WIDTH, WORDS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile import CannotOptimize, ConfigError, RoutingConfig
from cggr_compile.front import backend


class Exchange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden + self.linear(other), other + self.linear(hidden).tanh()


class TwoStreams(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Exchange() for _ in range(3))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        other = hidden.sin()
        for layer in self.layers:
            hidden, other = layer(hidden, other)
        return hidden + other


class NoStack(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class AdaptedHead(Toy):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) + self.head(hidden.sin())


class NoCrossEntropy(Toy):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.logsumexp(-1) * labels).mean()


class Unaligned(Toy):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.reshape(-1, WORDS), labels.flip(1).reshape(-1))


class GraphBreak(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        print("broken here")
        return super().middle(hidden)


class RandomRouter(Toy):
    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().middle(hidden + torch.rand_like(hidden))


class WrittenAtData(Toy):
    """Some tokens go through the sine, written to a slice as long as they are many."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = super().middle(hidden).flatten(0, 1)
        output, count = torch.zeros_like(flat), (flat[:, 0] > 0).sum()
        output[:count] = flat[:count].sin()
        return output.view(hidden.shape)


class CountedFromData(Toy):
    """A range between two numbers read from tensors, which Dynamo fails on."""

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        places = torch.arange(hidden.shape[1])
        return super().middle(hidden + torch.arange(places[-1] + 1, places[0] - places[-1], -1).float().sum())


class Smoothed(Toy):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.reshape(-1, WORDS), labels.reshape(-1), label_smoothing=0.1)


class TwoPredictions(Toy):
    """One label a token, predicted twice."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(torch.stack([hidden, hidden.sin()], 1))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.transpose(0, 1).reshape(-1, WORDS), labels.repeat(2, 1).reshape(-1))


WRITTEN_AT_DATA = r"torch cannot trace setitem at places or sizes that are read from data .*output\[:count\]"
if TorchVersion(torch.__version__) < "2.13":  # there Dynamo itself cannot
    WRITTEN_AT_DATA = "data-dependent expression"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoPredictions, "the loss is over logits of 4 dimensions: several predictions for each token"),
        (NoStack, "no layer stack: no equal blocks make up the graph"),
        (TwoStreams, r"2 tensors leave layer 0 \(%\w+ and %\w+\), so no single residual can be cut .*test_errors\.py:"),
        (AdaptedHead, r"unsupported head: only linear, bias, .*node %add\w*, at .*test_errors\.py:\d+"),
        (NoCrossEntropy, "no cross-entropy loss in the captured graph; pass labels"),
        (Unaligned, "labels and logits are not aligned"),
        (GraphBreak, r"breaks Dynamo's graph .*test_errors\.py:\d+: print"),
        (RandomRouter, r"the router would run the random operator aten\.rand_like.*test_errors\.py:\d+"),
        (WrittenAtData, WRITTEN_AT_DATA),
        (CountedFromData, r"Dynamo itself fails while it traces the model \(PendingUnbackedSymbolNotFound"),
        (Smoothed, "unsupported loss: class weights or label smoothing"),
    ],
)
def test_models_that_cannot_be_routed(model: type[Toy], message: str) -> None:
    built = cggr.optimize(model().train(), ratio=0.5, inner="eager")
    with pytest.raises(CannotOptimize, match=f"^cannot optimize: .*{message}") as error:
        built(**toy_batch())
    first_line = str(error.value).splitlines()[0]
    assert ";" in first_line, f"no hint on the first line: {first_line}"
    cggr.restore(built)
    assert built(**toy_batch())[0].requires_grad


def test_the_toy_itself_is_routed() -> None:
    """What makes the models above fail is the one thing each changes."""
    torch.manual_seed(0)
    eager = Toy().train()
    model = cggr.optimize(copy.deepcopy(eager), inner="eager", router_layers=2)
    batch = toy_batch()
    loss = model(**batch)[0]
    loss.backward()
    rows = model.cggr.selected
    expected = eager(batch["input_ids"][rows], batch["labels"][rows])[0]
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(model.embed.weight.grad, eager.embed.weight.grad)


def with_tokens(count: int) -> transformers.DynamicCache:
    """A cache of six rows for `build("llama")`; it holds something after a forward."""
    cache = transformers.DynamicCache()
    ids = token_batch(6, count, masked=False)["input_ids"]
    with torch.no_grad():
        build("llama").eval()(ids, past_key_values=cache, use_cache=True)
    return cache


def without(*names: str) -> Callable[[dict], dict]:
    return lambda batch: {name: tensor for name, tensor in batch.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: {**without("input_ids")(b), "inputs_embeds": torch.randn(6, 12, 32)},
            "the call has no input_ids, only",
        ),
        (
            lambda b: {**b, "labels": b["labels"][:, :-1]},
            r"labels of shape \(6, 11\) do not match input_ids .*\(6, 12\)",
        ),
        (lambda b: {**b, "input_ids": b["input_ids"][0]}, r"input_ids of shape \(12,\) is not \[batch, sequence\]"),
        (lambda b: {**b, "output_hidden_states": True}, "output_hidden_states=True in a training step"),
        (
            lambda b: {**b, "inputs_embeds": torch.randn(6, 12, 32)},
            "the call has input_ids and inputs_embeds, which say the same tokens twice",
        ),
        (lambda b: {**b, "input_ids": b["input_ids"].float()}, r"input_ids are torch\.float32, not token ids"),
        (lambda b: {**b, "input_ids": b["input_ids"] > 3}, r"input_ids are torch\.bool, not token ids"),
        (lambda b: {**b, "labels": b["labels"].double()}, r"labels are torch\.float64, not token ids"),
        (lambda b: {name: x[:0] for name, x in b.items()}, r"the batch is empty: input_ids of shape \(0, 12\)"),
        (lambda b: {name: x[:, :0] for name, x in b.items()}, r"the batch is empty: input_ids of shape \(6, 0\)"),
        (lambda b: {name: x[:, :1] for name, x in b.items()}, "sequences of one token"),
        (lambda b: {**b, "past_key_values": with_tokens(3)}, "the call has past_key_values, and the keys and values"),
    ],
)
def test_calls_that_cannot_be_routed(change: Callable[[dict], dict], message: str) -> None:
    model = cggr.optimize(build("llama"), inner="eager")
    with pytest.raises(CannotOptimize, match=f"^cannot optimize: {message}.*; "):
        model(**change(token_batch()))
    assert model.cggr.captures == 0


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_activations_that_the_config_asks_for(asked: str) -> None:
    model = cggr.optimize(Toy().train(), inner="eager")
    asks = SimpleNamespace(**{asked: True})
    message = f"^cannot optimize: {asked}=True in the model's config: .*; set config.{asked} = False"
    for config in (asks, SimpleNamespace(get_text_config=lambda: asks)):
        model.config = config
        with pytest.raises(CannotOptimize, match=message):
            model(**toy_batch())
    model.config = SimpleNamespace(**{asked: False})
    model(**toy_batch())


def test_a_batch_of_one_row_says_that_it_trains_as_it_is() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, inner="eager")
    with pytest.warns(RuntimeWarning, match="a batch of one row leaves no rows to choose from, and trains as it is; "):
        model(**toy_batch(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**toy_batch(1))
        cggr.optimize(model, inner="eager", ratio=1.0)(**toy_batch(1))


@pytest.mark.parametrize("fallback", ["raise", "eager"])
def test_weights_that_are_made_of_other_tensors(fallback: str) -> None:
    """As torchao's and DTensor are: the backend sees them before anything takes them apart."""
    model = Toy().train()
    weight = model.layers[1].weight.detach()
    model.layers[1].weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    message = r"layers\.1\.weight is a TwoTensor, a tensor made of others; train on plain weights"
    cggr.optimize(model, inner="eager", fallback=fallback)
    with (
        pytest.raises(CannotOptimize, match=message)
        if fallback == "raise"
        else pytest.warns(RuntimeWarning, match=message)
    ):
        assert model(**toy_batch())[0].requires_grad


@pytest.mark.parametrize("captured", [False, True])
def test_transforms_of_torch_func_are_refused_by_name(captured: bool) -> None:
    model, batch = cggr.optimize(Toy().train(), inner="eager", ratio=0.5), toy_batch()
    if captured:
        model(**batch)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, kwargs=batch)[0]

    with pytest.raises(CannotOptimize, match=r"transform of torch\.func .* cggr\.restore\(model\) first"):
        torch.func.grad(loss)(dict(model.named_parameters()))
    model(**batch)[0].backward()
    cggr.restore(model)
    torch.func.grad(loss)(dict(model.named_parameters()))


def test_a_failure_that_nobody_foresaw_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("what")

    monkeypatch.setattr(backend, "capture", fails)
    with pytest.raises(CannotOptimize, match=r"^cannot optimize: the captured step cannot be .*\(KeyError: 'what'\); "):
        cggr.optimize(Toy().train(), inner="eager")(**toy_batch())
    with pytest.warns(RuntimeWarning, match="training without routing"):
        assert cggr.optimize(Toy().train(), inner="eager", fallback="eager")(**toy_batch())[0].requires_grad


def test_models_refused_at_once_stay_untouched() -> None:
    headless = transformers.LlamaModel(transformers.LlamaConfig(**GROUPED))
    for model, message in [
        (headless, r"LlamaModel\.forward takes no labels"),
        (torch.compile(build("llama")), "wrapped by torch.compile already"),
    ]:
        before = dict(vars(model))
        with pytest.raises(CannotOptimize, match=f"^cannot optimize: .*{message}.*; "):
            cggr.optimize(model)
        assert vars(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ration": 0.5}, r"unknown option 'ration', did you mean 'ratio'\? valid options: route, ratio"),
        ({"ratio": 0.0}, r"ratio=0\.0 is not in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio=1\.5 is not in \(0, 1\]"),
        ({"ratio": True}, r"ratio=True is not in \(0, 1\]"),
        ({"ratio": float("nan")}, r"ratio=nan is not in \(0, 1\]"),
        ({"scoring": "entropie"}, "scoring='entropie', did you mean 'entropy'\\? valid values: loss, entropy"),
        (
            {"selection": "best"},
            "selection='best'; valid values: topk, fixed_quota, random, .* or a function",
        ),
        ({"route": "tokens"}, "route='tokens', did you mean 'token'\\? valid values: sequence, segment, token, loss"),
        ({"foo": 9}, "unknown option 'foo'; valid options: route, ratio"),
        ({"depth": 3}, "unknown option 'depth', did you mean 'depth_layers'"),
        ({"total_steps": 9}, r"total_steps is no option; pass it to cggr\.attach"),
        ({"router_layers": 0}, "router_layers=0 is neither 'auto' nor a positive integer"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is not a non-negative integer"),
        ({"seed": 2**64}, r"seed=18446744073709551616 is neither None nor an integer from 0 to 2\*\*64 - 1"),
        ({"inner": "eagr"}, "inner='eagr', did you mean 'eager'\\? valid values: auto, inductor, eager, aot_eager, "),
        ({"inner": "cggr"}, "inner='cggr'"),
        ({"route": "depth", "selection_options": {"trim": 0.1}}, "selection_options with route='depth'"),
        ({"route": "depth", "scoring": "entropy"}, "scoring with route='depth', which selects nothing"),
        ({"scoring": "entropy"}, "scoring='entropy' while every row is kept; leave it out, or give a ratio below 1"),
        (
            {"selection": "random", "router_body": "fp8"},
            "router_body='fp8' with selection='random', which reads no scores; leave it out, or give selection='topk'",
        ),
        (
            {"ratio": 0.5, "router_head": "fp8", "router_head_sampled": 9},
            "router_head_sampled=9 is read where router_head='sampled' alone; leave it out, or give that as well",
        ),
        ({"threshold_sensitivity": 0.9}, r"threshold_sensitivity=0\.9 is read where dynamic_threshold=True alone"),
        ({"fallback": "ignore"}, "fallback='ignore'"),
        ({"keep_logits": 1}, "keep_logits=1 is not a bool"),
        ({"unpad": True, "keep_logits": True}, "unpad=True with keep_logits=True, which keeps the logits of padding"),
        (
            {"route": "depth", "depth_layers": (1, 2), "depth_until": (2, 0.6)},
            r"depth_until=\(2, 0\.6\) is none of: .*, a tuple of steps, a tuple of shares, None",
        ),
        ({"seed": -1}, "seed=-1"),
        ({"inner": 3}, "inner=3"),
    ],
)
def test_options_are_checked_where_they_are_given(options: dict, message: str) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=f"^{message}"):
        cggr.optimize(model, **options)
    assert "cggr" not in vars(model)
    with pytest.raises(ConfigError, match=f"^{message}"):
        RoutingConfig.from_options(options)


def test_config_object_and_options_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"both a RoutingConfig and options were given"):
        cggr.optimize(build("llama"), RoutingConfig(), ratio=0.5)
    with pytest.raises(ConfigError, match="is not a RoutingConfig"):
        cggr.optimize(build("llama"), {"ratio": 0.5})


def test_options_of_a_rule_ask_for_a_selection() -> None:
    assert RoutingConfig(selection_options={"tau": 0.1}).ratio == 0.5
    assert RoutingConfig().ratio == 1


def test_options_that_a_sweep_leaves_in_are_taken() -> None:
    """A ratio of 1 among others; layers of the router with a rule that needs none."""
    assert RoutingConfig(ratio=1, scoring="entropy").scoring == "entropy"
    assert RoutingConfig(route=["depth", "loss"], depth_layers=[1, 2]) == RoutingConfig(  # as files of options say it
        route=("depth", "loss"), depth_layers=(1, 2)
    )
    assert RoutingConfig(selection="random", router_layers=2).router_layers == 2
    assert RoutingConfig(selection="fixed_quota", dynamic_threshold=True, threshold_sensitivity=1).ratio == 0.5


@pytest.mark.parametrize(
    "change",
    [{"steps": "a"}, {"seed": None}, {"generators": {"cpu": "x"}}, {"generators": b""}, {"confidence": "high"}],
)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    model = cggr.optimize(Toy().train(), inner="eager", ratio=0.5, selection="random")
    model(**toy_batch())
    before = model.cggr.state_dict()
    for wrong in ({**before, **change}, None):
        with pytest.raises(ValueError, match="state"):
            model.cggr.load_state_dict(wrong)
    assert model.cggr.state_dict() == before
    model(**toy_batch())


def test_parameters_on_the_meta_device_are_named() -> None:
    model = cggr.optimize(Toy().train(), inner="eager", ratio=0.5).to("meta")
    with pytest.raises(CannotOptimize, match="the model's parameters are on the meta device: offloaded, or never"):
        model(**toy_batch())


def test_too_many_router_layers() -> None:
    model = cggr.optimize(build("llama"), ratio=0.5, router_layers=9, inner="eager")
    with pytest.raises(CannotOptimize, match=r"router_layers=9 but the model has 3 layers \(model\.layers\); choose"):
        model(**token_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": ("depth", "sequence"), "router_layers": 2}, "router_layers=2 but the model has 1 layers"),
        ({"route": ("depth", "token")}, "leave none of the 1 layers"),
    ],
)
def test_a_stage_with_too_few_layers_says_that_depth_layers_left_them(options: dict[str, Any], message: str) -> None:
    model = cggr.optimize(Toy().train(), depth_layers=1, inner="eager", selection="topk", **options)
    with pytest.raises(CannotOptimize, match=rf"{message} that train first, by depth_layers"):
        model(**toy_batch())


def test_scores_that_are_no_tensor_are_told() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, inner="eager")
    with pytest.raises(TypeError, match=r"use_scores: got \[1\.0, 2\.0\]; give a tensor of one score a row"):
        model.cggr.use_scores([1.0, 2.0])


def test_fallback_to_eager_warns_once_and_shows_in_the_report() -> None:
    model = cggr.optimize(AdaptedHead().train(), inner="eager", fallback="eager")
    with pytest.warns(RuntimeWarning, match="training without routing: cannot optimize: unsupported head"):
        loss = model(**toy_batch())[0]
    assert loss.requires_grad
    assert any("unsupported head" in reason for reason in model.cggr.runtime.passive)


def test_a_step_that_was_not_routed_leaves_no_figures_of_the_one_before() -> None:
    model = cggr.optimize(Toy().train(), inner="eager", ratio=0.5, fallback="eager")
    model(**toy_batch())
    assert model.cggr.selected is not None
    assert model.cggr.metrics()
    model.layers[1].register_full_backward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="training without routing"):
        model(**toy_batch())
    assert model.cggr.selected is None
    assert model.cggr.metrics() == {}


def test_restore_refuses_when_somebody_patched_on_top() -> None:
    model = cggr.optimize(build("llama"))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"forward was patched again after cggr\.optimize"):
        cggr.restore(model)
    assert "cggr" in vars(model)


def test_handle_of_a_plain_model() -> None:
    with pytest.raises(CannotOptimize, match=r"LlamaForCausalLM has no handle; call cggr\.optimize"):
        cggr.handle(build("llama"))


def test_errors_survive_pickling() -> None:
    error = CannotOptimize("reason", source="file.py:1: x", hint="do this")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.hint) == (str(error), "reason", "do this")


@pytest.mark.parametrize(
    "call",
    [
        cggr.optimize,
        cggr.restore,
        cggr.handle,
        lambda model: cggr.explain(model, {}),
        lambda model: cggr.check(model, {}),
        lambda model: cggr.attach(model, torch.optim.SGD([torch.zeros(1)])),
    ],
)
@pytest.mark.parametrize("model", ["llama", None, torch.nn.Linear])
def test_what_is_no_model_is_named(call: Callable[[Any], Any], model: object) -> None:
    with pytest.raises(CannotOptimize, match=rf"{type(model).__name__} is not a torch.nn.Module; pass"):
        call(model)


class Ignoring(Toy):
    """Leaves labels out that are another number than -100, a word's perhaps, and predicts each at its own place."""

    def __init__(self, ignored: int) -> None:
        super().__init__()
        self.ignored = ignored

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.ignored)


@pytest.mark.parametrize("ignored", [-100, -1, 0, 7])
def test_check_ignores_the_labels_that_the_loss_ignores(ignored: int) -> None:
    batch = toy_batch(6)
    torch.manual_seed(0)
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.5, ignored)
    found = cggr.check(Ignoring(ignored), batch)
    assert found.exact, found
    assert str(found).startswith("exact: route sequence, ratio 0.5, router of 1 of 3 layers")
    apart = dataclasses.replace(found, difference=1e-7, where="head.weight")
    assert str(apart).startswith("within rounding, apart by 1.0e-07 (head.weight): route sequence")
    assert str(dataclasses.replace(apart, difference=0.1)).startswith("differs by 1.0e-01 (head.weight): route")


@pytest.mark.parametrize("call", [cggr.explain, cggr.check])
@pytest.mark.parametrize("batch", [torch.zeros(2, 4), None, [1]])
def test_what_is_no_batch_is_named(call: Callable[[Any, Any], Any], batch: object) -> None:
    with pytest.raises(TypeError, match=rf"batch is a {type(batch).__name__}, expected the keyword arguments"):
        call(build("llama"), batch)


@pytest.mark.parametrize("optimized", [False, True])
def test_check_wants_rows_to_select_from(optimized: bool) -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5) if optimized else Toy().train()
    with pytest.raises(ValueError, match="a batch of one row leaves no rows to select"):
        cggr.check(model, toy_batch(1))


def test_where_every_row_is_kept_check_takes_a_number_for_all_of_them() -> None:
    batch = {**token_batch(), "num_items_in_batch": torch.tensor(7)}
    assert cggr.check(cggr.optimize(build("llama"), route="depth", depth_layers=1, depth_until=2), batch).exact


def test_check_wants_labels() -> None:
    with pytest.raises(ValueError, match="a batch has no labels, so there is no loss"):
        cggr.check(build("llama"), {"input_ids": token_batch()["input_ids"]})


def test_attach_wants_an_optimizer_and_warns_of_another_models() -> None:
    model = cggr.optimize(Toy(), warmup_steps=2, inner="eager")
    with pytest.raises(TypeError, match=r"optimizer is a Toy, expected a torch\.optim\.Optimizer"):
        cggr.attach(torch.optim.SGD(model.parameters()), model)
    with pytest.warns(RuntimeWarning, match="the optimizer has no parameter of Toy: if it is another model's"):
        cggr.attach(model, torch.optim.SGD(Toy().parameters()))
    wrapper = nn.ModuleList([model, nn.Linear(2, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cggr.attach(wrapper, torch.optim.SGD(wrapper[1].parameters()))


@pytest.mark.parametrize(
    ("selection", "options", "reason"),
    [
        ("trimmed", {"tau": 2.0}, "selection_options: trimmed: tau"),
        ("auto", {"tau": -1}, "selection_options: trimmed: tau"),
        ("importance", {"floor": 0}, "selection_options: importance: floor"),
        ("stratified", {"num_strata": 2.0**62}, "^selection_options: "),
        ("stratified", {"num_strata": 2.0**70}, "^selection_options: "),
    ],
)
def test_a_rule_says_what_its_options_may_be(selection: str, options: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RoutingConfig(ratio=0.5, selection=selection, selection_options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_options_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        RoutingConfig(ratio=0.5)
        RoutingConfig(selection="auto", selection_options={"tau": 0.1})
        RoutingConfig(selection="stratified", selection_options={"num_strata": 4.0})
    finally:
        torch.set_default_dtype(before)


def test_an_attribute_of_the_models_own_is_no_handle() -> None:
    model = build("llama")
    model.cggr = "mine"
    assert cggr.restore(model) is model
    with pytest.raises(CannotOptimize, match="has no handle"):
        cggr.handle(model)
    with pytest.raises(CannotOptimize, match="LlamaForCausalLM has an attribute cggr of its own; rename it"):
        cggr.optimize(model, ratio=0.5)
    assert model.cggr == "mine"
    wrapper = nn.Sequential(nn.Linear(2, 2), cggr.optimize(build("llama")))
    wrapper.cggr = "mine"
    assert cggr.handle(wrapper) is wrapper[1].cggr


def test_a_schedule_that_nobody_counts_for_is_in_the_report() -> None:
    model = cggr.optimize(Toy().train(), ratio=0.5, warmup_steps=2, inner="eager")
    model(**toy_batch())[0].backward()
    assert "schedule        stands still until optimizer steps are counted" in str(model.cggr.report())
    cggr.attach(model, torch.optim.SGD(model.parameters()))
    assert "stands still" not in str(model.cggr.report())
    assert model.cggr.report().schedule is None


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_in_a_capture_is_no_refusal(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A trainer halves its batches then (`auto_find_batch_size`); training without routing would take more."""

    def plan(*_: Any) -> None:
        raise error

    monkeypatch.setattr(backend, "Plan", plan)
    model = cggr.optimize(Toy().train(), ratio=0.5, fallback="eager")
    with pytest.raises(type(error), match="memory"):
        model(**toy_batch())
    monkeypatch.undo()
    model(**toy_batch())
    assert model.cggr.captures == 1
