"""Two switches of cuDNN, each by itself.

`torch.backends.cudnn.flags` sets all that it knows, TF32 and the search for the fastest kernel among them, raises where
the old and the new interface for TF32 were mixed, and does not put all of it back. These touch one switch each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from lightning_subspace.state.joint import Joint


@contextmanager
def _off(name: str) -> Iterator[None]:
    """Set a switch to False, and put it back."""
    before = getattr(torch.backends.cudnn, name)
    try:
        setattr(torch.backends.cudnn, name, False)
        yield
    finally:
        setattr(torch.backends.cudnn, name, before)


# Its recurrent kernels have no second derivative.
without_cudnn = Joint(partial(_off, "enabled"))
# What the search for the fastest kernel finds is kept for the process: training would read what a probe has found.
without_search = Joint(partial(_off, "benchmark"))
