"""The original CGGR's scores of the next batch, taken while the host works on this one.

They are launched in the stream that trains, where no step can write weights that they read. On CUDA that waits for
nothing; it does not overlap on the device, as `model.cggr.score_ahead` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.original.loss import CGGRScorer
from cggr_compile.original.quota import QuotaModel

Scored = tuple[Tensor, Tensor, dict[str, Any]]


class AsyncCGGRScorer(nn.Module):
    """A `CGGRScorer`, in `scorer`, that keeps the scores of one batch for later.

    `prefetch(input_ids, **kwargs)` scores a batch; `get_mask(input_ids, **kwargs)` hands out what was prefetched, once,
    where ids and keyword arguments are equal to those of `prefetch`, and scores them otherwise. Both take what
    `CGGRScorer` takes; `get_mask` returns what it returns, and so does calling the module. The comparison waits for the
    device. What was prefetched has the weights and the step count of then. Raises what `CGGRScorer` raises.
    """

    def __init__(
        self,
        router: nn.Module,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        selection: str = "fixed_quota",
    ) -> None:
        super().__init__()
        self.scorer = CGGRScorer(router, min_tokens_ratio, warmup_steps, selection=selection)
        self._prefetched: tuple[dict[str, Any], Scored] | None = None

    def step(self) -> None:
        """Counts one optimiser step of the curriculum."""
        self.scorer.step()

    def prefetch(self, input_ids: Tensor, **kwargs: Any) -> None:
        """Scores a batch for the next `get_mask`."""
        # Copies: a loop may write its next batch into the same memory.
        asked = {name: _copy(value) for name, value in {"input_ids": input_ids, **kwargs}.items()}
        self._prefetched = (asked, self.scorer(input_ids, **kwargs))

    def get_mask(self, input_ids: Tensor, **kwargs: Any) -> Scored:
        """Difficulty, mask and info of a batch."""
        if self._prefetched is not None:
            asked, scored = self._prefetched
            given = {"input_ids": input_ids, **kwargs}
            if asked.keys() == given.keys() and all(_same(asked[name], given[name]) for name in given):
                self._prefetched = None
                return scored
        return self.scorer(input_ids, **kwargs)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Scored:
        """`get_mask`."""
        return self.get_mask(input_ids, **kwargs)


class AsyncCGGRModel(QuotaModel):
    """Trains a causal language model on the hardest sequences of each batch, the next batch scored in the same call.

    `model(input_ids, labels=None, next_input_ids=None, next_kwargs=None, **kwargs)` returns the model's own output
    where there are no labels, and otherwise the loss of `QuotaModel`. `next_input_ids` [B, S] are prefetched, with the
    keyword arguments that the next call will have, its attention mask say, in `next_kwargs`.

    Attributes: `model` and `async_scorer`, over `router` or the model itself. Raises what `CGGRScorer` raises, and
    ValueError for labels of another shape than input_ids.
    """

    def __init__(
        self,
        model: nn.Module,
        router: nn.Module | None = None,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
    ) -> None:
        super().__init__(model)
        self.async_scorer = AsyncCGGRScorer(self.model if router is None else router, min_tokens_ratio, warmup_steps)

    def step(self) -> None:
        """Counts one optimiser step of the curriculum."""
        self.async_scorer.step()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        next_input_ids: Tensor | None = None,
        next_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the hardest sequences, or the model's output without labels."""
        if labels is None:
            return self.model(input_ids, **kwargs)
        scored = self.async_scorer.get_mask(input_ids, **kwargs)
        if next_input_ids is not None:
            self.async_scorer.prefetch(next_input_ids, **(next_kwargs or {}))
        loss = self.train_on(input_ids, labels, scored, kwargs, self.async_scorer.scorer.step_count)
        self._measured["prefetch_active"] = next_input_ids is not None
        return loss


def create_prefetching_iterator(
    dataloader: Iterable[Any], async_scorer: AsyncCGGRScorer
) -> Iterator[tuple[Any, Scored]]:
    """Each batch with its (difficulty, mask, info), scored before the batch in front of it is handed out.

    Batches are mappings with `"input_ids"` or sequences that start with the ids; only the ids are scored.
    """
    remaining = iter(dataloader)
    current = next(remaining, None)
    if current is None:
        return
    async_scorer.prefetch(_ids(current))
    for following in remaining:
        scored = async_scorer.get_mask(_ids(current))
        async_scorer.prefetch(_ids(following))
        yield current, scored
        current = following
    yield current, async_scorer.get_mask(_ids(current))


def _ids(batch: Any) -> Tensor:
    return batch["input_ids" if isinstance(batch, Mapping) else 0]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(asked: Any, given: Any) -> bool:
    if not isinstance(asked, Tensor) or not isinstance(given, Tensor):
        return asked is given
    alike = (asked.shape, asked.dtype, asked.device) == (given.shape, given.dtype, given.device)
    return alike and torch.equal(asked, given)
