"""Snapshots of the global random generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """State of the global random generators of torch, numpy and Python.

    Example:
        >>> state = RandomState.now()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(3))
        True
    """

    states: tuple[tuple[Callable[[Any], object], Any], ...]  # a function that sets a state, and the state

    @classmethod
    def now(cls) -> RandomState:
        """A snapshot of the present state."""
        states: list[tuple[Callable[[Any], object], Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (np.random.set_state, np.random.get_state()),
            (random.setstate, random.getstate()),
        ]
        if _cuda_in_use():  # untested: no GPU was available
            states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        if torch.backends.mps.is_available():  # untested
            states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
        return cls(tuple(states))

    def restore(self) -> None:
        """Set every generator to this state."""
        for set_state, state in self.states:
            set_state(state)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators at the end, also on an exception.

    Example:
        >>> state = torch.get_rng_state()
        >>> with preserved_random_state():
        ...     _ = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


def seed_generators(seed: int) -> None:
    """Seed every global generator."""
    # Not by `torch.manual_seed`: where CUDA is not initialised it queues a seed, for the user's own generator later.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if _cuda_in_use():  # untested: no GPU was available
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():  # untested
        torch.mps.manual_seed(seed)


def next_numbers() -> list[Any]:
    """The next number of every global generator, which moves on by it.

    Of one on a GPU its state, which fixes the number: a draw would start every GPU, also those of other ranks.

    Example:
        >>> seed_generators(0)
        >>> first = next_numbers()
        >>> seed_generators(0)
        >>> first == next_numbers(), first == next_numbers()
        (True, False)
    """
    numbers: list[Any] = [float(torch.rand((), dtype=torch.float64)), float(np.random.random()), random.random()]
    if _cuda_in_use():  # untested: no GPU was available
        numbers += [state.tolist() for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():  # untested
        numbers.append(torch.mps.get_rng_state().tolist())
    return numbers


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # without asking for the driver, which takes longer than a small network
