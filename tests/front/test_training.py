"""Training loops around a routed model: steps are counted, logs have the metrics, a resumed run is the same run."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import build, token_batch
from documents import examples
from toys import AS_IT_IS, Toy, toy_batch

import cggr_compile as cggr
from cggr_compile.front.attach import attach
from cggr_compile.front.callback import CGGRCallback
from cggr_compile.schedule import LADDER_RUNGS

OPTIONS: dict[str, Any] = {"ratio": 0.5, "router_layers": 2, "inner": "eager", "seed": 5}


def optimized(**options: Any) -> torch.nn.Module:
    return cggr.optimize(copy.deepcopy(build("llama")), **{**OPTIONS, **options})


def test_attach_counts_the_steps_of_the_optimiser_until_removed() -> None:
    model = optimized(warmup_steps=4)
    optimizer = torch.optim.AdamW(model.parameters())
    hook = attach(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.step()
    assert model.cggr.runtime.steps == 2
    hook.remove()
    optimizer.step()
    assert model.cggr.runtime.steps == 2


def test_a_step_that_the_gradient_scaler_skips_does_not_count() -> None:
    model = optimized()
    parameter = next(iter(model.parameters()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradient, counted in ((1.0, 1), (torch.inf, 1), (1.0, 2)):
        parameter.grad = None
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert model.cggr.runtime.steps == counted


def test_attach_reaches_through_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.GradientState._reset_state()  # a trainer of an earlier test may have left it amid an accumulation
    model = cggr.optimize(Toy().train(), **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    attach(model, optimizer)
    loss = model(**toy_batch(6))[0]
    accelerator.backward(loss)
    optimizer.step()
    assert model.cggr.runtime.steps == 1
    assert len(model.cggr.selected) == 3


def test_attach_counts_once_and_goes_with_the_model() -> None:
    """A second call takes the place of the first; a model that is optimised anew is counted by its new handle."""
    model = cggr.optimize(Toy().train(), ratio=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    hook = attach(torch.nn.Sequential(model), optimizer)
    optimizer.step()
    assert model.cggr.runtime.steps == 1
    cggr.optimize(model, ratio=0.25)
    optimizer.step()
    optimizer.step()
    assert model.cggr.runtime.steps == 2
    cggr.restore(model)
    optimizer.step()
    hook.remove()
    cggr.optimize(model)
    optimizer.step()
    assert model.cggr.runtime.steps == 0


def test_of_two_optimisers_one_counts() -> None:
    """Of two that step side by side the second is refused, unless the first is gone; one that steps the same parameters
    is of a second phase, and takes the first's place."""
    model = cggr.optimize(Toy().train(), ratio=0.5)
    head, body = list(model.head.parameters()), list(model.layers.parameters())
    first, second = torch.optim.AdamW(body), torch.optim.SGD(head, lr=0.1)
    hook = attach(model, first)
    with pytest.raises(
        cggr.ConfigError,
        match=rf"AdamW \(of {len(body)} parameters\) counts the steps of Toy already, and SGD \(of {len(head)} param",
    ):
        attach(model, second)
    first.step()
    second.step()
    assert model.cggr.runtime.steps == 1
    hook.remove()
    attach(model, second)
    first.step()
    second.step()
    assert model.cggr.runtime.steps == 2
    later = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, later)
    second.step()
    later.step()
    assert model.cggr.runtime.steps == 3
    del later
    attach(model, first)
    first.step()
    assert model.cggr.runtime.steps == 4


