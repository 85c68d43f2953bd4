"""Spectrum of the Hessian at one step, and its logged numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_subspace.linalg import Quadrature

NEGATIVE = 1e-3  # in units of the largest |eigenvalue|: only eigenvalues below minus this count as negative
MARGIN_ERRORS = 2.0  # standard errors around the share of negative eigenvalues


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The spectrum of the Hessian at one step.

    Attributes:
        step: t of theta_t.
        spectrum: the known eigenvalues, and nodes and weights for all others.
    """

    step: int
    spectrum: Quadrature

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged, by their keys."""
        spectrum = self.spectrum
        low, high = spectrum.ends
        edge = -NEGATIVE * max(abs(low), abs(high))
        share = spectrum.sum(lambda x: (x < edge).double())
        share_low, share_high = spectrum.below(edge)
        margin = MARGIN_ERRORS * share.error / spectrum.dimension
        negative = spectrum.sum(lambda x: torch.where(x < edge, -x, 0.0))
        total = spectrum.sum(torch.abs)
        mass = negative.value / total.value if total.value > 0.0 else 0.0
        # To first order in both sums, by the sum of their difference: they share their random vectors.
        off = spectrum.sum(lambda x: torch.where(x < edge, -x, 0.0) - mass * x.abs())
        return {
            **trace_metrics(spectrum),
            "lowest_eigenvalue": low,
            "negative_share": share.value / spectrum.dimension,
            "negative_share_low": max(share_low - margin, 0.0),
            "negative_share_high": min(share_high + margin, 1.0),
            "negative_mass": mass,
            "negative_mass_error": off.error / total.value if total.value > 0.0 else 0.0,
        }


def trace_metrics(spectrum: Quadrature) -> dict[str, float]:
    """Trace and Frobenius norm with their standard errors."""
    trace, square = spectrum.sum(lambda x: x), spectrum.sum(torch.square)
    norm = math.sqrt(square.value) if square.value > 0.0 else square.value
    return {
        "trace": trace.value,
        "trace_error": trace.error,
        "frobenius_norm": norm,
        "frobenius_error": square.error / (2.0 * norm) if norm > 0.0 else 0.0,
    }
