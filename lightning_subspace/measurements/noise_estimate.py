"""Noise of a mean gradient, and its length without that.

Micro-batches j of b_j examples, disjoint, drawn from N without replacement; B = sum b_j, g the mean over all of them:

    S   = sum_j b_j |g_j - g|^2 / (m - 1)      trace of the covariance of single examples' gradients
    G^2 = |g|^2 - S (1/B - 1/N)                squared gradient of the whole set

are unbiased (McCandlish et al., arXiv 1812.06162, appendix A.1, where N is infinite), and B_simple = S/G^2. Its error
is that of log S - f log G^2 by the delete-one jackknife over groups of micro-batches. f^2 = 1 - B/N: the whole set has
the gradient of the whole set, but its micro-batches could have been others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.data.sample import Sample

STANDARD_ERRORS = 2.0  # on each side; covers B_simple in 89 to 100 % of samples (digits, 16 to 112 micro-batches)
ROUNDING = 1e-6  # of squares inside a space of float32 vectors, relative to the whole


@dataclass(frozen=True)
class Deviations:
    """Deviations of the gradients of M groups of micro-batches from their mean.

    d_j = g_j - g, D = sum over the micro-batches of a group of b_j d_j. All in float64.

    Attributes:
        counts: (M,), number of micro-batches in each group.
        sizes: (M,), number of their examples.
        squares: (M,), sum of b_j |d_j|^2.
        along: (M,), D.g.
        own: (M,), |D|^2.
        square: |g|^2.
    """

    counts: Tensor
    sizes: Tensor
    squares: Tensor
    along: Tensor
    own: Tensor
    square: float

    def __sub__(self, other: Deviations) -> Deviations:
        """Those outside of a subspace, from those inside; 0 for rounding."""
        if float((self.squares - other.squares).sum()) <= ROUNDING * float(self.squares.sum()):
            zero = torch.zeros_like(self.squares)
            return Deviations(self.counts, self.sizes, zero, zero, zero, 0.0)
        differences = (getattr(self, name) - getattr(other, name) for name in ("squares", "along", "own", "square"))
        return Deviations(self.counts, self.sizes, *differences)


@dataclass(frozen=True)
class NoiseEstimate:
    """S, G^2, B_simple and its interval; nan where unknown.

    Example:
        >>> one = torch.ones(4, dtype=torch.float64)
        >>> found = NoiseEstimate.of(Deviations(one, 8 * one, 6 * one, 0 * one, 0 * one, 1.0), population=32.0)
        >>> found.variance, found.square, found.scale
        (8.0, 1.0, 8.0)
    """

    variance: float
    square: float
    scale: float
    low: float
    high: float

    @classmethod
    def of(cls, deviations: Deviations, population: float) -> NoiseEstimate:
        """The estimate for a training set of so many examples.

        `scale` is told where G^2 is positive, also without any one group. Otherwise the sample is too small for it, and
        `low` is B.
        """
        d, nan = deviations, math.nan
        size = float(d.sizes.sum())
        rest, left = size - d.sizes, d.counts.sum() - d.counts  # without each group
        whole = torch.tensor(d.square, dtype=d.squares.dtype)
        variance, square = _unbiased(d.squares.sum(), whole, size, float(d.counts.sum()), population)
        if not bool((left >= 2).all()):
            return cls(float(variance), float(square), nan, nan, nan)
        variances, squares = _unbiased(
            d.squares.sum() - d.squares - d.own / rest,
            d.square - 2.0 * d.along / rest + d.own / rest**2,
            rest,
            left,
            population,
        )
        if not (square > 0.0 and bool((squares > 0.0).all())):
            return cls(float(variance), float(square), nan, size if variance > 0.0 else nan, nan)
        scale = max(float(variance / square), 0.0)
        if not (variance > 0.0 and bool((variances > 0.0).all())):  # equal micro-batches, to rounding
            return cls(float(variance), float(square), scale, nan, nan)
        correction = math.sqrt(max(1.0 - size / population, 0.0))
        logs = variances.log() - correction * squares.log()
        factor = math.exp(STANDARD_ERRORS * float((len(logs) - 1) * logs.var(correction=0)) ** 0.5)
        return cls(float(variance), float(square), scale, scale / factor, scale * factor)


def example_sizes(sample: Sample) -> Tensor:  # (m,), float64
    """Examples in each micro-batch, in proportion to the weights.

    A micro-batch of an unknown number of examples counts as one.
    """
    batches = (*sample.hessian, *sample.extra)
    weights = torch.tensor([batch.weight for batch in batches], dtype=torch.float64)
    return weights * (sum(max(batch.size, 1) for batch in batches) / weights.sum())


def participation(gram: Tensor) -> float:  # (M, M)
    """Squared trace over the sum of squared eigenvalues, in [1, M].

    Example:
        >>> participation(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
        2.0
    """
    squares = float(gram.square().sum())
    return float(gram.diagonal().sum()) ** 2 / squares if squares > 0.0 else math.nan


def _unbiased(
    squares: Tensor, mean: Tensor, size: Tensor | float, count: Tensor | float, population: float
) -> tuple[Tensor, Tensor]:
    """S and G^2 from sum b_j |d_j|^2 and |g|^2."""
    variance = squares / (count - 1)
    share = 1.0 / torch.as_tensor(size, dtype=torch.float64) - 1.0 / population
    return variance, mean - variance * share.clamp(min=0.0)
