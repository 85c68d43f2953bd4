"""What the eigensolver says of itself."""

from __future__ import annotations

import math

from lightning_subspace.subspace.subspace import Subspace


def solver_metrics(subspace: Subspace) -> dict[str, float]:
    """`eigenvalues/01` to `eigenvalues/k+1`, where they converged, and `solver/...`, always."""
    metrics = {
        "solver/subspace_error": subspace.error,
        "solver/residual": _relative_residual(subspace),
        "solver/matvecs": float(subspace.num_matvecs),
        "solver/converged": float(subspace.converged),
        "solver/verified": float(subspace.verified),
    }
    if subspace.converged:
        values = [*subspace.eigenvalues.tolist(), subspace.next_eigenvalue]
        metrics.update({f"eigenvalues/{i:02d}": value for i, value in enumerate(values, start=1)})
    return metrics


def _relative_residual(subspace: Subspace) -> float:
    """The largest residual over the largest |eigenvalue|; nan where no pair was found."""
    if not subspace.k:
        return math.nan
    scale = float(subspace.eigenvalues.abs().max())
    return float(subspace.residuals.max()) / scale if scale > 0.0 else 0.0
