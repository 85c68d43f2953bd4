"""The pass over the gradient sample: the Hessian's micro-batches, then the others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lightning_subspace.curvature import Operator
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.gradient_tally import GradientTally
from lightning_subspace.loss.training_loss import TrainingLoss, place_of
from lightning_subspace.measurements.noise_estimate import example_sizes


def begin_tally(loss: TrainingLoss, sample: Sample) -> GradientTally:
    """Have an open loss tally the sample's gradients, from now on."""
    places = [place_of(batch) for batch in (*sample.hessian, *sample.extra)]
    loss.tally = GradientTally(places, example_sizes(sample).tolist(), loss.space.n, loss.device)
    return loss.tally


def gradient_over(hessian: Operator, own: Tensor, sample: Sample) -> Tensor:  # (n,)
    """The gradient over the gradient sample.

    Args:
        hessian: the operator.
        own: (n,), the gradient over the Hessian's sample, which it begins with.
        sample: the micro-batches.
    """
    if not sample.extra:
        return own
    first, rest = (sum(batch.weight for batch in part) for part in (sample.hessian, sample.extra))
    other = hessian.mean_gradient(sample.extra).mul_(rest / (first + rest))
    return other.add_(own, alpha=first / (first + rest))


def gradients_by_batch(hessian: Operator, sample: Sample) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Each micro-batch of the gradient sample with its gradient, (n,)."""
    yield from hessian.batch_gradients()
    yield from hessian.other_gradients(sample.extra)
