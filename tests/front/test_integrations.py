"""Libraries around a routed model: PEFT, Accelerate; and the guard against bypasses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
import transformers
from architectures import ARCHITECTURES, build, token_batch
from documents import examples

import cggr_compile as cggr
from cggr_compile.run.not_computed import NOT_COMPUTED

accelerate, peft = map(pytest.importorskip, ("accelerate", "peft"))

PAGE = "integrations.md"
OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 1, "inner": "eager", "seed": 5}


def two_layers() -> torch.nn.Module:
    return oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2)


def adapted(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"], **options})
    return peft.get_peft_model(model, config).train()


def fill_adapters(model: torch.nn.Module) -> None:
    """B starts at zero, where neither A's gradient nor the adapter's part in the scores could be wrong."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_batch(3, 8)["input_ids"]).logits


def test_adapters_first_is_exact_and_saves_and_merges_as_ever(tmp_path: Path) -> None:
    names = examples(PAGE, "adapters_first")
    torch.manual_seed(0)
    model = names["adapters_first"](two_layers())
    fill_adapters(model)
    eager = cggr.restore(copy.deepcopy(model))
    batch = token_batch(6, 16)
    model(**batch)  # captured, which draws numbers
    torch.manual_seed(7)
    loss, gradients = oracle.step(model, batch)
    rows = model.cggr.selected
    inside = dataclasses.replace(ARCHITECTURES["llama"], layers="base_model.model.model.layers")
    assert torch.equal(rows, oracle.expected_rows(eager, inside, batch, 0.5, 1))
    torch.manual_seed(7)
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(batch, rows)))
    assert {name for name, gradient in gradients.items() if gradient is not None} == {
        name for name in gradients if "lora_" in name
    }

    for each in (model, eager):
        torch.optim.SGD(each.parameters(), lr=0.5).step()
        each.save_pretrained(tmp_path / str(each is model))
    files = [sorted(path.name for path in (tmp_path / side).iterdir()) for side in ("True", "False")]
    assert files[0] == files[1]
    saved = [safetensors.torch.load_file(tmp_path / side / "adapter_model.safetensors") for side in ("True", "False")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    expected = logits_of(eager)
    assert torch.equal(logits_of(model), expected)
    merged = model.merge_and_unload()
    assert "cggr" not in vars(merged)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


def test_routing_first_is_exact_with_a_trained_copy_of_the_head() -> None:
    names = examples(PAGE, "routing_first")
    names["lora"].modules_to_save = ["lm_head"]
    names["lora"].lora_dropout = 0.0
    base = two_layers()
    eager = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(names["lora"])).train()
    model = names["routing_first"](base).train()
    for each in (model, eager):
        fill_adapters(each)
    eager.load_state_dict(model.state_dict())
    batch = token_batch(6, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cggr.attach(model, optimizer)
    loss, gradients = oracle.step(model, batch)
    assert cggr.handle(model) is base.cggr
    oracle.assert_same_step(loss, gradients, *oracle.step(eager, oracle.rows_of(batch, base.cggr.selected)))
    trained = {name for name, gradient in gradients.items() if gradient is not None}
    assert any("lm_head" in name for name in trained)
    assert all("lora_" in name or "lm_head.modules_to_save" in name for name in trained)
    optimizer.step()
    assert base.cggr.runtime.steps == 1
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert merged is base
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"]}, r"unsupported head: only linear.*lora_B.*no adapter"),
        ({"alora_invocation_tokens": [1]}, r"breaks Dynamo's graph .*peft"),
    ],
)
def test_adapters_that_cannot_be_routed_are_refused(options: dict[str, Any], message: str) -> None:
    model = cggr.optimize(adapted(two_layers(), **options), **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match=message):
        model(**token_batch())


def test_what_a_route_cannot_is_not_put_down_to_the_library_whose_line_it_is() -> None:
    """The mask of prefixes and tokens is made by transformers' line, where flex_attention stops a trace."""
    prefixes = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = cggr.optimize(peft.get_peft_model(build("llama"), prefixes), route="token", inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"^cannot optimize: cannot tell which tokens a value .*sequence'"):
        model(**token_batch())


@pytest.mark.sample(1)
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_under_gradient_checkpointing_are_exact(reentrant: bool) -> None:
    """As Trainer and TRL set it up: a hook makes the embeddings require grad, which reentrant checkpoints need."""
    torch.manual_seed(0)
    eager = adapted(two_layers())
    fill_adapters(eager)
    eager.gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager.enable_input_require_grads()
    model = cggr.optimize(copy.deepcopy(eager), **OPTIONS)
    batch = token_batch(6, 16)
    loss, gradients = oracle.step(model, batch)
    expected = oracle.step(eager, oracle.rows_of(batch, model.cggr.selected))
    assert len(model.cggr.selected) == 3
    oracle.assert_same_step(loss, gradients, *expected)
    assert sum(gradient is not None for gradient in gradients.values()) == 4


