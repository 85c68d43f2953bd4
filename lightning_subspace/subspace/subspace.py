"""Top eigenspace of the Hessian, and its fractions, overlaps and angles.

A subspace is held as an orthonormal basis in *rows*: V is (k, n) with V V^T = I, and P = V^T V is its projector.
Every number here depends on the subspace alone, not on the basis chosen in it. Under ranks every rank has its own
columns of V and its own part of a vector.

Source: Gur-Ari, Roberts and Dyer, "Gradient Descent Happens in a Tiny Subspace", arXiv 1812.04754, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_subspace._arguments import require_instance, require_shape
from lightning_subspace.linalg import EigshResult, Outcome
from lightning_subspace.linalg.one_line import one_line
from lightning_subspace.linalg.stopping import CLAIMED_ERROR, VALUE_ERROR
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks

UNIT_ROUNDING = 1e-5  # how far outside [0, 1] a fraction or an overlap is rounding and clamped; more is a bug
ORTHONORMALITY = 1e-4  # the largest max|V V^T - I| at which a sum of squared projections still is a fraction
# The largest subspace error at which fractions and overlaps are reported. With s the sine of the largest angle to the
# true space, |v^T (P - P') v| <= s |v|^2: they are off by at most s, and by about s^2 near 0 or 1.
TRUSTED_ERROR = CLAIMED_ERROR
WIDENED_AT_ONCE = 1 << 17  # columns that are held in float64
ALONE = Ranks()


class SubspaceIntegrityError(RuntimeError):
    """A fraction or overlap outside of [0, 1]: a bug here."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """Eigenspace of the k wanted eigenvalues, with its accuracy.

    Attributes:
        eigenvalues: (k,) float64, best first.
        eigenvectors: (k, n), orthonormal rows, under ranks this rank's columns; None in `monitor.history`.
        residuals: (k,) float64, |H v - lambda v| of each pair.
        next_eigenvalue: estimate of the eigenvalue behind the k-th, right to 5 %; nan where it is not known that well,
            since the solver does not wait for it, and when k = n.
        error: max residual / gap behind the k-th eigenvalue, an estimate of the sine of the largest angle to the true
            eigenspace (times sqrt(k) and with the true gap, a bound: Davis and Kahan 1970); 0 when k = n.
        outcome: how the solver ended.
        verified: whether missed copies of equal eigenvalues were excluded that would change one by more than 5 %.
        num_matvecs: Hessian products spent.
        partition: which columns this rank has; None: all of them.
        gap_given_up: whether there seemed to be a gap behind the k-th eigenvalue, and it took too many products to
            exclude more of the same eigenvalue; `error` is infinite then.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor | None
    residuals: Tensor
    next_eigenvalue: float
    error: float
    outcome: Outcome
    verified: bool
    num_matvecs: int
    partition: Partition | None = field(default=None, repr=False)
    gap_given_up: bool = False

    def __repr__(self) -> str:
        return one_line(self, k=self.k)

    @classmethod
    def of(cls, result: EigshResult, partition: Partition | None = None) -> Subspace:
        """The subspace of a result of the eigensolver.

        Raises:
            SubspaceIntegrityError: when the eigenvectors are not orthonormal to 1e-4.
        """
        require_instance("result", result, EigshResult, "an EigshResult")
        require_instance("partition", partition, Partition, "a Partition or None", optional=True)
        defect = orthonormality_defect(result.eigenvectors, ALONE if partition is None else partition.ranks)
        if not defect < ORTHONORMALITY:
            raise SubspaceIntegrityError(
                f"eigenvectors: expected orthonormal rows, got max|V V^T - I| = {defect:.1e}, at most "
                f"{ORTHONORMALITY:.0e} is allowed; a fraction computed from them could exceed 1."
            )
        known = result.next_residual <= VALUE_ERROR * abs(result.next_eigenvalue)
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
            gap_given_up=result.gap_given_up,
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
    def known(self) -> Tensor:  # (k,)
        """Which eigenvalues are right to 5 % of themselves.

        The residual bounds the error. None is where the solver did not converge.
        """
        return (self.residuals <= VALUE_ERROR * self.eigenvalues.abs()) & self.converged

    @property
    def reported(self) -> dict[int, float]:
        """The known ones of eigenvalues 1 to k + 1, by place."""
        pairs = zip(self.eigenvalues.tolist(), self.known.tolist(), strict=True)
        values = {place: value for place, (value, known) in enumerate(pairs, start=1) if known}
        if self.converged and not math.isnan(self.next_eigenvalue):
            values[self.k + 1] = self.next_eigenvalue
        return values

    @property
    def largest_next(self) -> float:
        """Upper bound of eigenvalue k + 1 ("LA"), or nan."""
        if self.error == 0.0:  # k = n
            return math.nan
        return float(self.eigenvalues[-1]) - float(self.residuals.max()) / self.error

    @property
    def trusted(self) -> bool:
        """Whether the space, too, is accurate enough to project on."""
        return self.converged and self.error <= TRUSTED_ERROR

    @property
    def verdict(self) -> str:
        """Sentence on which numbers are left out, why, and the way out."""
        if self.trusted:
            return self.outcome.value
        left_out = "fractions and overlaps are left out"
        return self.refusal(left_out if self.converged else f"eigenvalues, {left_out}")

    def refusal(self, consequence: str) -> str:
        """The consequence, why the space is not trusted, and the way out."""
        if not self.converged:
            return f"{consequence}. {self.outcome.value}"
        if self.gap_given_up:
            return (
                f"{consequence}: eigenvalue {self.k} may occur more often than it was found, so that the space of the "
                f"first {self.k} may be one of many. Its gap to the next one is too narrow to exclude that with as "
                "many products as it took to find it. Choose k at a wider gap of the spectrum."
            )
        return (
            f"{consequence}: eigenvalue {self.k} is so close to the next one that the space of the first {self.k} is "
            f"not determined (residual / gap = {self.error:.2g}, at most {TRUSTED_ERROR}). Choose k at a gap of the "
            "spectrum, or a smaller tol."
        )

    @property
    def poor_values(self) -> str | None:
        """Sentence on converged eigenvalues that are left out, or None."""
        poor = [i for i, known in enumerate(self.known.tolist(), start=1) if not known]
        if not poor or not self.converged:
            return None
        names = ", ".join(f"eigenvalues/{i:02d}" for i in poor)
        return (
            f"{names}: left out, as the residual exceeds {VALUE_ERROR:.0%} of the eigenvalue. It is zero, or small "
            "beside the largest one, to which `tol` is relative. Pass a smaller tol (below 1e-5 with dtype='float64'), "
            "or a smaller k; `record.subspace` has `eigenvalues` and `residuals`."
        )

    @property
    def basis(self) -> Tensor:  # (k, n)
        """The eigenvectors.

        Raises:
            ValueError: when they were dropped to save memory.
        """
        if self.eigenvectors is None:
            raise ValueError("eigenvectors: expected a (k, n) basis, got None, as they were dropped; use the sketch.")
        return self.eigenvectors

    def fraction(self, vector: Tensor) -> float:  # (n,)
        """Share of a vector in this subspace, in [0, 1]: see `fraction`."""
        return fraction(self.basis, vector, self._ranks)

    def overlap(self, other: Tensor) -> float:  # (m, n)
        """Overlap with the space of other rows, in [0, 1]: see `overlap`."""
        return overlap(self.basis, other, self._ranks)

    def gather(self) -> Tensor:  # (k, n)
        """A copy of the whole eigenvectors, on every rank; a collective."""
        if self.partition is None:
            return self.basis.clone()
        return torch.stack([self.partition.gather(row).clone() for row in self.basis])

    def without_eigenvectors(self) -> Subspace:
        """The same record without its k * n floats."""
        return replace(self, eigenvectors=None, partition=None)

    @property
    def _ranks(self) -> Ranks:
        return ALONE if self.partition is None else self.partition.ranks


