"""Products of the micro-batch gradients of a probe, taken once.

With the mean, the top eigenvectors and themselves. They cost a pass over the gradient sample, which several
measurements share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.measurements.base import Probe


@dataclass(frozen=True)
class BatchProducts:
    """Products of the deviations d_j = g_j - g, in float64.

    Attributes:
        weights: (m,), w_j, not normalised.
        images: (m, k), V d_j.
        along: (m,), g.d_j.
        squares: (m,), |d_j|^2.
        image: (k,), V g.
        square: |g|^2.
    """

    weights: Tensor
    images: Tensor
    along: Tensor
    squares: Tensor
    image: Tensor
    square: float

    @classmethod
    def of(cls, probe: Probe) -> BatchProducts:
        """Those of a probe with a subspace; taken once. A collective."""
        found = probe.shared.get(cls)
        if found is None:
            found = probe.shared[cls] = cls._taken(probe)
        return found

    @classmethod
    def _taken(cls, probe: Probe) -> BatchProducts:
        mean = probe.gradient
        image, square, _ = _products(probe, mean)
        weights, rows = [], []
        for batch, gradient in probe.batch_gradients():
            weights.append(batch.weight)
            rows.append(_products(probe, gradient - mean))
        images, along, squares = (torch.stack(column) for column in zip(*rows, strict=True))
        return cls(torch.tensor(weights, dtype=torch.float64), images, along, squares, image, float(square))


def _products(probe: Probe, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of a vector with basis (k,), mean gradient, and itself."""
    wide = vector.double()
    others = torch.stack([torch.dot(probe.gradient.double(), wide), torch.dot(wide, wide)])
    found = probe.partition.ranks.all_reduce(torch.cat([(probe.top.basis @ vector).double(), others])).cpu()
    return found[:-2], found[-2], found[-1]