@pytest.mark.long
def test_trainer_compiles_around_a_routed_model(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(1, 13)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=6, report_to=[], use_cpu=True, torch_compile=True
    )
    model = cggr.optimize(two_layers(), **OPTIONS)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    cggr.CGGRCallback.first_in(trainer)
    trainer.train()
    assert model.cggr.captures == 1
    assert len(model.cggr.selected) == 3


@pytest.mark.parametrize("outside", [True, False])
def test_prompt_tuning_is_refused(outside: bool) -> None:
    base = two_layers() if outside else cggr.optimize(two_layers(), **OPTIONS)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    expected = "the call has no input_ids, only inputs_embeds"
    if outside:
        cggr.optimize(model, **OPTIONS)
        expected = r"positions where the call has \w+ token ids.*prompt tuning"
    with pytest.raises(cggr.CannotOptimize, match=expected):
        model(**token_batch())


def test_two_routings_of_one_step_are_refused() -> None:
    inner = cggr.optimize(two_layers(), **OPTIONS)
    wrapper = adapted(inner)
    with pytest.raises(cggr.CannotOptimize, match=r"holds a model that is optimized itself: Llama\w+ at base_model"):
        cggr.optimize(wrapper, **OPTIONS)
    cggr.restore(inner)
    cggr.optimize(wrapper, **OPTIONS)
    wrapper(**token_batch())
    cggr.optimize(inner, **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match="holds a model that is optimized itself"):
        wrapper(**token_batch())
    with pytest.raises(cggr.CannotOptimize, match="holds a model that is optimized itself"):
        cggr.optimize(wrapper, ratio=1.0)
    # As it was before the call that was refused.
    assert wrapper.cggr.config.ratio == OPTIONS["ratio"]
    cggr.restore(inner)
    wrapper(**token_batch())
    assert wrapper.cggr.selected.numel() == 3


def test_a_model_inside_a_wrapper_is_restored() -> None:
    inner = cggr.optimize(two_layers(), **OPTIONS)
    wrapper = adapted(inner)
    assert cggr.restore(wrapper) is wrapper
    assert "cggr" not in vars(inner)
    assert "forward" not in vars(inner)
    cggr.optimize(wrapper, **OPTIONS)
    assert cggr.restore(wrapper) is wrapper
    with pytest.raises(cggr.CannotOptimize, match="has no handle"):
        cggr.handle(wrapper)


def test_a_wrapper_with_a_getattr_of_its_own_has_plain_paths(recwarn: pytest.WarningsRecorder) -> None:
    """Dynamo reads PEFT's submodules by another expression; evaluation of the layers in use needs their path."""
    wrapper = adapted(two_layers())
    cggr.optimize(wrapper, route="depth", depth_layers=1, inner="eager")
    wrapper(**token_batch()).loss.backward()
    report = wrapper.cggr.report()
    assert report.stack.path == "base_model.model.model.layers"
    assert report.head.weight == "base_model.model.lm_head.weight"
    with wrapper.cggr.in_use():
        assert len(wrapper.base_model.model.model.layers) == 1
    assert len(wrapper.base_model.model.model.layers) == 2
    memory = cggr.explain(wrapper, token_batch(), ratio=0.5).memory()
    assert memory.optimizer < memory.parameters
    assert not [warning for warning in recwarn if "get_attr" in str(warning.message)]


def test_what_torch_compile_routes_is_not_patched_and_says_so() -> None:
    compiled = torch.compile(two_layers(), backend="cggr", options={"ratio": 0.5, "inner": "eager"})
    assert cggr.restore(compiled) is compiled
    compiled(**token_batch()).loss.backward()
    with pytest.raises(cggr.CannotOptimize, match=r"patches nothing.*go on with the model that was given"):
        cggr.restore(compiled)