def orthonormality_defect(basis: Tensor, ranks: Ranks = ALONE) -> float:  # (k, n)
    """Largest entry of |V V^T - I|."""
    if not len(basis):
        return 0.0
    gram = inner_products(basis, basis, ranks)
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().amax())


def inner_products(rows: Tensor, others: Tensor, ranks: Ranks = ALONE) -> Tensor:  # (k, n), (m, n) -> (k, m) float64
    """All inner products A B^T, over all ranks, in float64."""
    # In blocks of columns, so that autocast, TF32 and a large n do not matter.
    blocks = zip(rows.split(WIDENED_AT_ONCE, dim=1), others.to(rows.device).split(WIDENED_AT_ONCE, dim=1), strict=True)
    return ranks.all_reduce(torch.stack([_exact(a) @ _exact(b).T for a, b in blocks]).sum(0))


def fraction(basis: Tensor, vector: Tensor, ranks: Ranks = ALONE) -> float:  # (k, n) orthonormal rows, (n,)
    """Share of a vector's squared length in a subspace.

    It is |P v|^2 / |v|^2, in [0, 1]. With v the gradient of the training loss this is f_top of the paper (section 2,
    below equation 1); a random vector gives k/n on average. nan for v = 0 and for a v that is not finite.

    Raises:
        SubspaceIntegrityError: when the value is outside [0, 1] by more than rounding.

    Example:
        >>> fraction(torch.eye(4)[:2], torch.tensor([3.0, 0.0, 4.0, 0.0]))
        0.36
    """
    require_shape("basis", basis, ["k", "n"], "basis vectors are rows")
    require_shape("vector", vector, basis.shape[1:], "it has a number for each column of the basis")
    norm = math.sqrt(float(inner_products(vector[None], vector[None], ranks)))
    if not 0.0 < norm < math.inf:
        return math.nan
    return _in_unit_interval(float((inner_products(basis, vector[None], ranks) / norm).square().sum()), "fraction")


