"""The original CGGR's activation checkpointing of the hard sequences: each layer recomputes itself in the backward.

`torch.utils.checkpoint`, without reentrance, around the `forward` of every layer, for the time of a call. The model's
own checkpointing is neither needed nor touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_compile.original.loss import CGGRScorer, mean_cross_entropy
from cggr_compile.original.model import cut_rows
from cggr_compile.original.quota import QuotaModel
from cggr_compile.original.router import cache_holders, checked_module, layer_lists, logits_of


@contextlib.contextmanager
def checkpointed(model: nn.Module, numbers: Sequence[int] | None = None) -> Iterator[None]:
    """The model with its layers checkpointed, those of these numbers in each of its lists, or all.

    A model without a list of layers is checkpointed as a whole, and one that checkpoints by itself, as transformers'
    do when asked to, is left to that. Caches of keys and values are off meanwhile: a layer that runs twice would write
    twice. Raises ValueError for a number that no list has.
    """
    stacks = [list(model.get_submodule(path)) for path in layer_lists(model)] or [[model]]
    longest = max(len(stack) for stack in stacks)
    if numbers is not None and not all(0 <= number < longest for number in numbers):
        raise ValueError(f"checkpoint_layers is {list(numbers)}, expected numbers of 0 to {longest - 1}")
    layers = [each for stack in stacks for i, each in enumerate(stack) if numbers is None or i in numbers]
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        layers = []
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    caching = cache_holders(model)
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        for holder in caching:
            holder.use_cache = False
        yield
    finally:
        for layer, own in before:
            vars(layer).pop("forward", None)
            if own is not None:
                layer.forward = own
        for holder in caching:
            holder.use_cache = True


class SelectiveCheckpointWrapper(nn.Module):
    """Runs the hard sequences of a batch with checkpointed layers.

    `wrapper(input_ids, labels=None, hard_indices=None, **kwargs)`: with indices of sequences (list or int64 [n]) the
    model runs on those alone, checkpointed, with batched keyword arguments cut as in `CGGRModel`, and its output is
    returned. Where the model computes no loss of its own, `labels` make one: the mean next-token loss, returned as a
    0-d tensor or put into the output's `loss`. Without indices, or with none, the model runs on the whole batch as it
    is.

    Args:
        model: any module that is called with input_ids, and labels where there are some.
        checkpoint_layers: numbers of the layers to checkpoint, in each list of layers of the model; None for all.

    Raises ValueError for a layer that does not exist, when layers are to be checkpointed.
    """

    def __init__(self, model: nn.Module, checkpoint_layers: list[int] | None = None) -> None:
        super().__init__()
        self.model = checked_module("model", model)
        self.checkpoint_layers = checkpoint_layers
        self._enabled: contextlib.ExitStack | None = None

    def enable_checkpointing(self) -> None:
        """Checkpoints the layers until `disable_checkpointing`."""
        if self._enabled is None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(checkpointed(self.model, self.checkpoint_layers))
                self._enabled = stack.pop_all()

    def disable_checkpointing(self) -> None:
        """Ends what `enable_checkpointing` began."""
        if self._enabled is not None:
            self._enabled.close()
            self._enabled = None

    @contextlib.contextmanager
    def selective_checkpointing(self, enable: bool = True) -> Iterator[None]:
        """The layers checkpointed, or not, and afterwards as before."""
        before = self._enabled is not None
        self._switch(enable)
        try:
            yield
        finally:
            self._switch(before)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        hard_indices: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output for the hard sequences, or for all without indices."""
        if labels is not None:
            kwargs = {**kwargs, "labels": labels}
        if hard_indices is None or len(hard_indices) == 0:
            return self.model(input_ids, **kwargs)
        ids, kwargs = _hard(input_ids, hard_indices, kwargs)
        with self.selective_checkpointing():
            output = self.model(ids, **kwargs)
        if labels is None or getattr(output, "loss", None) is not None:
            return output
        loss = mean_cross_entropy(logits_of(output)[:, :-1].flatten(0, 1), kwargs["labels"][:, 1:].flatten())
        if hasattr(output, "loss"):
            output.loss = loss
            return output
        return loss

    def _switch(self, enable: bool) -> None:
        if enable:
            self.enable_checkpointing()
        else:
            self.disable_checkpointing()


def apply_selective_checkpointing(
    model: nn.Module,
    forward_fn: Callable[..., Any],
    input_ids: Tensor,
    hard_indices: Sequence[int] | Tensor,
    **kwargs: Any,
) -> Any:
    """What `forward_fn(input_ids, **kwargs)` returns for the hard sequences, with the model's layers checkpointed.

    Args:
        model: whose layers; `forward_fn` runs it.
        forward_fn: the model itself, its forward, or a function of yours around it.
        input_ids: [B, S].
        hard_indices: which sequences, list or int64 [n].
        kwargs: batched ones are cut to the sequences, as in `CGGRModel`.
    """
    ids, kwargs = _hard(input_ids, hard_indices, kwargs)
    with checkpointed(model):
        return forward_fn(ids, **kwargs)


class CGGRCheckpointedModel(QuotaModel):
    """Trains a causal language model on the hardest sequences of each batch, with checkpointed layers.

    `model(input_ids, labels=None, **kwargs)` returns the model's own output where there are no labels, and otherwise
    the loss of `QuotaModel`. Attributes: `model`, `scorer` (a `CGGRScorer` with `"fixed_quota"`, over `router` or the
    model itself) and `use_checkpointing`. Raises what `CGGRScorer` raises, and ValueError for labels of another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        router: nn.Module | None = None,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        use_checkpointing: bool = True,
    ) -> None:
        super().__init__(model)
        self.use_checkpointing = use_checkpointing
        router = self.model if router is None else router
        self.scorer = CGGRScorer(router, min_tokens_ratio, warmup_steps, selection="fixed_quota")

    def step(self) -> None:
        """Counts one optimiser step of the curriculum."""
        self.scorer.step()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The loss of the hardest sequences, or the model's output without labels."""
        if labels is None:
            return self.model(input_ids, **kwargs)
        scored = self.scorer(input_ids, **kwargs)
        with checkpointed(self.model) if self.use_checkpointing else contextlib.nullcontext():
            loss = self.train_on(input_ids, labels, scored, kwargs, self.scorer.step_count)
        self._measured["checkpointing_enabled"] = self.use_checkpointing
        return loss


def _hard(
    input_ids: Tensor, hard_indices: Sequence[int] | Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Ids and keyword arguments of the hard sequences."""
    rows = torch.as_tensor(hard_indices, device=input_ids.device)
    return input_ids[rows], cut_rows(kwargs, rows, len(input_ids))
