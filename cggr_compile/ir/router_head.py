"""Which head the router scores with, what it costs, and what it keeps from step to step.

A cheap head that would read everything (a sample as large as the vocabulary, a rank as large as the width) is the
exact one.
"""

from __future__ import annotations

from typing import Any

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.kernels.reference.router_heads import refreshed


def effective_head(config: RoutingConfig, vocabulary: int, width: int) -> str:
    """`config.router_head`, or `"exact"` where that one would read the whole of a [V, D] head anyway."""
    reads_all = {
        "sampled": config.router_head_frequent + config.router_head_sampled >= vocabulary,
        "low_rank": config.router_head_rank >= width,
    }
    return "exact" if reads_all.get(config.router_head, False) else config.router_head


def describe(config: RoutingConfig, vocabulary: int, width: int) -> str:
    """The head in words, e.g. `sampled head (1024 frequent + 1024 drawn of 49152 columns)`."""
    head = effective_head(config, vocabulary, width)
    if head == "sampled":
        frequent, sampled = config.router_head_frequent, config.router_head_sampled
        return f"sampled head ({frequent} frequent + {sampled} drawn of {vocabulary} columns)"
    if head == "low_rank":
        return (
            f"low-rank head (rank {config.router_head_rank} of {width}, "
            f"refreshed every {config.router_head_refresh} steps)"
        )
    return f"{head} head"


def cost_factor(config: RoutingConfig, rows: int, vocabulary: int, width: int) -> float:
    """κ: multiply-adds of the head over those of the exact one, N·V·D; N = `rows`, V = `vocabulary`, D = `width`.

    Sampled: N·(C + 1)·D. Low rank: N·R·D and V·R·D for the projections, N·V·R for the logits, N·D for the targets'
    own, and V·R·D + 2·N·R·D for the image. fp8 multiplies as often as the exact head, in a format that hardware may
    multiply faster.
    """
    head = effective_head(config, vocabulary, width)
    if head == "sampled":
        return (config.router_head_frequent + config.router_head_sampled + 1) / vocabulary
    if head == "low_rank":
        rank = config.router_head_rank
        return rank / width + 3 * rank / vocabulary + 2 * rank / max(rows, 1) + 1 / vocabulary
    return 1.0


class Basis:
    """The low-rank head's directions, orthonormal float32 [D, R], and when they are refreshed.

    They start at random and are refreshed after 1, 2, 4, 8, … updates until the gap reaches `period`, then after every
    `period`. Everything stays on the device; nothing is read back.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self.updates = 0
        self.due = 1
        self.directions: torch.Tensor | None = None

    def on(self, width: int, rank: int, generator: torch.Generator) -> torch.Tensor:
        """The directions on the generator's device, drawn from it where there are none of this shape."""
        if self.directions is None or self.directions.shape != (width, rank):
            drawn = torch.randn(width, rank, dtype=torch.float32, device=generator.device, generator=generator)
            self.directions = torch.linalg.qr(drawn).Q
            self.updates, self.due = 0, 1
        self.directions = self.directions.to(generator.device)
        return self.directions

    def state_dict(self) -> dict[str, torch.Tensor | int | None]:
        """Directions and counters."""
        return {"updates": self.updates, "due": self.due, "directions": self.directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.updates, self.due, self.directions = state["updates"], state["due"], state["directions"]

    def update(self, image: torch.Tensor) -> None:
        """Counts one scored step and refreshes from its image (`low_rank_score`) where one is due."""
        assert self.directions is not None
        self.updates += 1
        if self.updates == self.due:
            self.directions = refreshed(image, self.directions)
            self.due += min(self.due, self.period)
