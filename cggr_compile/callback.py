"""`CGGRCallback`: transformers' Trainer, and what derives from it, with a routed model."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cggr_compile.api import handle


class CGGRCallback(TrainerCallback, ExportableState):
    """For transformers' Trainer and what derives from it: counts steps, logs metrics, and resumes.

        trainer = Trainer(model=cggr.optimize(model, ratio=0.25), ..., callbacks=[CGGRCallback()])

    Each log gets the handle's metrics as `cggr/...` numbers (this reads them back, at logging steps only); they enter
    `trainer.state.log_history` and, with `CGGRCallback.first_in(trainer)`, every reporting integration. Checkpoints
    hold the routed state in `trainer_state.json`; `train(resume_from_checkpoint=...)` takes it back.

    Raises CannotOptimize at the start of training where the model is not optimised.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    @classmethod
    def first_in(cls, trainer: Any) -> CGGRCallback:
        """Adds the callback to a trainer in front of all others, so that these log its metrics too; returns it."""
        callback = cls()
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
        return callback

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the handle's state, in base64."""
        attributes = {} if self._handle is None else {"routed": _to_text(self._handle.state_dict())}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the routed model, and its state where training goes on from a checkpoint."""
        self._handle = handle(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        routed = saved.get("attributes", {}).get("routed")
        if state.global_step and routed is not None:
            self._handle.load_state_dict(_from_text(routed))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step."""
        self._handle.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the metrics of the last routed step to a training log."""
        if self._handle is None or logs is None or "loss" not in logs:
            return
        metrics = {f"cggr/{name}": float(value) for name, value in self._handle.metrics().items()}
        logs.update(metrics)
        state.log_history[-1].update(metrics)


def _to_text(state: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _from_text(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