def test_an_optimiser_within_accelerate_s_wrapper_is_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = cggr.optimize(Toy().train(), **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    attach(model, accelerate.Accelerator(cpu=True).prepare(optimizer))
    optimizer.step()
    assert model.cggr.runtime.steps == 1


def test_a_state_taken_before_the_first_step_pins_the_draws() -> None:
    """Without a seed, torch's when the model is optimised is the one; no other is drawn later."""
    torch.manual_seed(11)
    first = cggr.optimize(Toy().train(), ratio=0.5, selection="random")
    buffer = io.BytesIO()
    torch.save(first.cggr.state_dict(), buffer)
    torch.manual_seed(12)
    second = cggr.optimize(copy.deepcopy(cggr.restore(copy.deepcopy(first))), ratio=0.5, selection="random")
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["seed"] != second.cggr.state_dict()["seed"]
    second.cggr.load_state_dict(state)
    drawn = []
    for model in (first, second):
        torch.manual_seed(13)
        for _ in range(3):
            model(**toy_batch(32))
            drawn.append(model.cggr.selected)
    assert all(map(torch.equal, drawn[:3], drawn[3:]))
    assert not torch.equal(drawn[0], drawn[1])
    buffer = io.BytesIO()
    torch.save(first.cggr.state_dict(), buffer)  # a generator's state is in this one
    buffer.seek(0)
    second.cggr.load_state_dict(torch.load(buffer, weights_only=True))
    for model in (first, second):
        model(**toy_batch(32))
    assert torch.equal(first.cggr.selected, second.cggr.selected)


def test_attach_says_what_it_needs() -> None:
    plain = build("llama")
    with pytest.raises(cggr.CannotOptimize, match="has no handle"):
        attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer is a list, expected a torch\.optim\.Optimizer"):
        attach(optimized(), [])


def test_state_round_trip_and_what_it_refuses() -> None:
    first, second = (cggr.optimize(Toy().train(), **OPTIONS, selection="random") for _ in range(2))
    first.cggr.step()
    first(**toy_batch(32))
    state = copy.deepcopy(first.cggr.state_dict())
    second.cggr.load_state_dict(state)
    assert second.cggr.runtime.steps == 1
    drawn = []
    for model in (first, second):
        model(**toy_batch(32))
        drawn.append(model.cggr.selected)
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match=r"entries \['confidence', 'generators', 'seed', 'steps'\], got \['steps"):
        second.cggr.load_state_dict({"steps": 3})


class Rows(torch.utils.data.Dataset):
    """Twelve rows of tokens, the same every time."""

    def __init__(self) -> None:
        self.batch = token_batch(12, 16)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: tensor[row] for name, tensor in self.batch.items()}


def trainer(folder: Path) -> transformers.Trainer:
    made = examples("integrations.md", "make_trainer")["make_trainer"](build("llama"), Rows(), str(folder))
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    made.remove_callback(transformers.trainer_callback.ProgressCallback)
    return made


def test_trainer_counts_logs_evaluates_plainly_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The documentation's example: random selection and a warm-up in progress, so that both the generator and the step
    have to come back."""
    whole = trainer(tmp_path)
    whole.train()
    assert whole.model.cggr.runtime.steps == 6
    logs = whole.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    # Trainer clears the gradients before it logs.
    assert [entry["cggr/parameters_without_gradient"] for entry in logs if "loss" in entry] == [0] * 6
    assert all(math.isfinite(x) for entry in logs for name, x in entry.items() if name.startswith("cggr/"))
    kept = [entry["cggr/rows_selected"] for entry in logs if "loss" in entry]
    assert losses[-1] < losses[0]
    assert kept[0] == 6
    assert kept[-1] == 3
    assert not [entry for entry in logs if "eval_loss" in entry and "cggr/rows_selected" in entry]
    assert all(map(math.isfinite, losses))
    plain = transformers.Trainer(
        model=cggr.restore(copy.deepcopy(whole.model)), args=whole.args, eval_dataset=Rows(), callbacks=[]
    )
    assert whole.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.model.cggr.runtime.steps == 6
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again == losses


def test_a_plain_checkpoint_is_gone_on_with_routed(tmp_path: Path) -> None:
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    for steps, routed in ((1, False), (3, True)):
        given = transformers.TrainingArguments(str(tmp_path), **{**arguments, "max_steps": steps}, report_to=[])
        made = transformers.Trainer(build("llama"), given, train_dataset=Rows())
        if routed:
            cggr.route(made, ratio=0.5, inner="eager")
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if routed else None)
    assert made.model.cggr.runtime.steps == 3
    assert "routed" in (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()


class Loses(transformers.TrainerCallback):
    """Takes files out of the first checkpoint, as where another node wrote them."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for file in Path(args.output_dir).glob(f"checkpoint-1/{self.pattern}"):
            file.unlink()


