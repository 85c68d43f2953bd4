"""Base of the operators that take differences of gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean


class DisplacedGradients(BatchMean):
    """An operator that evaluates gradients at displaced parameters; see `BatchMean`.

    It needs no second derivative and the memory of a training step; no graph is kept.
    """

    raises_after_collectives = False  # a product takes memory between its sums

    def _gradient_at(self, direction: Tensor, scale: float) -> Tensor:  # (whole n,) -> (n,)
        """This rank's part of g(theta + scale * direction)."""

        def gradients() -> Iterator[Tensor]:  # inside of the sum, as a displacement takes memory
            self._loss.displace(direction * scale)
            yield from (self._gradient_of(batch) for batch, _ in self._assignments)

        try:
            return self._mean_of(gradients())
        finally:
            self._loss.displace(None)

    def _norms(self, *vectors: Tensor) -> list[float]:
        """The lengths of vectors over all ranks, in one sum."""
        squares = torch.stack([torch.linalg.vector_norm(vector).square() for vector in vectors])
        norms: list[float] = self.partition.ranks.all_reduce(squares).sqrt().tolist()
        return norms
