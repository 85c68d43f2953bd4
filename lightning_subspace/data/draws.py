"""Repeated draws of a sample, for a loss that is random.

Dropout, noise and points drawn in the training step make the loss an expectation over more than its examples. One
evaluation of an example is one draw of it, and the whole training set, evaluated once, is not the whole truth. So a
sample that has no more examples to give is evaluated again, with fresh random numbers: as many whole passes as the
numbers of evaluations asked for allow. A draw of a micro-batch shares its data, its rank and its `batch_idx`; its seed
is another. What is estimated from the examples and the draws together has no end: the population is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample

# The size of the micro-batches in the default work: 1,024 examples are 32 of them, 8,192 are 256. A training set of few
# items, each a dummy for points that the training step draws, is drawn so often at most, and not 8,192 times.
EXAMPLES = 32
# What an error bar needs: two draws to be told apart for the Hessian, and a variance for the gradient.
LEAST_HESSIAN, LEAST_GRADIENT = 2, 8
# So many micro-batches of a training set of unknown size show the noise of their examples, which repeats do not lower.
ENOUGH = 32


def repeated(sample: Sample, hessian: int, gradient: int) -> Sample:
    """The sample with as many draws as there is room for.

    Args:
        sample: one draw of every micro-batch.
        hessian: number of example evaluations for the Hessian.
        gradient: the same for the gradient, those of the Hessian included.

    Returns:
        Draws of one micro-batch stand side by side, so that each half of the sample has draws of all of them. The data
        are not copied.

    Example:
        >>> one = MicroBatch(None, 4.0, index=0, size=4)
        >>> both = repeated(Sample((one,), population=4), hessian=128, gradient=256)
        >>> [batch.draw for batch in both.hessian], [batch.draw for batch in both.extra], both.hessian_share
        ([0, 1, 2, 3], [4, 5, 6, 7], 0.0)
    """
    once = replace(sample, population=math.inf)
    if not _is_exhausted(sample):
        return once
    # A part of the examples has as many as were asked for.
    first = 1 if sample.extra else _passes(sample.hessian, hessian, LEAST_HESSIAN)
    every = max(first, _passes((*sample.hessian, *sample.extra), gradient, LEAST_GRADIENT))
    extra = (*_draws(sample.extra, range(every)), *_draws(sample.hessian, range(first, every)))
    return replace(once, hessian=_draws(sample.hessian, range(first)), extra=extra)


def _draws(batches: Sequence[MicroBatch], numbers: range) -> tuple[MicroBatch, ...]:
    return tuple(replace(batch, draw=number) for batch in batches for number in numbers)


def _passes(batches: Sequence[MicroBatch], evaluations: int, least: int) -> int:
    """How often all of them are evaluated."""
    examples, count = sum(max(batch.size, 1) for batch in batches), len(batches)
    return max(1, min(evaluations // examples, evaluations // EXAMPLES // count), -(-least // count))


def _is_exhausted(sample: Sample) -> bool:
    """Whether there are no more examples to take."""
    if math.isinf(sample.population):
        return len(sample.hessian) + len(sample.extra) < ENOUGH
    return sample.gradient_share >= 1.0
