"""Loss of a probe's sample where the step has led.

The module is at theta_{t+1} by then, so theta_t is the displacement by -u. Each call opens the loss of the probe anew,
with the module's state as it is now.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_subspace.curvature import CurvatureConfig, Operator
from lightning_subspace.curvature.hessian import RetainedGraphs
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.precision import trained_in
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Probe
from lightning_subspace.measurements.critical_sharpness import ROUNDING
from lightning_subspace.probe.screening import Screening
from lightning_subspace.subspace.subspace import inner_products

T = TypeVar("T")


class LossAfterStep:
    """An `Arrival`: the loss of a probe's sample after its step.

    Args:
        choice: the configuration of the probe.
        module: after the step.
        probe: over by now.
        theta: (n,), the parameters at the probe.
        update: (n,), the step that was taken from there.
    """

    def __init__(self, choice: CurvatureConfig, module: nn.Module, probe: Probe, theta: Tensor, update: Tensor) -> None:
        self.theta = theta
        self._update = update
        self._choice = choice
        self._module = module
        self._partition = probe.partition
        self._sample = Sample(probe.sample.hessian)
        self._before = probe.losses[: len(probe.sample.hessian)]
        self._dtype = probe.operator.dtype
        self._slope = probe.gradient if probe.sample_gradient is None else probe.sample_gradient

    @cached_property
    def loss(self) -> float:
        """The mean loss at theta_t."""
        weights = [batch.weight for batch in self._sample.hessian]
        return math.fsum(w * value for w, value in zip(weights, self._before, strict=True)) / math.fsum(weights)

    @property
    def rounding(self) -> float:
        """The largest difference of two mean losses that may be rounding."""
        return self._rounding(self.loss)

    def value(self, offset: Tensor | None = None) -> float:  # (n,)
        """The mean loss at theta_{t+1} + offset."""
        return self._evaluated(lambda loss, sample: self._mean(loss, sample).value(offset))

    @cached_property
    def is_same_loss(self) -> bool:
        """Whether the first micro-batch has the loss of the probe at theta_t."""
        update = self._update
        again = self._evaluated(lambda loss, sample: self._mean(loss, sample).part([0]).value(-update))
        # The update is rounded where a parameter has changed by more than its half.
        vectors = torch.stack([self._slope, update.to(self._slope)])
        lengths = inner_products(vectors, vectors, self._partition.ranks).diagonal().sqrt()
        missed = ROUNDING * torch.finfo(self.theta.dtype).eps * float(lengths.prod())
        return abs(again - self._before[0]) <= self._rounding(self._before[0]) + missed

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss at theta_{t+1}."""
        return self._evaluated(lambda loss, sample: self._mean(loss, sample).gradient())

    def curvature(self) -> float:
        """u.H u, from a graph at theta_{t+1} - u and a product."""
        update = self._update

        def bend(loss: TrainingLoss, sample: Sample) -> float:
            loss.displace(-self._partition.gather(update.to(loss.dtype)))
            operator = replace(self._choice, most_joined=1).operator(loss, sample, self._partition)
            if not isinstance(operator, RetainedGraphs):  # it displaces the parameters itself
                return math.nan
            image = operator.matvec(update.to(operator.dtype))
            return float(inner_products(image[None], update[None], self._partition.ranks))

        return self._evaluated(bend)

    def _rounding(self, value: float) -> float:
        # Without a type of its own the loss is computed in that of training.
        dtype = trained_in(self._module) if self._choice.dtype == "native" else self._dtype
        eps = torch.finfo(dtype).eps
        return ROUNDING * eps * abs(value)

    def _mean(self, loss: TrainingLoss, sample: Sample) -> Operator:
        return self._choice.mean(loss, sample, self._partition)

    def _evaluated(self, block: Callable[[TrainingLoss, Sample], T]) -> T:
        """Run a block in the open loss; see `Screening.run`."""
        space, ranks = self._partition.space, self._partition.ranks

        def loss() -> TrainingLoss:
            return self._choice.loss(self._module, space, ranks)

        def opened(sample: Sample) -> T:
            with loss() as open_loss:
                return block(open_loss, sample)

        return Screening().run(opened, self._sample, loss, ranks)
