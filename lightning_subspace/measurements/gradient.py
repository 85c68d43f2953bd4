"""Gradient and update of a step relative to the curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lightning_subspace.measurements.base import Measurement, Needs, Probe
from lightning_subspace.measurements.prospect import Prospect


class GradientFraction(Measurement):
    """`gradient_fraction`: f_top = |P g|^2 / |g|^2, in [0, 1].

    The share of the squared gradient inside the top eigenspace (Gur-Ari, Roberts and Dyer 2018, arXiv 1812.04754,
    section 2). A random direction gives k/n. Its square root is `chi_gradient`, see `Chi`.
    """

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One product of the basis with the gradient."""
        return {"gradient_fraction": probe.top.fraction(probe.gradient)}


class UpdateFraction(Measurement):
    """`update_fraction`, `batch_gradient_fraction`: shares of a step inside the top eigenspace.

    |P u|^2 / |u|^2 for u = theta_{t+1} - theta_t (after clipping, momentum, preconditioning and weight decay), and the
    same for the accumulated mini-batch gradient of that step. Both in [0, 1]; a random direction gives k/n.
    """

    extra: ClassVar[frozenset[str]] = frozenset({"batch_gradient_fraction"})

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """One product of the basis with each."""
        metrics = {"update_fraction": probe.top.fraction(update)}
        if gradient is not None:
            metrics["batch_gradient_fraction"] = probe.top.fraction(gradient)
        return metrics


class Chi(Measurement):
    """`chi_gradient`, `chi_update`: |Pv|/|v| of gradient and update, in [0, 1].

    chi_k of Song, Ahn and Yun (arXiv 2405.16002, section 3): the square roots of `gradient_fraction` and
    `update_fraction`. They switch to projected descent where the moving average of chi_k exceeds .95, a fraction of
    .90. A random direction gives about sqrt(k/n).

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Chi()])
    """

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One product of the basis with the gradient."""
        return {"chi_gradient": math.sqrt(probe.top.fraction(probe.gradient))}

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """One product of the basis with the update."""
        return {"chi_update": math.sqrt(probe.top.fraction(update))}


class GradientCurvature(Measurement):
    """`gradient_norm`, `gradient_curvature`, `gradient_hessian_cosine`: length and curvature of the gradient.

    |g|; g.Hg/|g|^2, the curvature along the gradient, in units of an eigenvalue; and g.Hg/(|g| |Hg|) in [-1, 1]
    (Gur-Ari, Roberts and Dyer 2018, arXiv 1812.04754, equation 2), which is 1 when the gradient is an eigenvector.
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    extra: ClassVar[frozenset[str]] = frozenset({"gradient_norm", "gradient_curvature"})

    def expected_products(self, prospect: Prospect) -> float:
        """One."""
        return 1.0

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One Hessian product."""
        norm, image = probe.norm(probe.gradient), probe.gradient_image
        if image is None:
            return {"gradient_norm": norm}
        curvature, image_norm = probe.dot(probe.gradient / norm, image), probe.norm(image)
        cosine = curvature / image_norm if image_norm > 0.0 else float("nan")
        return {
            "gradient_norm": norm,
            "gradient_curvature": curvature,
            "gradient_hessian_cosine": min(max(cosine, -1.0), 1.0),
        }
