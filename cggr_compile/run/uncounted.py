"""Training calls that no counted optimiser step comes between, so that a schedule stands still."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

UNCOUNTED = 100
"""Calls without a counted step that are worth a look where steps were counted before, or a warning where none was."""


class Uncounted:
    """Counts the calls since a step was counted, and sees whether an optimiser stepped meanwhile: parameters were
    written to, or, since fused ones leave no trace on them, a hook of torch's on all optimisers said so. Both cost
    something, so they are looked at only before the first counted step, and behind UNCOUNTED calls without one."""

    def __init__(self) -> None:
        self._steps: int | None = None
        self._calls = 0
        self._began = False
        self._version: int | None = None
        self._watch: Callable[[], object] | None = None
        self._stepped = False

    def warning(self, steps: int, expected: bool, trained: Callable[[], Sequence[Tensor]]) -> str | None:
        """What to warn of at a training call, None where nothing is wrong.

        Args:
            steps: how many optimiser steps have been counted.
            expected: whether somebody said that they will be (`attach`).
            trained: gives the parameters that train.
        """
        if self._steps not in (None, steps):
            self._began, self._calls = True, 0
            self.stop()
        self._steps = steps
        self._calls += 1
        began = self._began or expected
        if began and self._calls <= UNCOUNTED:
            return None
        parameters = trained()
        before, self._version = self._version, sum(x._version for x in parameters if not x.is_inference())
        if self._watch is None:
            self._watch_optimizers(parameters)
        if not (self._stepped or before not in (None, self._version) or (not began and self._calls >= UNCOUNTED)):
            return None
        since = "since the last optimiser step that was counted"
        none = since if self._began else "and no optimiser step has been counted"
        return (
            f"{self._calls} training calls {none}; the schedule stands still until one is: call cggr.attach(model, "
            "optimizer) with the optimizer whose step() runs, or use CGGRCallback or cggr.route with a Trainer"
        )

    def stop(self) -> None:
        """Looks no further, until it is asked again."""
        if self._watch is not None:
            self._watch()
        self._version, self._watch, self._stepped = None, None, False

    def _watch_optimizers(self, trained: Sequence[Tensor]) -> None:
        own, watching = WeakIdKeyDictionary(dict.fromkeys(trained)), weakref.ref(self)

        def note(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            found = watching()
            if found is not None and any(x in own for group in optimizer.param_groups for x in group["params"]):
                found._stepped = True

        self._watch = weakref.finalize(self, register_optimizer_step_post_hook(note).remove)
