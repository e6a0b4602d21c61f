"""`cggr.route`: transformers' Trainer and TRL's in one line, and the losses that it refuses."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, COMMON, VOCABULARY, build
from documents import examples

import cggr_compile as cggr

datasets, peft, tokenizers, trl = map(pytest.importorskip, ("datasets", "peft", "tokenizers", "trl"))
datasets.disable_progress_bars()

PAGE = "integrations.md"
COMPLETION = 5
OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 1, "inner": "eager", "seed": 5}
OF_TRL = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> "
    "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def two_layers() -> torch.nn.Module:
    return oracle.truncated(build("llama"), ARCHITECTURES["llama"], 2)


@functools.cache
def tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{token}": token for token in range(3, VOCABULARY)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def prompts_and_completions() -> list[dict[str, str]]:
    """Prompts of one to three tokens, so that batches are padded."""
    return [
        {"prompt": "w3 " * (1 + row % 3), "completion": " ".join(f"w{5 + row + at}" for at in range(COMPLETION))}
        for row in range(12)
    ]


def conversations() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in prompts_and_completions()
    ]


def made(kind: str, model: torch.nn.Module, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """A trainer of TRL's; what its configuration has no field for is the trainer's own."""
    config = getattr(trl, f"{kind}Config")
    fields = {name: options.pop(name) for name in list(options) if name in config.__dataclass_fields__}
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
        **fields,
    }
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        args=config(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **options,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def sft(model: torch.nn.Module, folder: Path, **options: Any) -> Any:
    rows = options.pop("rows", prompts_and_completions())
    return made("SFT", model, rows, folder, eval_dataset=datasets.Dataset.from_list(rows), **options)


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def state_of(trainer: Any) -> tuple[Any, ...]:
    """What `route` may patch."""
    model = trainer.model
    hooks = model._forward_hooks.keys() | model._forward_pre_hooks.keys()
    return vars(trainer).keys(), list(trainer.callback_handler.callbacks), vars(model).keys(), hooks, model.forward


def test_one_line_trains_adapters_on_completions_evaluates_as_ever_and_comes_off(tmp_path: Path) -> None:
    """LoRA by `peft_config`, completion-only labels, two micro-batches a step: the documentation's example."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    trainer = sft(two_layers(), tmp_path, peft_config=lora)
    before = state_of(trainer)
    assert examples(PAGE, "routed_sft")["routed_sft"](trainer) is trainer
    trainer.train()
    model = trainer.model
    logs = training_logs(trainer)
    assert [entry["cggr/rows_selected"] for entry in logs] == [3, 3, 3]
    assert "entropy" in logs[0]
    assert "cggr/entropy" not in logs[0]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert model.cggr.runtime.steps == 3
    assert model.cggr.calls == 6
    assert model.cggr.metrics()["tokens_total"] == 6 * (COMPLETION + 1)  # with the end of text, without the prompt
    evaluated = trainer.evaluate()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cggr.restore(twin)
    assert trainer.compute_loss.__func__ is not type(trainer).compute_loss
    cggr.restore(model)
    assert state_of(trainer) == before
    expected = trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert evaluated[name] == expected[name], name
    trainer.train()
    assert "cggr/rows_selected" not in training_logs(trainer)[-1]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"loss_type": "chunked_nll", "assistant_only_loss": True, "rows": conversations()}),
        ("mixtral", {"router_aux_loss_coef": 0.5}),  # the model's own is another
        ("llama", {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}),
        # AdamW makes as much of a gradient that is rounding as of any.
        ("llama", {"unpad": True, "gradient_checkpointing": True, "learning_rate": 3e-3}),
    ],
)
def test_with_every_row_kept_training_is_trls(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Loss, gradients and the metrics of both are alike within rounding: TRL computes the same in other operators."""
    eager = oracle.truncated(build(name), ARCHITECTURES[name], 1)
    unpad = {"unpad": True} if options.get("unpad") else {}
    options = {name: value for name, value in options.items() if name not in unpad}
    plain = sft(copy.deepcopy(eager), tmp_path, **options)
    packed = {"inner": "eager"} if options.get("packing") else {**OPTIONS, "ratio": 1.0}
    routed = cggr.route(sft(copy.deepcopy(eager), tmp_path, **options), **packed, **unpad)
    for trainer in (plain, routed):
        trainer.train()
    for entry, expected in zip(training_logs(routed), training_logs(plain), strict=True):
        found = [figure for figure in OF_TRL if figure in expected]
        assert {figure: entry[figure] for figure in found} == pytest.approx(
            {figure: expected[figure] for figure in found}, rel=1e-4
        )
    assert ("aux_loss" in training_logs(routed)[0]) == (name == "mixtral")
    assert routed.model.cggr.captures == 1
    # TRL pads on the right; packed batches have a mask of documents, and Mixtral's balance reads what padding becomes.
    expected = 0 if options.get("packing") or name == "mixtral" else 1
    assert routed.model.cggr.report().causal_attentions == expected
    if unpad:
        assert "computed 50 of 54 places" in routed.model.cggr.report().unpadded
    assert all(type(value) in (int, float) for entry in routed.state.log_history for value in entry.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}], ids=["padded", "packed"]
)
def test_on_a_gpu_trls_defaults_train_as_trl_does(options: dict[str, Any], tmp_path: Path) -> None:
    """bf16 autocast and checkpoints, every row: no further from fp32 than TRL itself, within a factor of two."""
    defaults = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-4}
    eager = two_layers()
    logs = []
    for routed, own in ((False, {"bf16": False}), (False, {}), (True, {})):
        trainer = sft(copy.deepcopy(eager), tmp_path, **{**defaults, **options, **own})
        trainer = cggr.route(trainer) if routed else trainer
        trainer.train()
        logs.append(training_logs(trainer))
    truth, theirs, ours = ([entry[name] for entry in log for name in ("loss", "grad_norm")] for log in logs)
    furthest = max(abs(value / true - 1) for value, true in zip(theirs, truth, strict=True))
    assert ours == pytest.approx(truth, rel=2 * furthest)


@pytest.mark.parametrize(("given", "padding"), [({}, "right"), ({"padding": "any"}, "any")])
def test_padding_is_as_trls_collator_pads_unless_it_is_given(given: dict, padding: str, tmp_path: Path) -> None:
    trainer = cggr.route(sft(two_layers(), tmp_path), ratio=0.5, **given)
    assert trainer.model.cggr.config.padding == padding


@pytest.mark.parametrize(("given", "unpad"), [({}, "auto"), ({"unpad": False}, False)])
def test_padding_is_left_out_unless_unpad_is_given(given: dict, unpad: bool | str, tmp_path: Path) -> None:
    assert cggr.route(sft(two_layers(), tmp_path), **given).model.cggr.config.unpad == unpad


@pytest.mark.long
def test_sft_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Random selection and a warm-up in progress: the generator and the step have to come back."""
    options = {**OPTIONS, "selection": "random", "warmup_steps": 3}
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (cggr.route(sft(two_layers(), tmp_path, **fields), **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert [entry["loss"] for entry in training_logs(resumed)] == [entry["loss"] for entry in training_logs(whole)]
    assert [entry["cggr/rows_selected"] for entry in training_logs(whole)] == [6, 6, 5, 3]


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}])
def test_documents_of_packed_batches_are_selected_by_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    """The documentation's example. Packing fills rows of `max_length`, and TRL puts them behind one another; losses
    fall, and a run that is resumed is the whole one."""
    fields = {**options, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = (
        examples(PAGE, "routed_documents")["routed_documents"](sft(two_layers(), tmp_path, **fields)) for _ in range(2)
    )
    whole.train()
    logs = training_logs(whole)
    assert whole.model.cggr.captures == 1
    assert whole.model.cggr.metrics()["rows_total"] == 1
    for entry in logs:
        assert 1 <= entry["cggr/documents_selected"] < entry["cggr/documents_total"]
        assert 0 < entry["cggr/token_kept_ratio"] < 0.52  # k is rounded up
        assert 0 < entry["cggr/tokens_selected"] < entry["cggr/tokens_total"]
        assert entry["entropy"] > 0
        assert 0 <= entry["mean_token_accuracy"] <= 1
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert logs[-1]["num_tokens"] > logs[0]["num_tokens"] > 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["loss"] for entry in training_logs(resumed)] == [entry["loss"] for entry in logs]
    evaluated = whole.evaluate()
    cggr.restore(whole.model)
    assert whole.evaluate()["eval_loss"] == evaluated["eval_loss"]


