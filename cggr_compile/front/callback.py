"""`CGGRCallback`: transformers' Trainer, and what derives from it, with a routed model."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from cggr_compile.errors import CannotOptimize
from cggr_compile.front.api import handle
from cggr_compile.front.handle import Handle

OWN_LOSS_HINT = (
    "train on the loss that the model returns; leave compute_loss_func and label smoothing out; TRL's SFTTrainer: "
    "cggr.route(trainer, …)"
)


class CGGRCallback(TrainerCallback, ExportableState):
    """For transformers' Trainer and what derives from it: counts and announces steps, logs metrics, resumes. `route`
    adds it; beside `optimize` it is added by hand:

        trainer = Trainer(model=cggr.optimize(model, ratio=0.25), ..., callbacks=[CGGRCallback()])

    Where steps select, each log gets the handle's metrics as `cggr/...` numbers (this reads them back, at logging steps
    only); they enter `trainer.state.log_history` and, with `CGGRCallback.first_in(trainer)`, every reporting
    integration. Checkpoints hold the routed state in `trainer_state.json`; `train(resume_from_checkpoint=...)` takes it
    back, and so does `load_best_model_at_end`. A `train()` that begins at step 0 begins the schedule anew, also where
    `auto_find_batch_size` starts over.

    Raises CannotOptimize at the start of training where the model is not optimised, and at the first optimiser step
    in which no call with labels reached it, because the trainer computes its loss elsewhere.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._calls = 0
        self._computed_by = ""

    @classmethod
    def first_in(cls, trainer: Any) -> CGGRCallback:
        """Adds the callback to a trainer in front of all others, so that these log its metrics too; returns it."""
        callback = cls()
        owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
        callback._computed_by = f" ({owner.__name__}.compute_loss)"
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
        return callback

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the handle's state, in base64."""
        attributes = {} if self._handle is None else {"routed": _to_text(self._handle.state_dict())}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the routed model. Where training goes on from a checkpoint, takes its state back; where it begins (a
        second `train()`, or one that starts over with smaller batches), the schedule begins anew."""
        self._handle = handle(kwargs["model"])
        self._calls = self._handle.calls
        if state.global_step:
            self._take_back(state)
        else:
            self._handle.runtime.start_over()
        # A checkpoint of a run without this callback has no entry for the trainer to write into.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._handle.runtime.tell_total(state.max_steps)
        self._handle.runtime.attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the trainer has put the best checkpoint's weights back, takes its state back as well. Where these are
        not to be found the trainer has warned of it, and everything is as the last step left it."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        folder = Path(state.best_model_checkpoint)
        weights = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*")
        if any(any(folder.glob(pattern)) for pattern in weights) and (folder / TRAINER_STATE_NAME).exists():
            routed = self._routed_of(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
            if routed is not None:
                self._handle.load_state_dict(_from_text(routed))

    def _routed_of(self, state: TrainerState) -> str | None:
        """The routed state that a checkpoint's `state` holds."""
        return state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("routed")

    def _take_back(self, state: TrainerState) -> None:
        """Goes on from a checkpoint's `state`."""
        routed = self._routed_of(state)
        if routed is not None:
            self._handle.load_state_dict(_from_text(routed))
        elif self._handle.config.deepens:
            raise CannotOptimize(
                f"the checkpoint of step {state.global_step} does not say which layers have trained",
                hint="resume route='depth' from a checkpoint that was written with CGGRCallback, or train all layers",
            )
        else:
            self._handle.runtime.steps = state.global_step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step: it is the trainer's number, whoever else counts (`attach`)."""
        refuse_own_loss(self._handle, self._calls, self._computed_by)
        self._calls = self._handle.calls
        self._handle.runtime.steps = state.global_step
        self._handle.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the metrics of the last routed step to a training log; what is a tensor in any becomes a number."""
        if logs is None:
            return
        numbers = {name: value.item() for name, value in logs.items() if isinstance(value, torch.Tensor)}
        logs.update(numbers)
        state.log_history[-1].update(numbers)
        if self._handle is None or "loss" not in logs or not self._handle.runtime.may_select:
            return
        found = self._handle.metrics().items()  # SFTTrainer logs two of them itself, of all micro-batches
        metrics = {f"cggr/{name}": float(value) for name, value in found if name not in logs}
        logs.update(metrics)
        state.log_history[-1].update(metrics)


def refuse_own_loss(routed: Handle, calls: int, computed_by: str = "") -> None:
    """Raises `CannotOptimize` where no training call with labels reached the model since its count was `calls`;
    `computed_by` says what computes the loss."""
    if routed.calls == calls:
        reason = f"a training step never called the routed model with labels{computed_by}"
        routed.refuse(CannotOptimize(reason, hint=OWN_LOSS_HINT))


def _to_text(state: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_text(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
