"""Which padded batches train on their real tokens alone, and where these are.

How many tokens are real decides the sizes of a step, so the host has to know before it starts one: two numbers are read
back. Where the batch before was not worth it, nothing waits: a batch's numbers are read in the step that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ir.program import Analysed
from cggr_compile.ir.roles import PADDING, token_argument
from cggr_compile.passes.rewrite.shared import own_labels
from cggr_compile.run.arriving import Arriving

RUNGS = 32
"""A step is of a multiple of at most this part of the batch, so that code and CUDA graphs serve many batches."""
MOST = 0.9
"""The share of a batch up to which `unpad="auto"` leaves padding out."""


class Unpadding:
    """Reads the attention mask [B, S] and the labels [B, S] among the inputs of an analysed program.

    Up to the share `most` of a batch padding is left out. With `behind` all of it has to be behind the tokens.
    """

    def __init__(self, program: Analysed, most: float, behind: bool) -> None:
        padding = token_argument(program, PADDING)
        assert padding is not None
        labels = own_labels(program, [padding])
        inputs = program.placeholders
        self._padding, self._labels = inputs.index(padding), inputs.index(labels)
        self._shift, self._ignored = program.head.shift, program.head.ignore_index
        self._most = most
        self._behind = behind
        self._before: tuple[Arriving, int] | None = None
        self.last: tuple[int, int] | None = None
        self._why = ""  # of the last batch that was read and trained as it is

    def added(self, inputs: Sequence[Any]) -> Tensor | None:
        """Where the real tokens of a batch are, flattened, then some padding up to a rung: int64 [T]. None where there
        is too little padding, or it has or predicts a label or is between tokens."""
        mask = inputs[self._padding] != 0
        before, self._before = self._before, (Arriving(self._figures(mask, inputs[self._labels])), mask.numel())
        found = None
        if before is None or self._tokens(*before) is not None:
            found = self._tokens(*self._before)
        self.last = (mask.numel() if found is None else found, mask.numel())
        return None if found is None else torch.argsort(mask.flatten().logical_not(), stable=True)[:found]

    def __str__(self) -> str:
        if self.last is None:
            return "no step yet"
        done, places = self.last
        return f"the last step computed {done} of {places} places" + (f" ({self._why})" if done == places else "")

    def _figures(self, mask: Tensor, labels: Tensor) -> Tensor:
        """How many tokens are real, and how many things are wrong with the padding."""
        length = mask.shape[1]
        predicted = labels[:, self._shift :] != self._ignored
        # A label at padding would be read where the next row begins, and the model may hide it by its place.
        predicting = predicted & ~(mask[:, : length - self._shift] & mask[:, self._shift :])
        begins = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        wrong = predicting.sum() + (begins > 1).sum()
        return torch.stack([mask.sum(), wrong + (~mask[:, 0]).sum() if self._behind else wrong])

    def _tokens(self, figures: Arriving, places: int) -> int | None:
        real, wrong = figures.there().tolist()
        rung = 1 << max(1, places // RUNGS).bit_length() - 1  # a power of two: batches of other lengths share them
        # One more than the real ones: what the last of them predicts is ignored there.
        tokens = -(-(real + 1) // rung) * rung
        if wrong:
            self._why = "padding has or predicts labels, which are to be ignored, or is between tokens"
        elif tokens > self._most * places or tokens >= places:
            self._why = "too little padding"
        else:
            return tokens
        return None
