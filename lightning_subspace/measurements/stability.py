"""The sharpness against what the optimizer in use can stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch.optim import SGD, Optimizer

from lightning_subspace.measurements.measurement import Measurement, Needs, Probe


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
        lr, momentum = float(group["lr"]), float(group["momentum"])
        if lr <= 0.0:
            continue
        if group["maximize"] or (momentum and group["dampening"]):
            return None
        edge = (2 + 2 * momentum) / (lr * (1 + 2 * momentum if group["nesterov"] else 1))
        thresholds.append(edge - float(group["weight_decay"]))
    threshold = min(thresholds, default=0.0)
    return threshold if threshold > 0.0 else None
