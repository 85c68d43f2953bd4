"""Where the gradient lies relative to the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch

from lightning_subspace.measurements.base import Measurement, Needs, Probe, Prospect


class GradientFraction(Measurement):
    """`gradient_fraction`: f_top = |P g|^2 / |g|^2, in [0, 1].

    The share of the squared gradient inside the top eigenspace (Gur-Ari, Roberts and Dyer 2018, section 2). A random
    direction gives k/n. Its square root is chi_k of Song, Ahn and Yun (arXiv 2405.16002).
    """

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One product of the basis with the gradient."""
        return {"gradient_fraction": probe.top.fraction(probe.gradient)}


class GradientCurvature(Measurement):
    """`gradient_norm`, `gradient_curvature`, `gradient_hessian_cosine`: what one Hessian product tells.

    |g|; g.Hg/|g|^2, the curvature along the gradient, in units of an eigenvalue; and g.Hg/(|g| |Hg|) in [-1, 1]
    (equation 2 of the paper), which is 1 when the gradient is an eigenvector.
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def expected_products(self, prospect: Prospect) -> float:
        """One."""
        return 1.0

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One Hessian product."""
        norm = probe.norm(probe.gradient)
        if norm == 0.0:
            return {"gradient_norm": 0.0}
        unit = probe.gradient / norm
        image = probe.operator.matvec(unit)
        curvature, image_norm = probe.dot(unit, image), probe.norm(image)
        cosine = curvature / image_norm if image_norm > 0.0 else float("nan")
        return {
            "gradient_norm": norm,
            "gradient_curvature": curvature,
            "gradient_hessian_cosine": min(max(cosine, -1.0), 1.0),
        }


class GapIndex(Measurement):
    """`gap_index`: the i in 1..k with the largest ratio lambda_i / lambda_{i+1}, over positive eigenvalues.

    Cross-entropy with K classes puts it at K - 1, squared loss at K (measured). What is smaller than the solver's
    residual counts as that large: a zero eigenvalue is rounding of either sign. Left out when fewer than two of the
    k + 1 eigenvalues are positive, and for another end of the spectrum than "LA".
    """

    needs: ClassVar[Needs] = Needs.EIGENVALUES

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """No product."""
        if probe.which != "LA":
            return {}
        values = [*probe.top.eigenvalues.tolist(), probe.top.next_eigenvalue]
        smallest = max(float(probe.top.residuals.max()), torch.finfo(probe.gradient.dtype).eps * abs(values[0]))
        ratios = [a / max(b, smallest) for a, b in pairwise(values) if a > smallest and b >= -smallest]
        return {"gap_index": float(ratios.index(max(ratios)) + 1)} if ratios else {}
