"""The top eigenspace of the Hessian, and the numbers that are read off it.

A subspace is held as an orthonormal basis in *rows*: V is (k, n) with V V^T = I, and P = V^T V is its projector.
Every number here depends on the subspace alone, not on the basis chosen in it. Under ranks every rank has its own
columns of V and its own part of a vector, and inner products are summed over ranks.

Reference: Gur-Ari, Roberts and Dyer, "Gradient Descent Happens in a Tiny Subspace", arXiv 1812.04754, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_subspace.linalg import EigshResult, Outcome
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks

# A fraction or an overlap is a number in [0, 1]; rounding may take it out by this much and is clamped. More is a bug.
ROUNDING = 1e-5
# The largest max|V V^T - I| at which a sum of squared projections still is a fraction.
ORTHONORMALITY = 1e-4
# The largest subspace error at which fractions and overlaps are reported. Where sin is the sine of the largest angle
# between a space and the true one, |v^T (P - P') v| <= sin |v|^2: a fraction or an overlap is off by at most that, and
# by about sin^2 where it is near 0 or 1.
TRUSTED_ERROR = 0.1
# The next eigenvalue was not waited for. It is worth showing when its residual, which bounds its error, is at most this
# share of itself, or of the largest |eigenvalue|.
NEXT_ERROR = 0.05
NEXT_RESIDUAL = 1e-3
# Columns that are held in float64 at a time.
BLOCK = 1 << 17
ALONE = Ranks()


class SubspaceIntegrityError(RuntimeError):
    """A quantity that is in [0, 1] by definition was not: a bug in this package or in a solver, not in the user's."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The eigenspace of the k wanted eigenvalues, with what is known about its accuracy.

    Attributes:
        eigenvalues: (k,) float64, best first.
        eigenvectors: (k, n), orthonormal rows, under ranks this rank's columns; None where only the numbers were kept
            (`monitor.history`).
        residuals: (k,) float64, |H v - lambda v| of each pair.
        next_eigenvalue: estimate of the eigenvalue behind the k-th, right to 5 % or to a thousandth of the largest
            |eigenvalue|; nan where it is not known that well, and when k = n.
        error: max residual / gap behind the k-th eigenvalue, an estimate of the sine of the largest angle to the true
            eigenspace (times sqrt(k) and with the true gap, a bound: Davis and Kahan 1970); 0 when k = n.
        outcome: how the solver ended.
        verified: whether missed copies of equal eigenvalues were excluded.
        num_matvecs: Hessian products spent.
        partition: which columns this rank has; None: all of them.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor | None
    residuals: Tensor
    next_eigenvalue: float
    error: float
    outcome: Outcome
    verified: bool
    num_matvecs: int
    partition: Partition | None = None

    @classmethod
    def of(cls, result: EigshResult, partition: Partition | None = None) -> Subspace:
        """Take over what the eigensolver returned.

        Raises:
            SubspaceIntegrityError: when the eigenvectors are not orthonormal to 1e-4.
        """
        defect = orthonormality_defect(result.eigenvectors, ALONE if partition is None else partition.ranks)
        if not defect < ORTHONORMALITY:
            raise SubspaceIntegrityError(
                f"the basis is not orthonormal: max|V V^T - I| = {defect:.1e}, at most {ORTHONORMALITY:.0e} is "
                "allowed. A fraction computed from it could exceed 1."
            )
        known = result.next_residual <= max(NEXT_ERROR * abs(result.next_eigenvalue), NEXT_RESIDUAL * result.scale)
        return cls(
            eigenvalues=result.eigenvalues,
            eigenvectors=result.eigenvectors,
            residuals=result.residuals,
            next_eigenvalue=result.next_eigenvalue if known else float("nan"),
            error=result.subspace_error,
            outcome=result.outcome,
            verified=result.verified,
            num_matvecs=result.num_matvecs,
            partition=partition,
        )

    @property
    def k(self) -> int:
        """Number of eigenpairs."""
        return len(self.eigenvalues)

    @property
    def converged(self) -> bool:
        """Whether every wanted eigenpair reached the tolerance."""
        return self.outcome in (Outcome.CONVERGED, Outcome.EXACT)

    @property
    def trusted(self) -> bool:
        """Whether the space, not only the eigenvalues, is accurate enough to project on."""
        return self.converged and self.error <= TRUSTED_ERROR

    @property
    def verdict(self) -> str:
        """One sentence on what may be believed, and what to do where that is not everything."""
        if not self.converged:
            return f"eigenvalues, fractions and overlaps are left out. {self.outcome.value}"
        if not self.trusted:
            return (
                f"fractions and overlaps are left out: eigenvalue {self.k} is so close to the next one that the space "
                f"of the first {self.k} is not determined (residual / gap = {self.error:.2g}, at most {TRUSTED_ERROR})."
                " Choose k at a gap of the spectrum, or a smaller tol."
            )
        return self.outcome.value

    @property
    def basis(self) -> Tensor:  # (k, n)
        """The eigenvectors.

        Raises:
            ValueError: when they were dropped to save memory.
        """
        if self.eigenvectors is None:
            raise ValueError("the eigenvectors of this subspace were dropped; only its sketch and its numbers remain.")
        return self.eigenvectors

    def fraction(
        self,
        vector: Tensor,  # (n,)
    ) -> float:
        """Share of a vector's squared length that lies in this subspace, in [0, 1]: see `fraction`."""
        return fraction(self.basis, vector, self._ranks)

    def overlap(
        self,
        other: Tensor,  # (m, n)
    ) -> float:
        """Overlap with the space of other orthonormal rows, in [0, 1]: see `overlap`."""
        return overlap(self.basis, other, self._ranks)

    def gather(self) -> Tensor:  # (k, n)
        """The whole eigenvectors, on every rank; a collective. A view of nothing: to be written to as you like."""
        if self.partition is None:
            return self.basis.clone()
        return torch.stack([self.partition.gather(row).clone() for row in self.basis])

    def without_eigenvectors(self) -> Subspace:
        """The same record without its k * n floats."""
        return replace(self, eigenvectors=None, partition=None)

    @property
    def _ranks(self) -> Ranks:
        return ALONE if self.partition is None else self.partition.ranks


