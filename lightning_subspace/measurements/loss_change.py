"""Change of the loss by a step, split by the top eigenspace."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_subspace.measurements.base import Measurement, Probe
from lightning_subspace.measurements.optimizer_rules import next_step
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.subspace.subspace import inner_products


class LossChange(Measurement):
    """Change of the loss inside and outside the top eigenspace.

    In units of the loss. For a step u, to second order, L(theta + u) - L(theta) = g.u + u.Hu / 2, which splits without
    a mixed term, since the top space is spanned by eigenvectors:

        top:   g.Pu + sum_i lambda_i (v_i.u)^2 / 2        bulk:  g.(u - Pu) + (u.Hu - sum_i lambda_i (v_i.u)^2) / 2

    For gradient descent, u = -lr g, these are -lr |Pg|^2 + lr^2/2 g.PHPg and the same with 1 - P: the loss goes down in
    a direction whose curvature is below 2/lr. Where nearly all of the gradient is in the top space and its share of the
    descent is about zero, the alignment is the "spurious" one of Song, Ahn and Yun (arXiv 2405.16002).

    `expected_change_top`, `expected_change_bulk`: for the step of the optimizer with the mean gradient; one product,
    and only for the optimizers that `Stability` knows. g and H are means over the gradient's and the Hessian's sample.

    `loss_change_top`, `loss_change_bulk`: for the step taken, with the noise of its mini-batch. The Hessian is gone by
    then, so the bulk's is to first order, g.(u - Pu), and `loss_change_bulk_high` adds its largest second order,
    lambda_{k+1} |u - Pu|^2 / 2 (with "LA"; where lambda_{k+1} is not known, the largest that it may be).

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[LossChange()])
    """

    def expected_products(self, prospect: Prospect) -> float:
        """One."""
        return 1.0

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One product, where the rule of the optimizer is known."""
        step = next_step(probe)
        if step is None:
            return {}
        slope, slope_top, bend_top = _in_top(probe, step)
        bend = probe.dot(step, probe.operator.matvec(step))
        return {
            "expected_change_top": slope_top + bend_top / 2.0,
            "expected_change_bulk": slope - slope_top + (bend - bend_top) / 2.0,
        }

    def after_step(self, probe: Probe, gradient: Tensor | None, update: Tensor) -> Mapping[str, float]:
        """No product."""
        slope, slope_top, bend_top = _in_top(probe, update)
        found = {"loss_change_top": slope_top + bend_top / 2.0, "loss_change_bulk": slope - slope_top}
        if probe.which == "LA":
            outside = probe.norm(update) ** 2 * (1.0 - probe.top.fraction(update))
            following = probe.top.next_eigenvalue
            steepest = max(probe.top.largest_next if math.isnan(following) else following, 0.0)
            found["loss_change_bulk_high"] = found["loss_change_bulk"] + steepest * outside / 2.0
        return found


def _in_top(probe: Probe, step: Tensor) -> tuple[float, float, float]:
    """g.u, g.Pu and u.PHPu of a step u, (n,)."""
    basis, ranks = probe.top.basis, probe.partition.ranks
    along_step, along_gradient = (inner_products(basis, v[None], ranks)[:, 0].cpu() for v in (step, probe.gradient))
    bend = float((probe.top.eigenvalues * along_step.square()).sum())
    return probe.dot(probe.gradient, step), float(along_step @ along_gradient), bend
