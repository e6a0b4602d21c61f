"""`route`: a transformers Trainer, or TRL's SFTTrainer, trains routed after one line.

transformers' own `compute_loss` trains on the model's loss, which is what routing rewrites. SFTTrainer computes the
same loss from log-probabilities, for which it calls only the model's backbone: a routed one has transformers'
`compute_loss` in training, and its own in evaluation. Any other loss is the trainer's, and no graph of the model has
it.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, TypeVar

from transformers import Trainer

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.front.api import handle, optimize, resolve_config
from cggr_compile.front.call import optimized_parts
from cggr_compile.front.callback import CGGRCallback, refuse_own_loss

T = TypeVar("T", bound=Trainer)


def route(trainer: T, config: RoutingConfig | None = None, **options: Any) -> T:
    """Lets a trainer train routed; patches it in place and returns the same object.

        cggr.route(trl.SFTTrainer(model, args, train_dataset=rows), ratio=0.25).train()

    Optimises `trainer.model`, with `unpad="auto"` unless it is given, and adds `CGGRCallback` in front of the other
    callbacks. Gives TRL's SFTTrainer the model's own loss in training, with `prediction_metrics` and, unless `padding`
    says otherwise, as its collator pads, `padding="right"`. Masks, padding, accumulation, adapters, checkpoints and
    evaluation are the trainer's.
    `cggr.restore(trainer.model)` undoes all of it.

    Args:
        trainer: transformers' Trainer or TRL's SFTTrainer, or one that derives from them and leaves the loss to them.
        config: all options at once, or
        **options: fields of `RoutingConfig`, as for `optimize`.

    Raises:
        TypeError: `trainer` is none.
        ConfigError: an option is unknown or has a bad value.
        CannotOptimize: the trainer trains on a loss of its own, or its model cannot be routed. Nothing is changed.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}, expected a transformers.Trainer; route a model by optimize"
        )
    resolved = resolve_config(config, options)
    if resolved.unpad is None:
        resolved = dataclasses.replace(resolved, unpad="auto")
    _refuse_loss(trainer)
    fuses = _is_sft(trainer)
    if getattr(trainer, "padding_free", False):
        _refuse_one_row(resolved)
    model = trainer.model
    for _, part in optimized_parts(model):
        raise CannotOptimize(
            f"the trainer's model is optimized already ({type(part).__name__})",
            hint="give the options to cggr.route alone; cggr.restore(model) undoes what was done before",
        )
    optimize(model, _of_trl(trainer, resolved) if fuses else resolved)
    CGGRCallback.first_in(trainer)
    if fuses:
        trainer.compute_loss = types.MethodType(_compute_loss, trainer)
    handle(model).undo["hooks"] += (_Patches(trainer),)
    return trainer


def _of_trl(trainer: Any, config: RoutingConfig) -> RoutingConfig:
    """The options as SFTTrainer's metrics and batches have them: TRL's own collator pads on the right, labels too."""
    collator = type(trainer.data_collator)
    pads_right = _is_of_trl(collator) and collator.__name__ == "DataCollatorForLanguageModeling"
    padding = "right" if pads_right and config.padding is None else config.padding
    return dataclasses.replace(config, prediction_metrics=True, padding=padding)


class _Patches:
    """What `route` did to a trainer; a copy of the model has no part in it."""

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer

    def __reduce__(self) -> Any:
        return _Patches, ()

    def remove(self) -> None:
        if self.trainer is not None:
            # By its class: a trainer that restores callbacks from a checkpoint makes them anew.
            self.trainer.remove_callback(CGGRCallback)
            if vars(self.trainer).pop("compute_loss", None) is not None:
                self.trainer._total_train_tokens = int(self.trainer._total_train_tokens)


def _is_sft(trainer: Any) -> bool:
    """Whether it is an SFTTrainer, which computes the model's loss its own way."""
    return any(kind.__name__ == "SFTTrainer" and _is_of_trl(kind) for kind in type(trainer).__mro__)