def preferences(row: dict[str, str]) -> dict[str, Any]:
    return {**row, "chosen": row["completion"], "rejected": row["prompt"]}


def reward_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, num_labels=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPO", lambda: {"ref_model": two_layers()}),
        ("Reward", lambda: {"model": reward_model()}),
        ("GRPO", lambda: {"reward_funcs": no_reward, "num_generations": 2}),
        ("Distillation", lambda: {"teacher_model": two_layers(), "rows": conversations()}),
    ],
)
def test_trainers_of_other_losses_are_refused_by_name(kind: str, options: Callable[[], Any], tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": two_layers(), "rows": [preferences(row) for row in prompts_and_completions()]}
    given |= options()
    if kind == "DPO":
        given["rows"] = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in given["rows"]]
    trainer = made(kind, given.pop("model"), given.pop("rows"), tmp_path, **given)
    with pytest.raises(cggr.CannotOptimize, match=rf"{kind}Trainer trains on a loss of its own \({kind}Trainer\.comp"):
        cggr.route(trainer, ratio=1)
    assert "cggr" not in vars(trainer.model)


def test_a_trainer_of_trls_with_a_training_step_of_its_own_is_refused() -> None:
    """It has no compute_loss. What its constructor makes beside these is for generating."""
    kind = pytest.importorskip("trl.experimental.online_dpo").OnlineDPOTrainer
    trainer = object.__new__(kind)
    trainer.model, trainer.model_init, trainer.compute_loss_func = two_layers(), None, None
    trainer.args = transformers.TrainingArguments(use_cpu=True, report_to=[])
    with pytest.raises(cggr.CannotOptimize, match=r"a loss of its own \(OnlineDPOTrainer\.training_step\)"):
        cggr.route(trainer, ratio=0.5)
    assert "cggr" not in vars(trainer.model)


