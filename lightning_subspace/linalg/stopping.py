"""Stopping criteria, on numbers that are equal on all ranks.

`Rules` are fixed for a run, `Progress` is what is remembered between matvecs, and `decide` is a pure function of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_subspace.linalg.result import Outcome
from lightning_subspace.linalg.selection import Ritz, Which

_COARSE = 0.03  # in units of scale: copies that lie farther beyond the last wanted value change much
VALUE_ERROR = 0.05  # the largest residual, relative to an eigenvalue, at which anything is known of it
_FLOOR = 1e-3  # in units of tol * scale
CLAIMED_ERROR = 0.1  # the largest residual / gap at which an eigenspace is claimed
# Products that a verification may spend on what is close to the last wanted value: so many, or this share of those
# before. With fewer, tests/benchmarks/certificate.py gave up spaces that had a gap.
_LEAST_ALLOWANCE, _ALLOWED_SHARE = 20, 1.0
# A looser test is passed before all wanted pairs have appeared; for Hessians of trained networks 1e-2 often is.
_PLAIN_TOL = 1e-3
_SMALLEST = 0.02  # in units of scale: eigenvalues below count as this large in the relative test


@dataclass(frozen=True)
class Rules:
    """The checked arguments of `eigsh`, and thresholds that follow from them."""

    k: int
    which: Which
    tol: float
    tightest: float  # smallest residual that `subspace_tol` may ask for, relative to scale
    subspace_tol: float | None
    ncv: int
    max_matvecs: int
    verify: bool
    delta: float
    dimension: int
    max_asymmetry: float
    rounding: float = 0.0  # residuals below this, relative to scale, mean nothing

    @property
    def patience(self) -> int:
        """Matvecs without progress after which a search has stagnated."""
        return max(100, 5 * self.k)

    @property
    def num_kept(self) -> int:
        """Ritz vectors that a thick restart keeps."""
        return self.k + (self.ncv - self.k) // 3

    def thresholds(self, wanted: Tensor, gap: float, scale: float) -> Tensor:  # (k,) -> (k,)
        """The largest residuals at which the wanted pairs pass.

        The `gap` behind them is NaN while it is unknown, and infinity to ask for `tol` alone.
        """
        allowed = self.tol * scale
        if self.subspace_tol is not None:
            for_space = 0.0 if math.isnan(gap) else self.subspace_tol * gap
            allowed = min(max(for_space, self.tightest * scale), allowed)
        thresholds = torch.full_like(wanted, allowed)
        if self.tol > _PLAIN_TOL:
            thresholds = (self.tol * wanted.abs().clamp(min=_SMALLEST * scale)).clamp(max=allowed)
        if math.isinf(gap):
            return thresholds
        return thresholds.minimum((VALUE_ERROR * wanted.abs()).clamp(min=self.tightest * scale))

    def coarse_margin(self, scale: float, last: float) -> float:
        """Distance beyond the `last` wanted value that is always excluded."""
        return max(self.tol, _COARSE) * scale

    def fine_margin(self, scale: float, last: float) -> float:
        """Distance at which a missed copy changes an eigenvalue too much."""
        return min(self.coarse_margin(scale, last), max(self.floor(scale), VALUE_ERROR * abs(last)))

    def floor(self, scale: float) -> float:
        """The distance below which copies are not looked for."""
        return max(self.rounding, _FLOOR * self.tol) * scale

    def least_margin(self, scale: float, last: float) -> float:
        """The distance at which two eigenvalues differ."""
        return min(self.tol * scale, self.fine_margin(scale, last))

    def claims_space(self, residual: float, gap: float, scale: float) -> bool:
        """Whether an eigenspace of that residual and gap is claimed.

        The `gap` is NaN while it is unknown.
        """
        return self.subspace_tol is not None and not self.least_gap(residual, scale) >= gap

    def least_gap(self, residual: float, scale: float) -> float:
        """The narrowest gap with which an eigenspace of that residual is claimed."""
        return max(residual, self.rounding * scale) / CLAIMED_ERROR

    def allowance(self, num_matvecs: int) -> int:
        """The products that may be spent on narrow gaps after so many."""
        return max(_LEAST_ALLOWANCE, int(_ALLOWED_SHARE * num_matvecs))


@dataclass
class Progress:
    """The convergence of one run, as remembered between matvecs."""

    num_matvecs: int = 0
    num_restarts: int = 0
    num_draws: int = 0  # random directions drawn after the start
    num_passes: int = 0  # consecutive matvecs that passed the test
    best_residual: float = math.inf  # smallest so far, relative to scale
    best_matvec: int = 0  # number of matvecs when it was reached

    @property
    def num_stalled(self) -> int:
        """Matvecs since the last progress."""
        return self.num_matvecs - self.best_matvec

    def reset(self) -> None:
        """Forget the convergence: the basis, or what is wanted, has changed."""
        self.num_passes, self.best_residual, self.best_matvec = 0, math.inf, self.num_matvecs

    def test(self, rules: Rules, ritz: Ritz, gap: float, scale: float, *, invariant: bool, verifying: bool) -> bool:
        """Whether the wanted pairs have converged; records passes and progress.

        A verification makes progress by its certificates, not by residuals. `gap` is NaN while it is unknown.
        """
        if len(ritz.values) < rules.k:
            return False
        # Only what further matvecs can reduce is tested: the dropped part has passed this test before.
        reducible = ritz.reducible[: rules.k]
        worst = float(reducible.max()) / scale if scale else 0.0
        if worst < self.best_residual or verifying:
            self.best_residual, self.best_matvec = worst, self.num_matvecs
        # A residual that falls no more often waits for a pair that was missed. A small basis may wait long for it: the
        # random direction of a verification finds it sooner, so all but `tol` is given up before.
        if self.num_stalled >= rules.patience // 4:
            gap = math.inf
        passed = bool((reducible <= rules.thresholds(ritz.values[: rules.k], gap, scale)).all())
        self.num_passes = self.num_passes + 1 if passed else 0
        # No further matvec can change the pairs of an invariant basis.
        return passed and (invariant or self.num_passes >= (1 if rules.tol <= _PLAIN_TOL else 2))


class Verdict(NamedTuple):
    """Why a run stops, and whether missed copies are excluded."""

    outcome: Outcome
    verified: bool = False


def decide(
    rules: Rules,
    progress: Progress,
    size: int,  # rows of the basis
    answered: bool,  # the wanted pairs have converged, now or before the verification in progress began
    certain: bool,  # besides, no more is to be done about missed copies of them
    verified: bool,  # those that would change an eigenvalue are excluded
    asymmetric: bool,  # the asymmetry seen is larger than allowed
    settled: bool,  # scale hardly grew in this matvec
) -> Verdict | None:
    """Decide after a matvec why to stop; None to go on."""
    verdict = None
    if size == rules.dimension:
        verdict = Verdict(Outcome.EXACT, verified=True)
    elif certain:
        verdict = Verdict(Outcome.CONVERGED, verified=verified)
    elif progress.num_matvecs >= rules.max_matvecs:
        verdict = Verdict(Outcome.CONVERGED, verified) if answered else Verdict(Outcome.MAX_MATVECS)
    elif size >= rules.k and progress.num_stalled >= rules.patience:
        verdict = Verdict(Outcome.STAGNATED)
    # In the first matvecs scale may be far below the norm of the operator, and rounding would look like asymmetry.
    return Verdict(Outcome.ASYMMETRIC) if asymmetric and (settled or verdict is not None) else verdict
