"""Which rows the ranks of a distributed run select among in a step, with `selection_scope="global"`.

Rows travel by collectives within the step, which need batches of one form on every rank. So the hosts compare, before
each step, what theirs look like: where these differ, all ranks select among their own rows in that step, by the program
of the local scope. That takes a message round the hosts (`Hosts`), which wait for each other there; no device is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import torch

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir.program import Program
from cggr_compile.run.notices import notice
from cggr_compile.torch_internals.distributed import Hosts


class Offer(NamedTuple):
    """What a rank says of the step that comes: the rows of its batch and their length, how many of them it keeps, what
    its arguments look like (`form_of`), how many scores are given (-1: none), whether it has yet to compile for a
    schedule, and the options (`options_of`).
    """

    rows: int
    length: int
    kept: int
    form: int
    given: int
    unprepared: int
    options: int


class Together:
    """The scope of the steps of one model.

    Attributes:
        options: a number for the configuration.
        apart: whether the ranks' batches differ in the step that runs, so that each rank selects among its own rows.
        local_steps: how many such steps there were.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self.options = options_of(config)
        self.apart = False
        self.local_steps = 0
        self._hosts: Hosts | None = None

    def in_force(self, config: RoutingConfig) -> RoutingConfig:
        """The configuration with the scope that the step has."""
        return dataclasses.replace(config, selection_scope="local") if self.apart else config

    def compare(self, own: Offer) -> None:
        """Decides the scope of the step that comes, the same on all ranks.

        Raises:
            CannotOptimize: the ranks have other options, or their schedules have come to different steps.
            RuntimeError: a rank does not come to this step.
        """
        try:
            if self._hosts is None or not self._hosts.are_current:
                self._hosts = Hosts()
            least, most = (Offer(*numbers) for numbers in self._hosts.extremes(own))
        except RuntimeError as error:
            raise RuntimeError(
                "selection_scope='global': not every rank came to this step. Each must train in the same calls: one "
                "whose batch has no labels, which raised an error or has fewer batches leaves the others waiting"
            ) from error
        if least.options != most.options:
            raise CannotOptimize(
                "selection_scope='global': the ranks have other options, and would select by other rules",
                hint="give all ranks the same options (seed may differ)",
            )
        if least.rows == most.rows and least.kept != most.kept:
            raise CannotOptimize(
                f"selection_scope='global': of {own.rows} rows one rank keeps {least.kept}, another {most.kept}",
                hint="give all ranks the same options, count optimiser steps on each (cggr.attach, CGGRCallback), and "
                "load the handle's state on each or on none",
            )
        self.apart = least != most
        if self.apart:
            self._count(least, most)

    def _count(self, least: Offer, most: Offer) -> None:
        self.local_steps += 1
        if self.local_steps == 1:
            differs = next(words for name, words in _IN_WORDS.items() if getattr(least, name) != getattr(most, name))
            notice(
                f"the ranks differ in {differs}, so each selects among its own rows in such steps; the metric "
                "steps_selected_locally counts them"
            )


_IN_WORDS = {
    "rows": "the rows of their batches",
    "length": "the length of their rows",
    "form": "the names, dtypes or shapes of their arguments",
    "given": "whether scores are given (use_scores)",
    "unprepared": "whether this step is captured anew",
}


def options_of(config: RoutingConfig) -> int:
    """A number for all options but the seed; it is the same in other processes."""
    options = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name != "seed"}
    rule = options["selection"]
    return crc32(repr({**options, "selection": getattr(rule, "__qualname__", rule)}).encode())


def form_of(program: Program, inputs: Sequence[object]) -> int:
    """A number for the names, dtypes and shapes of a call's tensors; it is the same in other processes.

    Raises:
        CannotOptimize: one of them has a gradient, which the rank that it is of would not get.
    """
    told = []
    for entry, x in zip(program.inputs, inputs, strict=False):
        if entry.kind != "batch" or not isinstance(x, torch.Tensor):
            continue
        if x.requires_grad and x.dim() > 0:
            raise CannotOptimize(
                f"selection_scope='global' sends rows to other ranks, and {entry.path} requires a gradient, which its "
                "own rank would not get",
                hint="detach it, or use selection_scope='local'",
            )
        told.append((entry.path, str(x.dtype), tuple(x.shape)))
    return crc32(repr(sorted(told)).encode())
