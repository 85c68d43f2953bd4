"""Snapshots of the global random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the global generators of torch (CPU and every initialised accelerator), numpy and Python.

    Example:
        >>> state = RandomState.now()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(3))
        True
    """

    cpu: Tensor
    legacy: Any
    python: Any
    cuda: list[Tensor] | None
    mps: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """A snapshot of the present state."""
        return cls(
            torch.get_rng_state(),
            np.random.get_state(),
            random.getstate(),
            torch.cuda.get_rng_state_all() if _cuda_in_use() else None,
            torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        )

    def restore(self) -> None:
        """Set every generator to this state."""
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.legacy)
        random.setstate(self.python)
        if self.cuda is not None:  # untested: no GPU was available
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:  # untested
            torch.mps.set_rng_state(self.mps)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators at the end of the block, also on an exception.

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


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