def overlap(basis: Tensor, other: Tensor, ranks: Ranks = ALONE) -> float:  # (k, n), (m, n) orthonormal rows
    """Overlap of two subspaces, Tr(P P') / k.

    In [0, 1] (equation 4 of the paper): the mean squared cosine of the principal angles. It is 1 for equal spaces, 0
    for orthogonal ones, k/n on average for random ones. For different dimensions the smaller one divides: 1 when it
    lies in the larger one, max(k, m)/n for random ones.

    Raises:
        SubspaceIntegrityError: when the value is outside [0, 1] by more than rounding.

    Example:
        >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
        0.5
    """
    _require_pair(basis, other)
    cosines = inner_products(basis, other, ranks)
    return _in_unit_interval(float(cosines.square().sum()) / min(cosines.shape), "overlap")


def principal_angles(basis: Tensor, other: Tensor) -> Tensor:  # (k, n), (m, n) orthonormal rows -> (min(k, m),)
    """Principal angles between two subspaces in radians, ascending, in [0, pi/2].

    In float64. Angles below 45 degrees are taken from their sines, which keeps small ones accurate (Bjorck and Golub
    1973): to about 1e-15 for float64 bases, 1e-7 for float32 ones.

    Example:
        >>> principal_angles(torch.eye(4)[:2], torch.eye(4)[1:3])
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    _require_pair(basis, other)
    small, large = sorted((_exact(basis), _exact(other.to(basis.device))), key=len)
    cosines = torch.linalg.svdvals(small @ large.T).clamp(max=1.0)  # descending
    # The part of the smaller space outside the larger one; the other way round, m - k sines would be 1.
    sines = torch.linalg.svdvals(small - small @ large.T @ large).flip(0).clamp(max=1.0)  # ascending, the same pairs
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def _require_pair(basis: Tensor, other: Tensor) -> None:
    require_shape("basis", basis, ["k", "n"], "basis vectors are rows")
    require_shape("other", other, ["m", *basis.shape[1:]], "both are of the same space, basis vectors as rows")


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _in_unit_interval(value: float, what: str) -> float:
    if not -UNIT_ROUNDING <= value <= 1.0 + UNIT_ROUNDING:
        raise SubspaceIntegrityError(
            f"{what}: expected a number in [0, 1], got {value!r}; the basis is not orthonormal."
        )
    return min(max(value, 0.0), 1.0)