def test_a_wrapper_without_labels_in_its_signature_is_told_what_to_do() -> None:
    wrapper = peft.get_peft_model(two_layers(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(cggr.CannotOptimize, match=r"takes no labels.*optimize the model inside"):
        cggr.optimize(wrapper)


def bypass(self: torch.nn.Module, **kwargs: Any) -> str:
    return "computed elsewhere"


@pytest.mark.parametrize("around", [lambda forward: forward, accelerate.utils.convert_outputs_to_fp32])
def test_the_guard_sees_a_forward_that_is_passed_by_and_only_that(around: Callable[..., Any]) -> None:
    """Accelerate's mixed precision is around it, too."""
    model = cggr.optimize(two_layers(), **OPTIONS)
    model.forward = types.MethodType(around(bypass), model)
    batch = token_batch()
    with pytest.raises(cggr.CannotOptimize, match=r"patched by one .*test_integrations\.py:\d+: bypass"):
        model(**batch)
    assert model(input_ids=batch["input_ids"]) == "computed elsewhere"
    with torch.no_grad():
        assert model(**batch) == "computed elsewhere"
    assert model.eval()(**batch) == "computed elsewhere"


def test_liger_that_comes_after_optimize_is_named() -> None:
    """`use_liger_kernel=True` patches the model in `train()`."""
    model = cggr.optimize(two_layers(), **OPTIONS)
    names: dict[str, Any] = {}
    path = "/env/site-packages/liger_kernel/transformers/model/llama.py"
    exec(compile("def lce_forward(self, **batch): return 0", path, "exec"), names)
    model.forward = types.MethodType(accelerate.utils.convert_outputs_to_fp32(names["lce_forward"]), model)
    with pytest.raises(cggr.CannotOptimize, match=r"Liger's kernels .*py:1: lce_forward.*use_liger_kernel=False"):
        model(**token_batch())


def test_the_guard_heeds_the_fallback_and_leaves_with_restore() -> None:
    model = two_layers()
    plain = model.__dict__.keys() | model._forward_hooks.keys() | model._forward_pre_hooks.keys()
    cggr.optimize(model, fallback="eager", **OPTIONS)
    routed = vars(model)["forward"]
    model.forward = types.MethodType(bypass, model)
    with pytest.warns(RuntimeWarning, match="training without routing: .*bypass"):
        assert model(**token_batch()) == "computed elsewhere"
    assert "bypass" in model.cggr.runtime.passive[0]
    model.forward = routed
    cggr.restore(model)
    assert model.__dict__.keys() | model._forward_hooks.keys() | model._forward_pre_hooks.keys() == plain


def test_a_data_parallel_replica_is_refused() -> None:
    replica = cggr.optimize(two_layers(), **OPTIONS)._replicate_for_data_parallel()
    with pytest.raises(cggr.CannotOptimize, match=r"replica of torch\.nn\.DataParallel"):
        replica(**token_batch())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps precision, devices and the data loader in progress in state of the process."""

    def reset() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_accumulates_in_bfloat16() -> None:
    eager = two_layers()
    model = cggr.optimize(copy.deepcopy(eager), **{**OPTIONS, "selection": "random"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    cggr.attach(model, optimizer)
    for seed in (1, 2):
        batch = token_batch(6, 16, seed=seed)
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert model.cggr.runtime.steps == seed - 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = eager(**oracle.rows_of(batch, model.cggr.selected)).loss
        (loss / 2).backward()
    before = two_layers()
    for name, parameter in eager.named_parameters():
        moved = before.get_parameter(name) - model.get_parameter(name)
        error = (moved - parameter.grad).norm() / parameter.grad.norm()
        assert error < 5e-2, f"{name}: relative error {error:.3f}"


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.long
def test_accelerates_wrapper_comes_off_a_routed_model() -> None:
    """The model trains routed, generates, is copied, pickled and restored as before the wrapper."""
    model = cggr.optimize(two_layers(), **OPTIONS)
    signature = inspect.signature(model.forward)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model)
    batch = token_batch(6, 16)
    assert wrapped(**batch).logits is NOT_COMPUTED
    with pytest.raises(RuntimeError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\)"):
        cggr.restore(model)
    assert accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False) is model
    assert inspect.signature(model.forward) == signature
    loss = model(**batch).loss
    expected = two_layers().train()(**oracle.rows_of(batch, model.cggr.selected)).loss
    assert torch.equal(loss, expected)
    prompt = batch["input_ids"][:1]
    assert model.eval().generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 18)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()(**batch)
        assert torch.equal(twin.cggr.selected, model.cggr.selected)
    assert "forward" not in vars(cggr.restore(model))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_that_was_optimised_behind_accelerates_wrapper_stays_routed_without_it() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = cggr.optimize(accelerator.prepare(two_layers().train()), **OPTIONS)
    batch = token_batch(6, 16)
    loss, rows = wrapped(**batch).loss, wrapped.cggr.selected
    eager = accelerator.prepare(two_layers().train())
    torch.testing.assert_close(loss, eager(**oracle.rows_of(batch, rows)).loss, rtol=1e-2, atol=0)
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    for twin in (copy.deepcopy(model), model):
        assert torch.equal(twin(**batch).loss, loss)
        assert torch.equal(twin.cggr.selected, rows)
        assert twin.eval()(batch["input_ids"]).logits.shape[:2] == (6, 16)
    assert not hasattr(cggr.restore(model), "cggr")