class Watched(trl.SFTTrainer):
    """What SFTTrainer makes of its outputs, and more."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, r"loss_type='dft' is a loss of SFTTrainer's own.*'chunked_nll'"),
        ({"packing": True, "max_length": 16}, r"padding_free batches .* are one row.*route='segment', which selects"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1 is a loss of SFTTrainer's own.*leave it at 0"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True makes SFTTrainer patch its model.*leave it at False"),
        ({"compute_loss_func": no_reward}, "compute_loss_func is a loss of SFTTrainer's own.*in the model's forward"),
    ],
)
def test_losses_of_the_trainers_own_are_refused_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = sft(two_layers(), tmp_path, **options)
    before = state_of(trainer)
    with pytest.raises(cggr.CannotOptimize, match=message):
        cggr.route(trainer, **OPTIONS)
    assert state_of(trainer) == before


def test_a_trainer_whose_loss_or_model_is_not_its_own_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trl, "SFTTrainer", Watched)
    with pytest.raises(cggr.CannotOptimize, match="Watched has a compute_loss of its own around SFTTrainer's"):
        cggr.route(sft(two_layers(), tmp_path), **OPTIONS)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(cggr.CannotOptimize, match=r"Trainer makes its model in train\(\), by model_init"):
        cggr.route(transformers.Trainer(model_init=lambda: two_layers(), args=arguments), **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match=r"optimized already \(Llama\w+\).*options to cggr\.route alone"):
        cggr.route(transformers.Trainer(model=cggr.optimize(two_layers()), args=arguments), **OPTIONS)
    with pytest.raises(TypeError, match=r"trainer is a LlamaForCausalLM, expected a transformers\.Trainer"):
        cggr.route(two_layers(), **OPTIONS)


def test_a_trainer_is_whole_after_an_error(tmp_path: Path) -> None:
    """In the options, and in the first step, for LoHa: then `restore` leaves it to train plainly."""
    config = peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = sft(two_layers(), tmp_path, peft_config=config, max_steps=1)
    before = state_of(trainer)
    with pytest.raises(cggr.ConfigError, match="ratio=2"):
        cggr.route(trainer, ratio=2)
    assert state_of(trainer) == before
    cggr.route(trainer, **OPTIONS)
    with pytest.raises(cggr.CannotOptimize, match="breaks Dynamo's graph"):
        trainer.train()
    cggr.restore(trainer.model)
    assert state_of(trainer) == before
    trainer.train()
    assert trainer.state.global_step == 1
    cggr.route(trainer, fallback="eager", **OPTIONS)
    with pytest.warns(RuntimeWarning, match="training without routing"):
        trainer.train()
    assert "entropy" not in training_logs(trainer)[-1]  # no routed step left any


def test_a_plain_sft_trainer_of_an_optimised_model_is_told_the_line(tmp_path: Path) -> None:
    trainer = sft(cggr.optimize(two_layers(), **OPTIONS), tmp_path)
    with pytest.raises(cggr.CannotOptimize, match=r"patched by one that .*utils\.py:\d+: _fused_forward.*cggr\.route"):
        trainer.train()
