"""Comparison of two samples of one loss.

It finds out whether the data of training have changed, by their losses and by the sizes of their tensors. Both are
evaluated at the same parameters, in the same mode, so that nothing but their examples can make a difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import tensors_of
from lightning_subspace.state.layouts import dense_parts

Z = 4.0  # standard errors of the difference of the means
FEW, Z_OF_FEW = 12, 6.0  # so few losses estimate their spread badly
LEAST_SPREAD = 0.25  # of micro-batches, relative to the smaller mean: two may be alike by chance


def traits_of(loss: TrainingLoss, sample: Sample, ranks: Ranks) -> list[tuple[float, ...]]:
    """Loss and sizes of tensors of each micro-batch. A collective.

    The size is the root mean square of what is stored.

    Args:
        loss: an open context.
        sample: each rank evaluates its own part of the Hessian's, in one forward pass each.
        ranks: the processes that share it.
    """
    own = []
    for batch in sample.hessian:
        if owner_rank(batch, ranks) == ranks.index:
            try:
                value = loss.value_at(None, [(batch, 1.0)])
            except Exception:  # what is wrong shows in the probe; and a batch may have no loss
                continue
            own.append((value, *map(_size, tensors_of(batch.data))))
    return [traits for several in ranks.all_gather_object(own) for traits in several if all(map(math.isfinite, traits))]


def differ(one: Sequence[tuple[float, ...]], other: Sequence[tuple[float, ...]]) -> bool:
    """Whether two samples differ in any trait that all their batches have."""
    common = min((len(traits) for traits in (*one, *other)), default=0)
    is_alike = all(len(traits) == common for traits in (*one, *other))
    columns = range(common if is_alike else min(common, 1))
    return any(are_apart([traits[i] for traits in one], [traits[i] for traits in other]) for i in columns)


def are_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two means differ by more than their spreads.

    Example:
        >>> losses = [1.0, 1.2, 0.9, 1.1]
        >>> are_apart(losses, [1.1, 1.0, 0.9, 1.2]), are_apart(losses, [3.0, 3.1, 2.8, 3.2])
        (False, True)
    """
    if min(len(one), len(other)) < 2:  # a single one has no spread
        return False
    means = [statistics.fmean(values) for values in (one, other)]
    squares = sum((value - mean) ** 2 for values, mean in zip((one, other), means, strict=True) for value in values)
    count = len(one) + len(other)
    spread = max(math.sqrt(squares / max(count - 2, 1)), LEAST_SPREAD * min(map(abs, means)))
    error = spread * math.sqrt(1.0 / len(one) + 1.0 / len(other))
    return abs(means[0] - means[1]) > (Z_OF_FEW if count < FEW else Z) * error


def _size(tensor: Tensor) -> float:
    """Root mean square of what is stored; 0 for nothing."""
    parts = [part.detach().resolve_conj() for part in dense_parts(tensor)]
    count = sum(part.numel() for part in parts)
    real = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    return math.sqrt(float(sum(part.double().square().sum() for part in real)) / count) if count else 0.0