@pytest.mark.parametrize("lost", ["nothing", "*.safetensors", "trainer_state.json"])
def test_the_best_checkpoints_weights_come_with_their_state(lost: str, tmp_path: Path) -> None:
    """A checkpoint of before the model grew: the next run trains its first layers, and grows. Where the weights or the
    state are not there, nothing comes back."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first is the best
        metric_for_best_model="loss",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    made = transformers.Trainer(build("llama"), arguments, train_dataset=Rows(), eval_dataset=Rows())
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    cggr.route(made, route="depth", depth_layers=1, depth_until=2, inner="eager")
    made.add_callback(Loses(lost))
    before = build("llama").model.layers[-1].mlp.up_proj.weight
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = made.model.cggr.state_dict()
    if lost == "*.safetensors":
        assert (state["steps"], state["growths"]) == (4, 1)
        return
    assert torch.equal(made.model.model.layers[-1].mlp.up_proj.weight, before)
    if lost == "trainer_state.json":
        assert (state["steps"], state["growths"]) == (4, 1)
        return
    assert (state["steps"], state["growths"]) == (1, 0)
    with made.model.cggr.in_use():
        assert len(made.model.model.layers) == 1


class OutOfMemoryOnce(transformers.TrainerCallback):
    """What `auto_find_batch_size` starts over after."""

    def __init__(self) -> None:
        self.at = 2

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            self.at = -1
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")


@pytest.mark.long
def test_a_run_that_starts_over_starts_the_schedule_over(tmp_path: Path) -> None:
    """After an out-of-memory error, and in a second `train()`; a hook on the optimiser does not count twice."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = optimized(warmup_steps=6, ratio=0.25)
    attached = AttachedAtOnce()
    made = transformers.Trainer(
        model=model, args=arguments, train_dataset=Rows(), callbacks=[OutOfMemoryOnce(), CGGRCallback(), attached]
    )
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    for _ in range(2):
        made.train()
        fractions = [entry["cggr/ratio_target"] for entry in made.state.log_history if "cggr/ratio_target" in entry]
        assert fractions == [model.cggr.config.kept_fraction(step, None) for step in range(3)]
        assert model.cggr.runtime.steps == made.state.global_step == 3


class AttachedAtOnce(transformers.TrainerCallback):
    """Counts by the optimiser as well."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attach(kwargs["model"], kwargs["optimizer"])


def test_the_callback_needs_a_routed_model(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    made = transformers.Trainer(model=build("llama"), args=arguments, train_dataset=Rows(), callbacks=[CGGRCallback()])
    with pytest.raises(cggr.CannotOptimize, match="has no handle"):
        made.train()


def test_a_trainer_that_keeps_the_labels_to_itself_is_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, label_smoothing_factor=0.1
    )
    made = transformers.Trainer(model=optimized(), args=arguments, train_dataset=Rows(), callbacks=[CGGRCallback()])
    with pytest.raises(cggr.CannotOptimize, match="never called the routed model with labels; train on the loss that"):
        made.train()


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def test_a_trainer_with_a_loss_of_its_own_is_named(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    made = cggr.route(OwnLoss(model=build("llama"), args=arguments, train_dataset=Rows()), inner="eager")
    with pytest.raises(cggr.CannotOptimize, match=r"never called the routed model with labels \(OwnLoss\.compute_loss"):
        made.train()


def test_every_row_kept_logs_no_metrics_of_a_selection(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    made = cggr.route(transformers.Trainer(model=build("llama"), args=arguments, train_dataset=Rows()), inner="eager")
    made.train()
    assert not [name for entry in made.state.log_history for name in entry if name.startswith("cggr/")]


def test_nothing_compiles_after_the_warm_up() -> None:
    """80 steps under a curriculum, every tenth on the ragged last batch of an epoch."""
    model = cggr.optimize(Toy().train(), ratio=0.5, warmup_steps=40, inner=AS_IT_IS)
    compiled = []
    for step in range(80):
        model(**toy_batch(5 if step % 10 == 9 else 16, seed=step))[0].backward()
        model.cggr.step()
        compiled.append(sum(model.cggr.report().compilations.values()))
    assert len(model.cggr.runtime.plans) == 1
    assert compiled[49] <= 2 * (LADDER_RUNGS + 1)
    assert compiled[49] == compiled[-1]
