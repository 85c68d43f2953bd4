"""Sums over ranks, and how all ranks learn from them that one has failed.

A rank that stopped at an exception of its own would leave the others waiting, for ever, in their next sum. So it keeps
the exception, goes on taking part in everything that communicates, and contributes NaN. All ranks then see NaN in the
same sum and come to the same end by the same path, without a word more; only there is the exception raised.
"""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]


class Agreement:
    """What the ranks of one run have in common.

    Args:
        all_sum: Sums a small float64 tensor over ranks. None if there is one process: it fails at once.

    Attributes:
        finite: Whether all sums were, so far. Equal on all ranks; once it is False the run is over.
    """

    def __init__(self, all_sum: AllSum | None = None) -> None:
        self.finite = True
        self._all_sum = all_sum
        self._failure: Exception | None = None

    @contextmanager
    def local(self) -> Iterator[None]:
        """Goes around whatever can fail on this rank alone. What comes behind it must do without what was inside."""
        try:
            yield
        except Exception as error:
            if self._all_sum is None:
                raise
            if self._failure is None:  # what fails later fails in consequence
                self._failure = error
            # The frames hold what filled the memory, which this rank still needs to keep up with the others.
            traceback.clear_frames(error.__traceback__)

    def sum(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, in float64; the result is on the CPU."""
        if local.device.type == "mps":  # has no float64
            local = local.cpu()
        local = local.to(torch.float64)
        if self._all_sum is not None:
            try:
                local = self._all_sum(local if self._failure is None else torch.full_like(local, math.nan))
            except Exception:
                self.settle()  # whatever has become of the others, this rank's own failure came first
                raise
        total = local.cpu()
        self.finite = self.finite and bool(torch.isfinite(total).all())
        return total

    def settle(self) -> None:
        """Raise what was kept, now that nobody waits for this rank any more."""
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # or it would be kept alive, and the basis with it, by its own traceback
