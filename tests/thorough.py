"""How much of what is drawn at random, or is a combination of several things, is run: a part, or all of it.

`SUBSPACE_TESTS=thorough` in the environment asks for all; see the README beside this file. What is run otherwise is the
same in every run.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

IS_THOROUGH = os.environ.get("SUBSPACE_TESTS") == "thorough"


def how_many(usual: int, thorough: int) -> int:
    """How many examples are drawn."""
    return thorough if IS_THOROUGH else usual


def usual(cases: Sequence[Any], *, thorough: Sequence[Any]) -> list[Any]:
    """Cases that are run, and those that are run beside them if all are asked for."""
    return [*cases, *(thorough if IS_THOROUGH else ())]


def covering(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of a value of each factor: all, or so many that every value occurs, each about as often.

    Example:
        >>> list(zip("abc", "121", "xyx")) == covering("abc", "12", "xy") or IS_THOROUGH
        True
    """
    if IS_THOROUGH:
        return list(itertools.product(*factors))
    count = max(map(len, factors))
    return [tuple(factor[i % len(factor)] for factor in factors) for i in range(count)]
