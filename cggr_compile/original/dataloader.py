"""The original CGGR's data loaders: a tiny router that scores batches on the CPU, and easy batches left out.

`cggr_compile.FilteredLoader` chooses rows instead of whole batches and resumes; these keep the original's call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from cggr_compile.data.prefetch import prefetched
from cggr_compile.original.loss import counted_positions
from cggr_compile.original.router import checked_module


class NanoRouter(nn.Module):
    """An embedding and two linear layers that guess how hard sequences are.

    `router(input_ids, attention_mask=None)` takes ids [B, S] and a mask [B, S] and returns float32 [B] in [0, 1], the
    mean over the unmasked tokens, 0 where there are none.

    Args:
        vocab_size: rows of a random embedding.
        hidden_dim: width of the embedding.
        pretrained_embeddings: [V, D], in place of a random embedding: a frozen float32 copy, on the CPU, of the first
            `hidden_dim` columns, or of all where there are fewer.
    """

    def __init__(
        self, vocab_size: int = 32000, hidden_dim: int = 64, pretrained_embeddings: Tensor | None = None
    ) -> None:
        super().__init__()
        if pretrained_embeddings is None:
            self.embed = nn.Embedding(vocab_size, hidden_dim)
        else:
            columns = pretrained_embeddings.detach()[:, :hidden_dim]
            copied = torch.empty(columns.shape, dtype=torch.float32, device="cpu").copy_(columns)
            self.embed = nn.Embedding.from_pretrained(copied, freeze=True)
        width = self.embed.embedding_dim
        between = max(1, width // 2)
        self.difficulty_head = nn.Sequential(nn.Linear(width, between), nn.ReLU(), nn.Linear(between, 1), nn.Sigmoid())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """float32 [B]."""
        return _mean_of_rows(self.difficulty_head(self.embed(input_ids)).squeeze(-1), input_ids, attention_mask)

    @classmethod
    def from_model(cls, model: nn.Module, hidden_dim: int = 64) -> NanoRouter:
        """A router on the model's input embeddings: those of `get_input_embeddings()`, or its only `nn.Embedding`.

        Raises ValueError for a model that has several, or none.
        """
        if hasattr(model, "get_input_embeddings"):
            found = [model.get_input_embeddings()]
        else:
            found = [module for module in checked_module("model", model).modules() if isinstance(module, nn.Embedding)]
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__} has {len(found)} embeddings and no get_input_embeddings(); "
                "use NanoRouter(pretrained_embeddings=…)"
            )
        return cls(hidden_dim=hidden_dim, pretrained_embeddings=found[0].weight)

    def calibrate(
        self,
        dataloader: Iterable[Any],
        full_scorer: Callable[[Tensor], tuple[Tensor, Any, Any]],
        num_batches: int = 100,
        lr: float = 1e-3,
    ) -> None:
        """Trains the head towards a full scorer's difficulty: one step of Adam on the squared error for each batch.

        `full_scorer(input_ids)` is called with the batch's ids and returns a tuple that starts with difficulties
        [B, S] or [B · S]; their mean over a sequence, at least 0, divided by the largest of all batches where that is
        above 1, is what the sigmoid learns. Batches are mappings with `"input_ids"` and, if they are padded,
        `"attention_mask"`, sequences that start with the ids, or the ids. Ends in evaluation mode. Raises ValueError
        for a loader that gives no batch.
        """
        seen = []
        with torch.no_grad():
            for batch in islice(dataloader, num_batches):
                ids, mask = _ids_and_mask(batch, "input_ids")
                difficulty = full_scorer(ids)[0].reshape(ids.shape).float()
                seen.append((ids.cpu(), mask, _mean_of_rows(difficulty, ids, mask).clamp(min=0).cpu()))
        if not seen:
            raise ValueError("dataloader gave no batch to calibrate with")
        scale = max(1.0, *(target.max().item() for *_, target in seen))
        optimizer = torch.optim.Adam(self.difficulty_head.parameters(), lr=lr)
        self.train()
        for ids, mask, target in seen:
            optimizer.zero_grad()
            nn.functional.mse_loss(self(ids, mask), target / scale).backward()
            optimizer.step()
        self.eval()


class DifficultyFilteredDataLoader:
    """The batches of a loader without the easy ones: those of a mean difficulty below `threshold`.

    `nano_router(input_ids)` scores on the CPU and is put into evaluation mode; a `NanoRouter` is also told the
    `"attention_mask"` of a mapping. Batches are mappings with `input_key`, sequences that start with the ids, or the
    ids. At no point of an epoch has more than the share `skip_ratio`, in [0, 1], been skipped. `len()` is that of
    `dataloader`, which is at least the number that comes. Raises ValueError for a `skip_ratio` out of range.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        nano_router: nn.Module,
        threshold: float = 0.3,
        input_key: str = "input_ids",
        skip_ratio: float = 0.5,
    ) -> None:
        if not 0 <= skip_ratio <= 1:
            raise ValueError(f"skip_ratio is {skip_ratio}, expected in [0, 1]")
        self.dataloader = dataloader
        self.nano_router = checked_module("nano_router", nano_router).eval()
        self.threshold = threshold
        self.input_key = input_key
        self.skip_ratio = skip_ratio
        self.total_batches = 0
        self.skipped_batches = 0

    def __iter__(self) -> Iterator[Any]:
        return self._hard()

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]

    def get_stats(self) -> dict[str, Any]:
        """total_batches, skipped_batches and skip_rate of the epoch so far, threshold."""
        return {
            "total_batches": self.total_batches,
            "skipped_batches": self.skipped_batches,
            "skip_rate": self.skipped_batches / max(1, self.total_batches),
            "threshold": self.threshold,
        }

    def _hard(self) -> Generator[Any, None, None]:
        self.total_batches = self.skipped_batches = 0
        for batch in self.dataloader:
            self.total_batches += 1
            easy = self._difficulty(batch) < self.threshold
            if easy and self.skipped_batches + 1 <= self.skip_ratio * self.total_batches:
                self.skipped_batches += 1
            else:
                yield batch

    def _difficulty(self, batch: Any) -> float:
        ids, mask = _ids_and_mask(batch, self.input_key)
        with torch.no_grad():
            if isinstance(self.nano_router, NanoRouter):
                return self.nano_router(ids.cpu(), mask).mean().item()
            return self.nano_router(ids.cpu()).mean().item()


