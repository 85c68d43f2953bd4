"""Two gradients at one theta, inside the top space and outside."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.measurements.base import Probe
from lightning_subspace.subspace.subspace import inner_products

SMALLEST = 0.1  # of a reliability by which a cosine is divided; below, the sample is nearly all noise


@dataclass(frozen=True)
class GradientPair:
    """Inner products of the gradient of training (a) and another one (b).

    Attributes:
        whole: a.a, a.b and b.b.
        top: the same of Pa and Pb; None where the top space is not known.
        k: dimension of the top space.

    Example:
        >>> pair = GradientPair((4.0, 1.0, 2.0), (2.0, 1.0, 1.0), k=1)
        >>> pair.metrics()
        {'fraction': 0.5, 'cosine': 0.35..., 'cosine_top': 0.70..., 'cosine_bulk': 0.0}
    """

    whole: tuple[float, float, float]
    top: tuple[float, float, float] | None
    k: int

    @classmethod
    def of(cls, probe: Probe, other: Tensor) -> GradientPair:  # (n,)
        """The pair of the probe's gradient and another one. A collective."""
        gram = inner_products(rows := torch.stack([probe.gradient, other]), rows, probe.partition.ranks)
        whole = _upper(gram)
        if probe.subspace is None:  # k = 0: all is bulk; without products k is not known
            return cls(whole, (0.0, 0.0, 0.0) if probe.operator.has_products else None, 0)
        if not probe.subspace.trusted:
            return cls(whole, None, probe.subspace.k)
        along = inner_products(rows, probe.top.basis, probe.partition.ranks)
        return cls(whole, _upper(along @ along.T), probe.subspace.k)

    @property
    def knows_bulk(self) -> bool:
        """Whether the two are known apart."""
        return self.top is not None

    @property
    def bulk(self) -> tuple[float, float, float]:
        """Those outside of the top space; nan where it is not known."""
        if self.top is None:
            return math.nan, math.nan, math.nan
        first, mixed, second = (a - b for a, b in zip(self.whole, self.top, strict=True))
        return first, mixed, second

    def metrics(self) -> dict[str, float]:
        """Fraction and cosines; nan where one is not defined."""
        found = {"cosine": _cosine(self.whole)}
        if self.top is None:
            return found
        if self.k:
            fraction = min(self.top[2] / self.whole[2], 1.0) if self.whole[2] > 0.0 else math.nan
            found = {"fraction": fraction, **found, "cosine_top": _cosine(self.top)}
        return {**found, "cosine_bulk": _cosine(self.bulk)}

    def corrected(self, first: float, second: float) -> dict[str, float]:
        """Reliabilities of both in the bulk, and the cosine without their noise.

        Args:
            first: the expected noise in |(1 - P) a|^2.
            second: in that of b.
        """
        own = self.bulk
        reliabilities = [
            1.0 - noise / square if square > 0.0 else math.nan for noise, square in ((first, own[0]), (second, own[2]))
        ]
        found = {"training_reliability_bulk": reliabilities[0], "reliability_bulk": reliabilities[1]}
        if min(reliabilities) > SMALLEST:  # also no nan
            found["cosine_bulk_corrected"] = _cosine(own, clamp=False) / math.sqrt(reliabilities[0] * reliabilities[1])
        return found


def noise_of(probe: Probe, gradients: Iterable[tuple[MicroBatch, Tensor]], mean: Tensor, share: float = 0.0) -> float:
    """Expected |(1 - P)(mean - truth)|^2 of a mean gradient. A collective.

    From the spread of the micro-batches b with weights w_b, m/(m - 1) sum_b w_b^2 |(1 - P)(g_b - mean)|^2 / (sum w)^2.

    Args:
        probe: gives the top space.
        gradients: (n,) of each micro-batch.
        mean: theirs, (n,).
        share: of the population that they are; all of it has no noise.

    Returns:
        nan for a single micro-batch.
    """
    total = spread = 0.0
    count = 0
    for batch, gradient in gradients:
        deviation = gradient - mean
        square = probe.dot(deviation, deviation)
        if probe.subspace is not None:
            along = inner_products(deviation[None], probe.top.basis, probe.partition.ranks)
            square -= float(along.square().sum())
        spread += batch.weight**2 * max(square, 0.0)
        total += batch.weight
        count += 1
    if share >= 1.0:
        return 0.0
    return (1.0 - share) * count / (count - 1) * spread / total**2 if count > 1 else math.nan


def _upper(gram: Tensor) -> tuple[float, float, float]:
    return float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])


def _cosine(products: tuple[float, float, float], *, clamp: bool = True) -> float:
    first, mixed, second = products
    if not (first > 0.0 and second > 0.0):
        return math.nan
    cosine = mixed / math.sqrt(first) / math.sqrt(second)
    return min(max(cosine, -1.0), 1.0) if clamp else cosine
