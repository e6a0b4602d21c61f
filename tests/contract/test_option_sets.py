"""Option sets drawn pairwise over the whole table, on two models: each step equals eager's, or the set is refused.

    HYPOTHESIS_PROFILE=long OPTION_SEED=1 pytest tests/contract/test_option_sets.py

draws OPTION_SETS of them, 200 if not given, for each of the two models; CI draws a few, always the same, that compile
nothing.
"""

from __future__ import annotations

import os
from itertools import islice

import option_sets
import pytest

LONG = os.environ.get("HYPOTHESIS_PROFILE", "ci") != "ci"
NUMBER = int(os.environ.get("OPTION_SETS", 200 if LONG else 5))
DRAWN = option_sets.option_sets(max(NUMBER, 40), int(os.environ.get("OPTION_SEED", 0)))
SETS = list(islice((drawn for drawn in DRAWN if LONG or drawn.get("inner", "eager") == "eager"), NUMBER))


@pytest.mark.parametrize("options", SETS, ids=range(len(SETS)))
@pytest.mark.parametrize("family", ["small", "llama"] if LONG else ["small"])
def test_a_step_equals_eagers_or_the_set_is_refused(family: str, options: dict) -> None:
    outcome = option_sets.check(option_sets.FAMILIES[family](), options)
    print(f"{family} {options}: {outcome}")


def test_few_sets_are_refused() -> None:
    """The draw is of little worth where most sets are illegal."""
    assert sum(map(option_sets.legal, SETS)) > len(SETS) / 2