class AsyncDifficultyFilteredDataLoader(DifficultyFilteredDataLoader):
    """`DifficultyFilteredDataLoader` in a thread that is up to `queue_size` batches ahead, and may skip every batch.

    What the thread raises is raised in the loop. `stop()` ends the iteration and its thread, as `break` does.
    `get_stats()` counts what the thread has seen. Raises ValueError for a `queue_size` below 1.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        nano_router: nn.Module,
        threshold: float = 0.3,
        queue_size: int = 4,
        input_key: str = "input_ids",
    ) -> None:
        super().__init__(dataloader, nano_router, threshold, input_key, skip_ratio=1.0)
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}, expected at least 1")
        self.queue_size = queue_size
        self._running: Callable[[], Generator[Any, None, None] | None] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        batches = prefetched(self._hard(), self.queue_size)
        # Weakly, so that a loop that ends early drops them.
        self._running = weakref.ref(batches)
        return batches

    def stop(self) -> None:
        """Ends the iteration; call it in the loop's own thread."""
        batches = self._running()
        if batches is not None:
            batches.close()


def _ids_and_mask(batch: Any, key: str) -> tuple[Tensor, Tensor | None]:
    """A batch's ids and, on the CPU, its mask."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        return batch[key], None if mask is None else mask.cpu()
    return (batch[0] if isinstance(batch, (tuple, list)) else batch), None


def _mean_of_rows(values: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B]: the mean of values [B, S] over the unmasked tokens."""
    counted = counted_positions(input_ids, None, attention_mask).to(values.device)
    return torch.where(counted, values, 0.0).sum(1) / counted.sum(1).clamp(min=1)
