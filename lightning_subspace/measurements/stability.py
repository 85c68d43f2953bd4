"""Sharpness against the stability threshold of the optimizer in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor
from torch.optim import SGD

from lightning_subspace._arguments import require_flag
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.optimizer_rules import Notice, StabilityEdge, edge, sgd_threshold, why_no_edge
from lightning_subspace.measurements.prospect import Prospect


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
    rate: (lambda_1 + weight decay) over 2/lr, or over the threshold with momentum. For Adam, AdamW, Adamax, NAdam,
    RAdam, Adagrad and RMSprop: the preconditioned sharpness over its threshold (38/lr for Adam with b1 = .9; Cohen et
    al. 2022, arXiv 2207.14484, section 2), P being that of the last step taken. Each parameter group enters with its
    own settings. It crosses 1 where `sharpness_over_threshold` does.

    `preconditioned_sharpness`, where there is a P and one threshold: lambda_1 of P^-1/2 (H + D) P^-1/2, in units of
    1/lr.

    `gradient_stability`: the same ratio along the preconditioned gradient, (S g).(H + D)(S g) / (g.S g), at most
    `stability`, and of any sign; `preconditioned_gradient_curvature`, where there is one threshold, is
    gamma = (P^-1 g).(H + D)(P^-1 g) / (g.P^-1 g), in units of 1/lr (arXiv 2506.04805). g is the gradient of the loss
    with the weight decay that the optimizer adds to it. While training with the full batch lambda_1 stays at the edge
    for long; a spike of the loss follows about ten steps after this ratio has crossed 1, so look at it every few steps.
    The noise of a small sample makes the ratio small.

    Costs one product, and, with k = 0 or for another optimizer than SGD with one learning rate, an eigensolve for one
    pair, 10 to 30 products. Left out before the first step of an adaptive optimizer; `stability` also for another end
    of the spectrum than "LA" or "BE". Nothing is claimed for any other optimizer, with one warning: Lion and Muon move
    by a fixed length, so that no eigenvalue is a threshold for them (`SpectralSharpness` measures in the norm of Muon).
    `step/edge_ratio` needs no rule.

    Args:
        eigensolve: False leaves out `stability` and `preconditioned_sharpness`: the rest is one product.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for an `eigensolve` that is not True or False, or `every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Stability()])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, eigensolve: bool = True, every: int = 1) -> None:
        require_flag("eigensolve", eigensolve)
        self.eigensolve = eigensolve
        self.every = positive("every", every)
        self._notice = Notice()

    def expected_products(self, prospect: Prospect) -> float:
        """One along the gradient; an eigensolve for one pair but for SGD."""
        if why_no_edge(prospect.optimizer) is not None:
            return 0.0
        is_known = type(prospect.optimizer) is SGD and prospect.solver.k > 0
        return 1.0 if is_known or not self.eigensolve else 1.0 + prospect.solve(k=1)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One product, or an eigensolve for one pair more."""
        reason = why_no_edge(probe.optimizer)
        if reason is not None:
            self._notice.say(probe, f"Stability: {reason}, so that it is left out; `step/edge_ratio` needs no rule.")
            return {}
        limit = edge(probe)
        if limit is None:
            return {}
        has_largest = self.eigensolve and probe.which in ("LA", "BE")
        return {**_along_gradient(probe, limit), **(_largest(probe, limit) if has_largest else {})}


def _along_gradient(probe: Probe, limit: StabilityEdge) -> dict[str, float]:
    """Curvature along S g: one product."""
    gradient = probe.gradient
    if isinstance(limit.shift, Tensor) or limit.shift != 0.0:
        gradient = gradient + probe.partition.flatten(probe.parameters, like=gradient) * limit.shift
    direction = gradient * limit.scale
    square = probe.dot(gradient, direction)
    if not square > 0.0:
        return {}
    ratio = probe.dot(direction, probe.operator.matvec(direction) + direction * limit.shift) / square
    return {"gradient_stability": ratio, "preconditioned_gradient_curvature": ratio * limit.threshold}


def _largest(probe: Probe, limit: StabilityEdge) -> dict[str, float]:
    """The largest eigenvalue: no product, or an eigensolve."""
    if isinstance(limit.scale, float) and isinstance(limit.shift, float):
        space = probe.solve(probe.operator, k=1) if probe.subspace is None else probe.subspace
        return {"stability": (float(space.eigenvalues[0]) + limit.shift) * limit.scale} if space.converged else {}
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
