"""Loss where an optimizer step has led."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Arrival(Protocol):
    """The mean loss of the Hessian's sample near theta_{t+1}.

    What `Measurement.after_step` finds in `Probe.arrival`. The loss is that of the probe, in its types, on the module
    as the step has left it. Every method is a collective.

    Attributes:
        theta: (n,), the parameters at the probe; do not write to it.
        loss: the mean loss at theta_t; nan where one of its micro-batches is not known.
        rounding: the largest difference of two mean losses that may be rounding.
    """

    theta: Tensor

    @property
    def loss(self) -> float: ...  # noqa: D102  # above

    @property
    def rounding(self) -> float: ...  # noqa: D102

    def value(self, offset: Tensor | None = None) -> float:  # (n,)
        """The mean loss at theta_{t+1} + offset: one forward pass."""
        ...

    @property
    def is_same_loss(self) -> bool:
        """Whether the loss has changed with the measured parameters alone.

        That of the first micro-batch, taken at theta_{t+1} less the update, is compared with that of the probe. It is
        another one where it depends on parameters that are not measured, on the number of steps, on an averaged teacher
        or, in eval mode, on the statistics of batch-norm. One forward pass of a micro-batch, however often it is asked.
        """
        ...

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss at theta_{t+1}."""
        ...

    def curvature(self) -> float:
        """u.H u for the update u, with H at theta_t.

        A graph and a product; nan where products are differences of gradients, or there are none.
        """
        ...
