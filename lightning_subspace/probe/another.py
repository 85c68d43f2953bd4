"""Operators of other losses within a probe, and data read before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_subspace.curvature import Operator
from lightning_subspace.curvature.gradient_mean import GradientMean
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.another import another_loss
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.loss_function import LossFunction
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Measurement
from lightning_subspace.parallel.partition import Partition


def prepare(measurements: Iterable[Measurement], number: int, partition: Partition) -> None:
    """Have those that are due read their data. A collective."""
    for measurement in measurements:
        if measurement.is_due(number):
            measurement.prepare(partition)


def another_operator(
    loss: TrainingLoss,
    hessian: Operator,
    make: Callable[[TrainingLoss, Sample, Partition], Operator],
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    products: bool = True,
) -> Operator:
    """The operator of another loss, at the same theta. A collective.

    Args:
        loss: of the probe, an open context.
        hessian: the operator of the probe.
        make: what has made it.
        batches: as for `sample_of_batches`, or micro-batches.
        loss_fn: by default that of the probe.
        products: whether products are wanted; without, no graph is kept. The self-check is of the training loss, and
            says nothing of second derivatives of another one.

    Raises:
        LossError: when the loss cannot be evaluated.
        SampleError: for what is no list of batches.
    """
    partition = hessian.partition
    sample = sample_of_batches(batches, None, partition.ranks)
    other = another_loss(loss, loss_fn)
    if products or isinstance(loss, ShardedLoss):
        return make(other, sample, partition)
    return GradientMean(other, sample.hessian, dtype=hessian.dtype, partition=partition)