def _is_of_trl(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trl"


def _refuse_loss(trainer: Any) -> None:
    """Raises `CannotOptimize` where the loss is another one than the model's."""
    name = type(trainer).__name__
    if trainer.model_init is not None:
        raise CannotOptimize(f"{name} makes its model in train(), by model_init", hint=f"pass {name} a model")
    ways = ("compute_loss", "training_step")
    owners = [(kind, way) for kind in type(trainer).__mro__ for way in ways if way in vars(kind)]
    of_trl, way = next((owner for owner in owners if _is_of_trl(owner[0])), (None, ""))
    if of_trl is not None and of_trl.__name__ != "SFTTrainer":
        raise CannotOptimize(
            f"{name} trains on a loss of its own ({of_trl.__name__}.{way}), which no graph of the model has, "
            "whatever the ratio",
            hint="train it without cggr; of TRL's trainers SFTTrainer trains on the model's loss",
        )
    if trainer.compute_loss_func is not None:
        raise CannotOptimize(
            f"compute_loss_func is a loss of {name}'s own, of logits that a routed step does not have",
            hint="leave compute_loss_func out, or compute that loss in the model's forward",
        )
    if trainer.args.label_smoothing_factor:
        raise CannotOptimize(
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} is a loss of {name}'s own, of logits that a "
            "routed step does not have",
            hint="leave it at 0",
        )
    if trainer.args.use_liger_kernel:
        raise CannotOptimize(
            f"use_liger_kernel=True makes {name} patch its model in train(), with operators that no graph shows",
            hint="leave it at False: a step of this package never stores logits either",
        )
    if of_trl is None:
        return
    if next(kind for kind, way in owners if way == "compute_loss") is not of_trl:
        raise CannotOptimize(
            f"{name} has a compute_loss of its own around SFTTrainer's, which a routed step cannot answer",
            hint="leave the loss to SFTTrainer; what is only watched fits into a callback",
        )
    if trainer.args.loss_type != "nll":
        raise CannotOptimize(
            f"loss_type={trainer.args.loss_type!r} is a loss of {name}'s own",
            hint="only loss_type='nll' ('chunked_nll') is the model's",
        )


def _refuse_one_row(config: RoutingConfig) -> None:
    if "sequence" in config.routes and config.ratio < 1 and config.selection != "auto":
        raise CannotOptimize(
            "padding_free batches (which packing makes too) are one row, so there are no rows to choose from",
            hint="leave ratio and selection out, which keeps every row; or pass route='segment', which selects "
            "documents, or 'loss' or 'token'; or padding_free=False, and packing_strategy='wrapped' where packing is "
            "wanted",
        )


def _compute_loss(
    self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """`SFTTrainer.compute_loss`: in evaluation itself, in training the model's own loss, with the same metrics.

    These stay on the device until they are logged, when `CGGRCallback` reads them back.
    """
    if not model.training:
        self._total_train_tokens = int(self._total_train_tokens)
        return type(self).compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
    routed = handle(model)
    calls, runs = routed.calls, routed.runtime.runs
    if self.aux_loss_enabled:
        inputs = {**inputs, "output_router_logits": True}
    loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
    refuse_own_loss(routed, calls)
    metrics = self._metrics["train"]
    mask = inputs.get("attention_mask")  # padding-free batches have none: all their tokens are real
    own = inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
    tokens = self.accelerator.gather(own).sum() // self._tp_size
    self._total_train_tokens = self._total_train_tokens + tokens
    metrics["num_tokens"] = [self._total_train_tokens]
    last = routed.runtime.last
    if routed.runtime.runs > runs and last is not None:  # else the step was not routed, with fallback="eager"
        counted, entropy, hits = self.accelerator.gather(last.found.figures).view(-1, 3).sum(0)
        metrics["entropy"].append(entropy / counted.clamp(min=1))
        metrics["mean_token_accuracy"].append(hits / counted.clamp(min=1))
    if self.aux_loss_enabled:
        loss = loss + _balance_beyond(self, num_items_in_batch) * outputs.aux_loss
        metrics["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean())
    return (loss, outputs) if return_outputs else loss


def _balance_beyond(trainer: Any, num_items: Any) -> float:
    """The weight of the experts' balance in TRL's loss, less that in the model's own.

    TRL divides its coefficient by the micro-batches of a step. transformers does not, and weighs the whole loss by the
    processes that the tokens were counted on.
    """
    wanted = trainer.router_aux_loss_coef
    own = getattr(trainer.model, "router_aux_loss_coef", wanted)  # the model's; else it reads TRL's in its config
    if num_items is None:
        return wanted - own
    if trainer.args.average_tokens_across_devices:
        own *= trainer.accelerator.num_processes // trainer.get_tp_size()
    return wanted / trainer.current_gradient_accumulation_steps - own
