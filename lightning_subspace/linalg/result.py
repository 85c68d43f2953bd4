"""Result of the eigensolver: the eigenpairs, and why it stopped."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from torch import Tensor

from lightning_subspace.linalg.one_line import one_line


class Outcome(enum.Enum):
    """Why the eigensolver stopped, likely causes, and the way out."""

    CONVERGED = "All wanted eigenpairs reached the tolerance."
    EXACT = "The basis spans the whole space, so the eigenpairs are exact up to rounding."
    MAX_MATVECS = (
        "`max_matvecs` products were spent before the wanted eigenpairs reached the tolerance: they are few for `k`, "
        "or the eigenvalues behind the k-th are close to it. Raise `max_matvecs` or `ncv`, lower `k`, or loosen `tol`."
    )
    STAGNATED = (
        "The residuals stopped falling before they reached the tolerance. Likely causes: a tolerance near the rounding "
        "error of the operator, or a basis too small for a dense cluster behind the k-th eigenvalue. Loosen `tol` or "
        "raise `ncv`, or use float64."
    )
    ASYMMETRIC = (
        "The operator is not symmetric or not deterministic: two measurements of the same entry of its projection "
        "differ by more than rounding can explain. Likely causes: (a) a new minibatch on every call, "
        "(b) dropout or data augmentation that is drawn anew, (c) batch statistics that move, (d) half precision in "
        "the operator. Make it return the same result for the same vector; the eigenpairs returned are not an answer."
    )
    ROUNDING = (
        "Two measurements of the same entry of the operator's projection differ by more than the solver can work with. "
        "The operator is deterministic, but its products are rounded by about as much: terms cancel in it, as in the "
        "Hessian of a loss that is almost zero. Compute it in float64 (`dtype='float64'`); the eigenpairs returned are "
        "not an answer."
    )
    NONFINITE = (
        "The operator returned NaN or infinity. The loss may have diverged, a derivative may be singular here, or "
        "another rank failed. The eigenpairs returned are those found before."
    )


@dataclass(frozen=True, eq=False)
class EigshResult:
    """Eigenpairs, best first, with their cost, errors and outcome.

    The order is by `which`: "LA" descending, "SA" ascending, "LM" by magnitude descending, "BE" the high end
    descending, then the low end ascending. Without convergence these are the best pairs at hand, perhaps fewer than k;
    their residuals tell how good they are.

    Attributes:
        eigenvalues: shape (k,), float64 on the CPU.
        eigenvectors: orthonormal rows, this rank's slice, shape (k, n), in the dtype and on the device of the run.
        residuals: |A x - theta x|, shape (k,), float64 on the CPU, in units of A: the estimate, but not less than the
            asymmetry of the operator and rounding, below which no estimate means anything.
        outcome: why the run stopped.
        verified: whether missed copies that would change an eigenvalue by more than 5 % (or `tol * scale`, if that is
            more) are excluded, but for the risk `delta`.
        num_matvecs: products spent.
        num_restarts: how often the basis was full and compressed.
        orthogonality: max |V V^T - I| of the rows returned; NaN if a rank failed.
        asymmetry: of the projected matrix, at most, relative to `scale`; about 1e-7 for a deterministic float32 one.
        scale: largest absolute Ritz value, to which all tolerances are relative.
        next_eigenvalue: best Ritz value behind the wanted ones ("BE": at the closer end); NaN if none was seen.
        next_residual: its residual, likewise; it need not have converged. At least the gap where a missed copy of the
            k-th eigenvalue was looked for and is not excluded: it would be what follows.
        gap: its distance from the last wanted eigenvalue, with "LM" in magnitude; infinity if k is the whole dimension,
            0 if nothing behind the wanted ones was seen.
        gap_given_up: whether it seemed wide enough for an eigenspace (`subspace_error` at most 0.1), but too many
            products would have been needed to exclude copies of the k-th eigenvalue. Then `subspace_error` is infinity.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    outcome: Outcome
    verified: bool
    num_matvecs: int
    num_restarts: int
    orthogonality: float
    asymmetry: float
    scale: float
    next_eigenvalue: float
    next_residual: float
    gap: float
    gap_given_up: bool = False

    def __repr__(self) -> str:
        return one_line(self)

    @property
    def converged(self) -> bool:
        """Whether the eigenpairs are an answer."""
        return self.outcome in (Outcome.CONVERGED, Outcome.EXACT)

    @property
    def subspace_error(self) -> float:
        """Estimate of the angle error of the eigenspace: largest residual / gap.

        About the sine of the largest angle to the true eigenspace. The Ritz value behind the gap may still approach the
        wanted ones by its residual, which is subtracted. Infinity if the wanted eigenvalues may split a cluster.
        """
        if math.isinf(self.gap):
            return 0.0
        gap = self.gap - self.next_residual
        return float(self.residuals.max()) / gap if gap > 0 else math.inf
