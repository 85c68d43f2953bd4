"""How much of what is drawn at random, or is a combination of several things, is run: a part, or all of it.

`SUBSPACE_TESTS=thorough` in the environment asks for all; see the README beside this file. What is run otherwise is the
same in every run.
"""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

IS_THOROUGH = os.environ.get("SUBSPACE_TESTS") == "thorough"


def how_many(usual: int, thorough: int) -> int:
    """How many examples are drawn."""
    return thorough if IS_THOROUGH else usual


def covering(*factors: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Combinations of a value of each factor: all, or enough for every `strength` values to meet.

    With 1, every value of every factor is there; with 2, every pair of values of two factors, and so on.

    Example:
        >>> covering("ab", "12", "xy", strength=1)
        [('a', '1', 'x'), ('b', '2', 'y')]
        >>> len(covering("ab", "12", "xy"))
        4
    """
    combinations = list(itertools.product(*(range(len(factor)) for factor in factors)))

    def parts(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), strength))

    chosen = combinations if IS_THOROUGH else []
    left = set().union(*map(parts, combinations)) if not chosen else set()
    used = Counter[tuple[int, int]]()

    def worth(combination: tuple[int, ...]) -> tuple[int, int]:
        return len(parts(combination) & left), -sum(used[value] for value in enumerate(combination))

    while left:  # greedy: the one with most that is new, of values that were used least
        chosen.append(max(combinations, key=worth))
        left -= parts(chosen[-1])
        used.update(enumerate(chosen[-1]))
    return [tuple(factor[i] for factor, i in zip(factors, one, strict=True)) for one in sorted(chosen)]
