"""Mean loss of the sample that the gradient is taken of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss, place_of
from lightning_subspace.measurements.base import Measurement, Needs, Probe
from lightning_subspace.parallel.ranks import Ranks


class SampleLoss(Measurement):
    """`sample_loss`: the mean loss over the gradient sample at theta_t.

    It costs no pass, since the gradient has needed one. The monitor sets `training_loss` beside it, the mean of the
    losses that training itself returned around that step.
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    extra: ClassVar[frozenset[str]] = frozenset({"sample_loss", "training_loss"})

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """No product."""
        return {"sample_loss": SampleMean.of(probe.losses, (*probe.sample.hessian, *probe.sample.extra)).mean}


@dataclass(frozen=True)
class SampleMean:
    """A mean loss over micro-batches, and how far they spread.

    Attributes:
        mean: weighted as the gradient is; nan if no loss is known.
        plain: the mean with equal weights, as an optimizer sees batches of different sizes.
        spread: standard deviation of the losses; 0 for one alone, which has none.
        count: number of micro-batches of equal weight that would give as exact a mean.
        size: examples in a micro-batch, on average; 1 where it is not known.

    Example:
        >>> SampleMean.of([1.0, 4.0], [MicroBatch(None, 2.0, 0, size=2), MicroBatch(None, 1.0, 1, size=1)])
        SampleMean(mean=2.0, plain=2.5, spread=2.1213203435596424, count=1.8, size=1.5)
    """

    mean: float
    plain: float
    spread: float
    count: float
    size: float

    @classmethod
    def of(cls, losses: Sequence[float], batches: Sequence[MicroBatch]) -> SampleMean:
        """Statistics of the losses that are finite."""
        found = [(v, b) for v, b in zip(losses, batches, strict=False) if math.isfinite(v)]
        if not found:
            return cls(math.nan, math.nan, 0.0, 0.0, 1.0)
        total, number = sum(b.weight for _, b in found), len(found)
        mean = sum(v * b.weight for v, b in found) / total
        plain = sum(v for v, _ in found) / number
        variance = sum((v - plain) ** 2 for v, _ in found) / max(number - 1, 1)
        count = total**2 / sum(b.weight**2 for _, b in found)
        size = sum(max(b.size, 1) for _, b in found) / number
        return cls(mean, plain, math.sqrt(variance), count, size)


def known_losses(loss: TrainingLoss, sample: Sample, ranks: Ranks) -> tuple[float, ...]:
    """The losses of the gradient sample, from all ranks; a collective."""
    batches = (*sample.hessian, *sample.extra)
    # A loss may contain collectives, and then be another one where a rank evaluates a batch that is not its own.
    own = [batch for batch in batches if owner_rank(batch, ranks) == ranks.index and place_of(batch) in loss.values]
    values = torch.stack([loss.values[place_of(batch)] for batch in own]).tolist() if own else []
    known: dict[tuple[int, int, int], float] = {}
    for found in ranks.all_gather_object(dict(zip(map(place_of, own), values, strict=True))):
        known.update(found)
    return tuple(known.get(place_of(batch), math.nan) for batch in batches)