def orthonormality_defect(
    basis: Tensor,  # (k, n)
    ranks: Ranks = ALONE,
) -> float:
    """Largest entry of |V V^T - I|."""
    if not len(basis):
        return 0.0
    gram = inner_products(basis, basis, ranks)
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().amax())


def inner_products(
    rows: Tensor,  # (k, n)
    others: Tensor,  # (m, n)
    ranks: Ranks = ALONE,
) -> Tensor:  # (k, m) float64
    """All inner products A B^T, in float64 block by block: out of reach of autocast, TF32 and a large n."""
    blocks = zip(torch.split(rows, BLOCK, dim=1), torch.split(others.to(rows.device), BLOCK, dim=1), strict=True)
    return ranks.all_reduce(torch.stack([_exact(a) @ _exact(b).T for a, b in blocks]).sum(0))


def fraction(
    basis: Tensor,  # (k, n) orthonormal rows
    vector: Tensor,  # (n,)
    ranks: Ranks = ALONE,
) -> float:
    """Share of a vector's squared length that lies in a subspace: |P v|^2 / |v|^2, in [0, 1].

    With v the gradient of the training loss this is f_top of the paper (section 2, below equation 1); a random vector
    gives k/n on average. nan for v = 0 and for a v that is not finite.

    Raises:
        SubspaceIntegrityError: when the value is outside [0, 1] by more than rounding.

    Example:
        >>> fraction(torch.eye(4)[:2], torch.tensor([3.0, 0.0, 4.0, 0.0]))
        0.36
    """
    norm = math.sqrt(float(inner_products(vector[None], vector[None], ranks)))
    if not 0.0 < norm < math.inf:
        return math.nan
    return _in_unit_interval(float((inner_products(basis, vector[None], ranks) / norm).square().sum()), "a fraction")


def overlap(
    basis: Tensor,  # (k, n) orthonormal rows
    other: Tensor,  # (m, n) orthonormal rows
    ranks: Ranks = ALONE,
) -> float:
    """Overlap of two subspaces: Tr(P P') / k, in [0, 1] (equation 4 of the paper).

    The mean squared cosine of the principal angles: 1 for equal spaces, 0 for orthogonal ones, k/n for random ones.
    For different dimensions the smaller one divides: 1 when it lies in the larger one, max(k, m)/n for random ones.

    Raises:
        SubspaceIntegrityError: when the value is outside [0, 1] by more than rounding.

    Example:
        >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
        0.5
    """
    cosines = inner_products(basis, other, ranks)
    return _in_unit_interval(float(cosines.square().sum()) / min(cosines.shape), "an overlap")


def principal_angles(
    basis: Tensor,  # (k, n) orthonormal rows
    other: Tensor,  # (m, n) orthonormal rows
) -> Tensor:  # (min(k, m),)
    """Principal angles between two subspaces in radians, ascending, in [0, pi/2], float64.

    Angles below 45 degrees are taken from their sines, which keeps small ones accurate (Bjorck and Golub 1973): to
    about 1e-15 for float64 bases, 1e-7 for float32 ones.

    Example:
        >>> principal_angles(torch.eye(4)[:2], torch.eye(4)[1:3])
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    small, large = sorted((_exact(basis), _exact(other.to(basis.device))), key=len)
    cosines = torch.linalg.svdvals(small @ large.T).clamp(max=1.0)  # descending
    # The part of the smaller space outside the larger one; the other way round, m - k sines would be 1.
    sines = torch.linalg.svdvals(small - small @ large.T @ large).flip(0).clamp(max=1.0)  # ascending, the same pairs
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none (Apple's)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _in_unit_interval(value: float, what: str) -> float:
    if not -ROUNDING <= value <= 1.0 + ROUNDING:
        raise SubspaceIntegrityError(f"{what} must lie in [0, 1], got {value!r}; the basis is not orthonormal.")
    return min(max(value, 0.0), 1.0)
