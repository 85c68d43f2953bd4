"""What is wanted of the eigensolver, and when it is reached."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.linalg.selection import Which

_COPY_MARGIN = 0.03  # in units of scale
# Looser ones are passed before all wanted pairs have appeared; for Hessians of trained networks 1e-2 often is.
_PLAIN_TOL = 1e-3
_SMALLEST = 0.02  # in units of scale: eigenvalues below count as this large in the relative test


@dataclass(frozen=True)
class Rules:
    """What is wanted, how well, and at what cost: the arguments of `eigsh` once they are checked."""

    k: int
    which: Which
    tol: float
    tightest: float
    subspace_tol: float | None
    ncv: int
    max_matvecs: int
    verify: bool
    delta: float
    dimension: int
    max_asymmetry: float

    @property
    def patience(self) -> int:
        """Matvecs without progress after which a search has stagnated."""
        return max(100, 5 * self.k)

    @property
    def space_patience(self) -> int:
        """Matvecs without progress after which `subspace_tol` is not insisted on.

        A residual that has passed ``tol`` and falls no more often waits for a pair that was missed, and a small basis
        may wait long: the fresh direction of a verification finds it sooner.
        """
        return self.patience // 4

    @property
    def passes_needed(self) -> int:
        """Consecutive matvecs that have to pass the test."""
        return 1 if self.tol <= _PLAIN_TOL else 2

    def thresholds(self, wanted: Tensor, gap: float, scale: float) -> Tensor:
        """The largest residuals at which the wanted pairs pass, shape ``(k,)``. ``gap`` is NaN while it is unknown."""
        allowed = self.tol * scale
        if self.subspace_tol is not None:
            for_space = 0.0 if math.isnan(gap) else self.subspace_tol * gap
            allowed = min(max(for_space, self.tightest * scale), allowed)
        if self.tol <= _PLAIN_TOL:
            return torch.full_like(wanted, allowed)
        return (self.tol * wanted.abs().clamp(min=_SMALLEST * scale)).clamp(max=allowed)

    def copy_margin(self, scale: float) -> float:
        """How much better than the last wanted eigenvalue a missed copy has to be, to be looked for."""
        return max(self.tol, _COPY_MARGIN) * scale
