"""Which head the router scores with, and what it costs. A sample as large as the vocabulary is the exact head."""

from __future__ import annotations

from cggr_compile.config import RoutingConfig


def effective_head(config: RoutingConfig, vocabulary: int) -> str:
    """`config.router_head`, or `"exact"` where a sample would have all columns anyway."""
    sampled = config.router_head_frequent + config.router_head_sampled
    return "exact" if config.router_head == "sampled" and sampled >= vocabulary else config.router_head


def describe(config: RoutingConfig, vocabulary: int) -> str:
    """The head in words, e.g. `sampled head (1024 frequent + 1024 drawn of 49152 columns)`."""
    head = effective_head(config, vocabulary)
    if head == "sampled":
        frequent, sampled = config.router_head_frequent, config.router_head_sampled
        return f"sampled head ({frequent} frequent + {sampled} drawn of {vocabulary} columns)"
    return f"{head} head"


def cost_factor(config: RoutingConfig, vocabulary: int) -> float:
    """κ: multiply-adds of the head over those of the exact one.

    fp8 multiplies as often as the exact head, in a format that hardware may multiply faster.
    """
    if effective_head(config, vocabulary) == "sampled":
        return (config.router_head_frequent + config.router_head_sampled + 1) / vocabulary
    return 1.0
