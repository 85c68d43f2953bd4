"""The sharpness against what the optimizer in use can stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch.optim import SGD, Optimizer

from lightning_subspace.curvature.preconditioned import Preconditioned
from lightning_subspace.measurements.base import Measurement, Needs, Probe, Prospect
from lightning_subspace.measurements.optimizer_rules import (
    Notice,
    StabilityEdge,
    edge,
    sgd_group_threshold,
    why_unknown,
)


class SharpnessOverThreshold(Measurement):
    """`sharpness`, `sharpness_over_threshold`: lambda_1, and lambda_1 over the stability threshold of SGD.

    Above 1 a quadratic with this curvature diverges under full-batch descent; at the edge of stability the ratio
    hovers around 1 (Cohen et al. 2021, arXiv 2103.00065). The threshold is left out for optimizers whose formula is
    not known here. With several parameter groups the largest learning rate counts.
    """

    needs: ClassVar[Needs] = Needs.EIGENVALUES

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """No product."""
        if probe.which not in ("LA", "BE"):  # the largest eigenvalue need not be among the wanted ones
            return {}
        sharpness = float(probe.top.eigenvalues[0])
        threshold = sgd_threshold(probe.optimizer)
        if threshold is None:
            return {"sharpness": sharpness}
        return {"sharpness": sharpness, "sharpness_over_threshold": sharpness / threshold}


class Stability(Measurement):
    """`stability`: how close the optimizer in use is to the edge of stability, 1 being the edge; at least 0 if H is.

    The largest eigenvalue of S^1/2 (H + D) S^1/2, see `StabilityEdge`: for SGD with one learning rate (lambda_1 +
    weight decay) over 2/lr, or what momentum makes of it; for Adam, AdamW and RMSprop the preconditioned sharpness over
    its threshold (38/lr for Adam with b1 = .9; Cohen et al. 2022, arXiv 2207.14484, section 2), P being that of the
    last step taken.
    Parameter groups enter each with their own settings. It crosses 1 where `sharpness_over_threshold` does.

    `preconditioned_sharpness`, where there is a P and one threshold: lambda_1 of P^-1/2 (H + D) P^-1/2, in units of
    1/lr.

    Costs nothing for SGD with one learning rate; otherwise, and with k = 0, an eigensolve for one pair, 10 to 30
    products. Left out, and said once, where the optimizer is not known; left out before the first step of an adaptive
    one, and for another end of the spectrum than "LA" or "BE".

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Stability()])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self) -> None:
        self._notice = Notice()

    def expected_products(self, prospect: Prospect) -> float:
        """None for SGD, an eigensolve for one pair elsewhere."""
        return 0.0 if type(prospect.optimizer) is SGD and prospect.solver.k else prospect.solve(k=1)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Nothing, or an eigensolve for one pair."""
        if probe.which not in ("LA", "BE"):
            return {}
        reason = why_unknown(probe)
        if reason is not None:
            self._notice.say(probe, f"Stability: {reason}, so that `stability` is left out.")
            return {}
        limit = edge(probe)
        ratio = None if limit is None else _ratio(probe, limit)
        if limit is None or ratio is None:
            return {}
        if limit.is_uniform:
            return {"stability": ratio}
        return {"stability": ratio, "preconditioned_sharpness": ratio * limit.threshold}


def _ratio(probe: Probe, limit: StabilityEdge) -> float | None:
    """The largest eigenvalue of S^1/2 (H + D) S^1/2; None where the solver did not converge."""
    if not isinstance(limit.scale, float) or not isinstance(limit.shift, float):
        found = probe.solve(Preconditioned(probe.operator.matvec, limit.scale, limit.shift).matvec, k=1)
        return float(found.eigenvalues[0]) if found.converged else None
    space = probe.solve(probe.operator, k=1) if probe.subspace is None else probe.subspace
    return (float(space.eigenvalues[0]) + limit.shift) * limit.scale if space.converged else None


def sgd_threshold(optimizer: Optimizer | None) -> float | None:
    """Largest stable curvature of gradient descent, heavy ball or Nesterov momentum at the present learning rate.

    2/lr; (2 + 2b)/lr; (2 + 2b)/(lr (1 + 2b)) with momentum b (Cohen et al. 2021, section 2 and appendix B); less the
    weight decay, which `SGD` adds to the curvature of the loss. None for anything but a minimising `torch.optim.SGD`
    without dampening, and where the weight decay alone is unstable.

    Example:
        >>> import torch
        >>> sgd_threshold(SGD([torch.zeros(1)], lr=0.1, momentum=0.5))
        30.0
    """
    if type(optimizer) is not SGD:
        return None
    thresholds = []
    for group in optimizer.param_groups:
        if float(group["lr"]) <= 0.0:
            continue
        if group["maximize"] or (group["momentum"] and group["dampening"]):
            return None
        thresholds.append(sgd_group_threshold(group) - float(group["weight_decay"]))
    threshold = min(thresholds, default=0.0)
    return threshold if threshold > 0.0 else None
