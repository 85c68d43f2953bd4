"""Randomness of a loss beside its examples, and draws against it.

Found by the gradient of one micro-batch under two seeds, not by its value: dropout before a layer of zeros, as at the
start of training, moves no value, and noise that is added to the loss moves no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_subspace.curvature import Operator
from lightning_subspace.data.draws import repeated
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample, SampleSpec
from lightning_subspace.loss.loss_function import NoLossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition

# A relative change of the gradient by less moves a fraction of its square by less than two thousandths; sums in another
# order, on an accelerator, move it by far less.
LEAST_CHANGE = 1e-3
# Evaluations for sample="all", which gives no number: the defaults of the arguments.
HESSIAN, GRADIENT = 1024, 8192


def is_random(
    loss: TrainingLoss,
    operator: Callable[[TrainingLoss, Sample, Partition], Operator],
    batches: Sequence[MicroBatch],
    partition: Partition,
) -> bool:
    """Whether the first gradient depends on the random seed. A collective.

    Costs two gradients of a micro-batch, or three where others than the first one have to be held by ranks.

    Args:
        loss: an open context.
        operator: makes the operator of the run.
        batches: the first one decides; the others give each rank one to evaluate at weight zero meanwhile.
        partition: how vectors are dealt to ranks.
    """
    ranks, batch = partition.ranks, batches[0]
    held = operator(loss, Sample(tuple(batches)), partition)
    first = held.gradient() if len(batches) == 1 else held.mean_gradient([batch])
    second, is_missing = first, False
    try:
        second = held.mean_gradient([replace(batch, draw=batch.draw + 1)])
    except NoLossError:
        is_missing = True
    if any(ranks.all_gather_object(is_missing)):  # on the rank that has evaluated it
        return True
    squares = torch.stack([vector.double().square().sum() for vector in (first - second, first, second)])
    change, *sizes = ranks.all_reduce(squares).tolist()
    return bool(change > LEAST_CHANGE**2 * max(sizes))


def with_draws(sample: Sample, spec: SampleSpec, *, measures: bool) -> Sample:
    """The sample of a random loss; see `repeated`.

    Args:
        sample: one draw of every micro-batch.
        spec: gives the numbers of evaluations.
        measures: whether a gradient is measured.
    """
    hessian = spec.sample if isinstance(spec.sample, int) else HESSIAN
    gradient = spec.gradient_sample if isinstance(spec.gradient_sample, int) else GRADIENT
    return repeated(sample, hessian, gradient if measures else hessian)


def remark(sample: Sample, *, has_products: bool = True, has_bar: bool = True) -> str:
    """One sentence to the user about the draws that are measured.

    Args:
        sample: all draws.
        has_products: whether the first part is the Hessian's; without products it gives the loss behind a step.
        has_bar: whether an error bar of the gradient fraction is asked for.
    """
    every = (*sample.hessian, *sample.extra)
    batches, first = (len({batch.index for batch in part}) for part in (every, sample.hessian))
    return (
        "the loss is random beside its examples: another seed gives another gradient of the same micro-batch (dropout, "
        f"noise, points drawn in the step). Measured: {len(every)} draws of {_shown(batches)} for the gradient, "
        f"{len(sample.hessian)} of {_shown(first)} for the {'Hessian' if has_products else 'loss after a step'}"
        f"{'; the error bar, where there is one, covers the draws, too' if has_bar else ''}."
    )


def _shown(count: int) -> str:
    return f"{count} micro-batch{'' if count == 1 else 'es'}"
