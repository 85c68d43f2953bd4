"""Sums over ranks, and failures on one rank that all see.

A rank that stopped at an exception of its own would leave the others waiting in their next sum. So it keeps the
exception, goes on communicating, and contributes NaN. All ranks see NaN in the same sum and come to the same end by the
same path, without another message; only there is the exception raised.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]


class Agreement:
    """Sums over the ranks of one run, and whether all were finite.

    `all_sum` sums a small float64 tensor over ranks. It is None if there is one process, which then fails at once.
    """

    def __init__(self, all_sum: AllSum | None = None) -> None:
        self.finite = True  # whether all sums were, so far: equal on all ranks; once it is False the run is over
        self._all_sum = all_sum
        self._failure: Exception | None = None

    @contextmanager
    def local(self) -> Iterator[None]:
        """Guard code that may fail on this rank; results may be missing."""
        try:
            yield
        except Exception as error:
            if self._all_sum is None:
                raise
            if self._failure is None:  # later failures are consequences of the first
                self._failure = error
            # The frames hold what filled the memory, which this rank still needs to keep up with the others.
            traceback.clear_frames(error.__traceback__)

    def sum(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, in float64 on the CPU."""
        return self.read(self.reduce(local))

    def reduce(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, in float64, unread.

        One that lies on a device is not waited for.
        """
        if local.device.type == "mps":  # has no float64
            local = local.cpu()
        local = local.to(torch.float64)
        if self._all_sum is not None:
            try:
                local = self._all_sum(local if self._failure is None else torch.full_like(local, math.nan))
            except Exception:
                self.settle()  # whatever has become of the others, this rank's own failure came first
                raise
        return local

    def read(self, *totals: Tensor) -> Tensor:  # (m,), ... to (sum of m,)
        """Sums of `reduce` on the CPU: the one wait for a device."""
        try:
            total = (totals[0] if len(totals) == 1 else torch.cat(totals)).cpu()
        except RuntimeError:  # no memory for it there, or one of them, of a failure, lies elsewhere
            total = torch.cat([each.cpu() for each in totals])
        self.finite = self.finite and bool(torch.isfinite(total).all())
        return total

    def settle(self) -> None:
        """Raise the exception that was kept: no rank waits any more."""
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # or its own traceback would keep it alive, and the basis with it
