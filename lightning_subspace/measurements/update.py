"""Where the optimizer goes from theta_t."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_subspace.measurements.base import Measurement, Probe


class UpdateFraction(Measurement):
    """`update_fraction`, `batch_gradient_fraction`: shares inside the top space of the step taken from theta_t.

    |P u|^2 / |u|^2 for u = theta_{t+1} - theta_t (after clipping, momentum, preconditioning and weight decay), and the
    same for the accumulated mini-batch gradient of that step. Both in [0, 1]; a random direction gives k/n.
    """

    def after_step(
        self,
        probe: Probe,
        gradient: Tensor | None,  # (n,)
        update: Tensor,  # (n,)
    ) -> Mapping[str, float]:
        """One product of the basis with each."""
        metrics = {"update_fraction": probe.top.fraction(update)}
        if gradient is not None:
            metrics["batch_gradient_fraction"] = probe.top.fraction(gradient)
        return metrics
