"""Record of a probe whose optimizer step is still to come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.measurements import Probe
from lightning_subspace.state.failure import Waiting
from lightning_subspace.subspace.record import Record


@dataclass
class OpenRecord:
    """A record that waits for the optimizer step taken from its point.

    Attributes:
        probe: for `Measurement.after_step`; its operator is over.
        record: what is known at theta_t; its subspace holds the eigenvectors.
        theta: (n,), the parameters at the probe.
        choice: the configuration of its loss.
        gradient: (n,), the accumulated mini-batch gradient of the next step, before clipping, once it is known.
        failure: why it is not known.
    """

    probe: Probe
    record: Record
    theta: Tensor
    choice: CurvatureConfig
    gradient: Tensor | None = None
    failure: Waiting = field(default_factory=Waiting)

    def see_gradient(self, module: nn.Module) -> None:
        """Keep the gradient of the first step after the probe. Never raises."""
        if self.gradient is None and not self.failure:
            partition = self.probe.partition
            try:
                self.gradient = partition.flatten([p.grad for p in partition.space.tensors(module)], like=self.theta)
            except Exception as error:  # no memory, or a parameter that has gone: told when the record is closed
                self.failure.keep(error)


def ended(probe: Probe) -> Probe:
    """The probe without its operator, so that its graphs are freed."""
    over: Any = _Over(probe.operator.dtype)
    return replace(probe, operator=over, solve=over, batch_gradients=over, another=over, tally=None)


class _Over:
    """Stand-in for what a probe could do while it lasted."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` was asked for after the probe; the operator can be used in `measure` only.")

    def __call__(self, *args: object, **named: object) -> NoReturn:
        raise RuntimeError("the probe is over; the operator can be used in `measure` only.")
