"""Whatever is done to a model between two steps, the next one equals eager on what was selected, or is refused.

    HYPOTHESIS_PROFILE=fuzz ACTION_SEQUENCES=125 pytest tests/contract/test_actions.py --hypothesis-seed=1

draws 125 sequences of actions; CI draws a few, always the same.
"""

from __future__ import annotations

import os
from typing import Any

import actions
import torch
from hypothesis import event, given, note, settings

EXAMPLES = int(os.environ.get("ACTION_SEQUENCES", 2 if os.environ.get("HYPOTHESIS_PROFILE", "ci") == "ci" else 125))


@settings(max_examples=EXAMPLES)
@given(drawn=actions.sequences())
def test_no_third_outcome(drawn: tuple[dict[str, Any], list[tuple[str, Any]]]) -> None:
    options, sequence = drawn
    torch._dynamo.reset()
    note(f"{options}")
    world = actions.World(options)
    event(f"at first: {actions.check(world)}")
    for name, argument in sequence:
        note(f"{name} {argument}")
        actions.perform(world, name, argument)
        event(f"{name}: {actions.check(world)}")
