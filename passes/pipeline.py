"""Runs passes in order, verifying after each.

The runner knows nothing about any pass: a pass is a function of (program, config), and which ones make up a route is
decided here, once, from the configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import cggr_compile.kernels.op  # noqa: F401  registers torch.ops.cggr
import torch
from cggr_compile.kernels.reference.selection import rule_of
from cggr_compile.passes.analyse.find_layers import find_layers
from cggr_compile.passes.analyse.find_loss import find_loss
from cggr_compile.passes.lower.lower_kernels import lower_kernels
from cggr_compile.passes.lower.unshard_parameters import unshard_parameters
from cggr_compile.passes.rewrite.attend_documents import attend_documents
from cggr_compile.passes.rewrite.build_router import build_router
from cggr_compile.passes.rewrite.check_labels import check_labels
from cggr_compile.passes.rewrite.elide_causal_masks import elide_causal_masks
from cggr_compile.passes.rewrite.fuse_experts import fuse_experts
from cggr_compile.passes.rewrite.gather_documents import gather_documents
from cggr_compile.passes.rewrite.gather_rows import gather_rows
from cggr_compile.passes.rewrite.gather_tokens import gather_tokens
from cggr_compile.passes.rewrite.join_head import join_head
from cggr_compile.passes.rewrite.join_loss import join_loss
from cggr_compile.passes.rewrite.keep_scores import keep_scores
from cggr_compile.passes.rewrite.mask_loss import mask_loss
from cggr_compile.passes.rewrite.quantize_linears import quantize_linears
from cggr_compile.passes.rewrite.score_rows import score_rows
from cggr_compile.passes.rewrite.select_documents import select_documents
from cggr_compile.passes.rewrite.select_loss import select_loss
from cggr_compile.passes.rewrite.select_rows import select_rows
from cggr_compile.passes.rewrite.select_tokens import select_tokens
from cggr_compile.passes.rewrite.separate_documents import separate_documents
from cggr_compile.passes.rewrite.skip_experts import skip_experts
from cggr_compile.passes.rewrite.take_scores import take_scores
from cggr_compile.passes.rewrite.truncate_layers import truncate_layers
from cggr_compile.passes.rewrite.unpad_rows import unpad_rows
from cggr_compile.passes.verify import verify

from cggr_compile.config import RoutingConfig
from cggr_compile.ir.program import Analysed, Program, Snapshot

P = TypeVar("P", bound=Program)
Q = TypeVar("Q", bound=Program)
Pass = Callable[[Analysed, RoutingConfig], Analysed]

# The loss's rows are selected behind the sequences: they are rows of what is left of the batch.
ROUTES: dict[str, tuple[Pass, ...]] = {
    "sequence": (select_rows, gather_rows),
    "token": (select_tokens, gather_tokens),
    "loss": (select_loss,),
    "segment": (select_documents, gather_documents),
}

OPTIONAL = (join_loss, join_head, elide_causal_masks, fuse_experts)
"""Passes that `disable_passes` may name."""


def analyse(captured: Program, config: RoutingConfig) -> Analysed:
    """What is found in a capture once, whatever is made of it; raises as `run`."""
    program = captured
    for join in (join_loss, join_head):
        if join.__name__ not in config.disable_passes:
            program = _applied(join, program, config)
    found = _applied(find_loss, program, config)
    if elide_causal_masks.__name__ not in config.disable_passes:
        found = _applied(elide_causal_masks, found, config)
    return _applied(find_layers, found, config)


def truncated(analysed: Analysed, config: RoutingConfig, layers: int) -> Analysed:
    """The step of the first `layers` layers alone; raises as `run`."""
    return _applied(truncate_layers, analysed, dataclasses.replace(config, depth_layers=layers, depth_until=None))


def _chosen(config: RoutingConfig, *behind_fusing: Pass) -> tuple[Pass, ...]:
    """Fusing and quantising before lowering: what an implementation is chosen for must exist as one operator."""
    fp8 = (quantize_linears,) if "fp8" in (config.router_body, config.matmul) else ()
    return (fuse_experts, *behind_fusing, *fp8, lower_kernels)


_SCORING: tuple[Pass, ...] = (build_router, score_rows)


def passes_scores(config: RoutingConfig) -> tuple[Pass, ...]:
    """The passes of the rows' scores alone: what `Handle.score` gives, and the router by itself."""
    return (check_labels, *_SCORING, keep_scores, *_chosen(config))


def passes_unrouted(config: RoutingConfig) -> tuple[Pass, ...]:
    """The passes of a step on everything."""
    return (check_labels, mask_loss, *_chosen(config))


def passes_unpadded(config: RoutingConfig, padded: bool) -> tuple[Pass, ...]:
    """The passes of a step on the real tokens of a padded batch, or of one within the documents of a packed one."""
    return (unpad_rows if padded else attend_documents, *passes_unrouted(config))


def passes_for(config: RoutingConfig, scores_given: bool = False) -> tuple[Pass, ...]:
    """The passes of the configured route, after the analysis; the scores of its rows are an input if `scores_given`."""
    # In front of the scores, which are of what the documents themselves predict.
    passes: list[Pass] = [separate_documents, check_labels] if "segment" in config.routes else [check_labels]
    if scores_given:
        passes.append(take_scores)
    elif rule_of(config.selection).needs_scores:
        passes += _SCORING
    skips = config.skip == "experts"
    for route in config.routes:
        passes += [select_tokens] if skips and route == "token" else ROUTES[route]
    behind_fusing = (skip_experts,) if skips else ()  # the operator is what takes a mask
    return (*passes, mask_loss, *_chosen(config, *behind_fusing))


def routable(program: Program, config: RoutingConfig) -> bool:
    """Whether the captured batch leaves anything to choose from: a single row leaves no rows."""
    return isinstance(program.batch, torch.SymInt) or "sequence" not in config.routes


def keeps_less(config: RoutingConfig) -> bool:
    """Whether steps keep less than everything, once a warm-up is over."""
    return bool(config.routes) and config.ratio < 1


def run(program: Analysed, config: RoutingConfig, passes: Sequence[Pass]) -> Analysed:
    """Applies the passes but for disabled ones, and `unshard_parameters` behind them where parameters are sharded;
    every one leaves a snapshot under its name.

    Raises:
        CannotOptimize: a pass found the model or the batch impossible to route.
        VerificationError: a pass broke an invariant.
    """
    sharded: tuple[Pass, ...] = (unshard_parameters,) if program.shards else ()
    for pass_ in (*passes, *sharded):
        if pass_.__name__ not in config.disable_passes:
            program = _applied(pass_, program, config)
    return program


def _applied(pass_: Callable[[P, RoutingConfig], Q], before: P, config: RoutingConfig) -> Q:
    program = pass_(before, config)
    if program.graph is before.graph:  # an analysis: roles were found, nothing was rewritten
        snapshot = Snapshot(pass_.__name__, program.graph)
        program = dataclasses.replace(program, snapshots=(*program.snapshots, snapshot))
    verify(before, program, pass_.__name__)
    return program
