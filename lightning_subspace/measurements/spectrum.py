"""Eigenvalues, their gap, and how far the eigensolver came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch

from lightning_subspace.measurements.base import Measurement, Needs, Probe
from lightning_subspace.subspace.subspace import Subspace

NEAR_ZERO = 1e-3  # in units of the largest eigenvalue


class GapIndex(Measurement):
    """`gap_index`: the i in 1..k with the largest ratio lambda_i / lambda_{i+1}.

    Only positive eigenvalues count. Cross-entropy with K classes puts it at K - 1, squared loss at K (measured). An
    eigenvalue below the solver's residual is replaced by that: a zero eigenvalue is rounding of either sign. Left out
    when fewer than two of the k + 1 eigenvalues are positive, and for another end of the spectrum than "LA".
    """

    needs: ClassVar[Needs] = Needs.EIGENVALUES
    extra: ClassVar[frozenset[str]] = frozenset({"gap_index"})

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """No product."""
        if probe.which != "LA":
            return {}
        values = [*probe.top.eigenvalues.tolist(), probe.top.next_eigenvalue]
        # One that is near zero is never known to 5 %, but how large it may be is.
        if math.isnan(values[-1]) and abs(probe.top.largest_next) <= NEAR_ZERO * abs(values[0]):
            values[-1] = probe.top.largest_next
        smallest = max(float(probe.top.residuals.max()), torch.finfo(probe.gradient.dtype).eps * abs(values[0]))
        ratios = [a / max(b, smallest) for a, b in pairwise(values) if a > smallest and b >= -smallest]
        return {"gap_index": float(ratios.index(max(ratios)) + 1)} if ratios else {}


def solver_metrics(subspace: Subspace) -> dict[str, float]:
    """`eigenvalues/01` to `k+1`, where known to 5 %, and `solver/...`, always.

    `solver/residual` is the largest residual over the largest |eigenvalue|; nan where no pair was found.
    """
    residual = math.nan
    if subspace.k:
        scale = float(subspace.eigenvalues.abs().max())
        residual = float(subspace.residuals.max()) / scale if scale > 0.0 else 0.0
    metrics = {
        "solver/subspace_error": subspace.error,
        "solver/residual": residual,
        "solver/matvecs": float(subspace.num_matvecs),
        "solver/converged": float(subspace.converged),
        "solver/verified": float(subspace.verified),
    }
    return metrics | {f"eigenvalues/{i:02d}": value for i, value in subspace.reported.items()}
