"""The global random generators, put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the generators of torch (CPU and every initialised accelerator), numpy and python, also on an exception.

    Example:
        >>> state = torch.get_rng_state()
        >>> with preserved_random_state():
        ...     _ = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    cpu, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)
        random.setstate(python)
        if cuda is not None:  # untested: no GPU was available
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:  # untested
            torch.mps.set_rng_state(mps)


def seed_generators(seed: int) -> None:
    """Seed every global generator.

    `torch.manual_seed` is not used: it also queues a seed for CUDA where CUDA has not been initialised, which would
    reach the user's own CUDA generator later.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    if _cuda_in_use():  # untested: no GPU was available
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():  # untested
        torch.mps.manual_seed(seed)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
