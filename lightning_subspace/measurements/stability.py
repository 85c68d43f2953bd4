"""Sharpness against the stability threshold of the optimizer in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor
from torch.optim import SGD

from lightning_subspace.measurements.base import Measurement, Needs, Probe, Prospect
from lightning_subspace.measurements.optimizer_rules import Notice, StabilityEdge, edge, sgd_threshold, why_unknown


class SharpnessOverThreshold(Measurement):
    """`sharpness`, `sharpness_over_threshold`: lambda_1, and lambda_1 over the stability threshold of SGD.

    Above 1 full-batch descent diverges on a quadratic with this curvature; at the edge of stability the ratio hovers
    around 1 (Cohen et al. 2021, arXiv 2103.00065). With several parameter groups the largest learning rate counts. The
    ratio is left out for optimizers other than SGD, see `Stability`.
    """

    needs: ClassVar[Needs] = Needs.EIGENVALUES

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """No product."""
        if probe.which not in ("LA", "BE"):  # the largest eigenvalue need not be among the wanted ones
            return {}
        sharpness = probe.top.reported.get(1)
        if sharpness is None:
            return {}
        threshold = sgd_threshold(probe.optimizer)
        if threshold is None:
            return {"sharpness": sharpness}
        return {"sharpness": sharpness, "sharpness_over_threshold": sharpness / threshold}


class Stability(Measurement):
    """`stability`: sharpness over what the optimizer can stand; 1 is the edge.

    The largest eigenvalue of S^1/2 (H + D) S^1/2, see `StabilityEdge`; at least 0 if H is. For SGD with one learning
    rate: (lambda_1 + weight decay) over 2/lr, or over the threshold with momentum. For Adam, AdamW and RMSprop: the
    preconditioned sharpness over its threshold (38/lr for Adam with b1 = .9; Cohen et al. 2022, arXiv 2207.14484,
    section 2), P being that of the last step taken. Each parameter group enters with its own settings. It crosses 1
    where `sharpness_over_threshold` does.

    `preconditioned_sharpness`, where there is a P and one threshold: lambda_1 of P^-1/2 (H + D) P^-1/2, in units of
    1/lr.

    Costs nothing for SGD with one learning rate; otherwise, and with k = 0, an eigensolve for one pair, 10 to 30
    products. Left out for an unknown optimizer, with one warning; before the first step of an adaptive one; and for
    another end of the spectrum than "LA" or "BE".

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
        """No product, or an eigensolve for one pair."""
        if probe.which not in ("LA", "BE"):
            return {}
        reason = why_unknown(probe.optimizer)
        if reason is not None:
            self._notice.say(probe, f"Stability: {reason}, so that `stability` is left out.")
            return {}
        limit = edge(probe)
        if limit is None:
            return {}
        if isinstance(limit.scale, float) and isinstance(limit.shift, float):
            space = probe.solve(probe.operator, k=1) if probe.subspace is None else probe.subspace
            if not space.converged:
                return {}
            return {"stability": (float(space.eigenvalues[0]) + limit.shift) * limit.scale}
        found = probe.solve(_scaled(probe, limit), k=1)
        if not found.converged:
            return {}
        ratio = float(found.eigenvalues[0])
        return {"stability": ratio, "preconditioned_sharpness": ratio * limit.threshold}


def _scaled(probe: Probe, limit: StabilityEdge) -> Callable[[Tensor], Tensor]:
    """The symmetric product v -> S^1/2 (H + D) S^1/2 v, (n,)."""
    root = limit.scale**0.5

    def product(v: Tensor) -> Tensor:
        scaled = v * root
        return (probe.operator.matvec(scaled) + scaled * limit.shift) * root

    return product
