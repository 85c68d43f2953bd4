"""Gradients of the mean loss at displaced parameters: what all differences of gradients have in common.

A displacement is a whole vector, and so is what a rank adds to the mean; what comes and goes is dealt to ranks, as in
`Hessian`. No graph is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.micro_batch import MicroBatch
from lightning_subspace.partition import Partition
from lightning_subspace.rounds import Turn
from lightning_subspace.training_loss import TrainingLoss


class DisplacedGradients(Hessian):
    """A Hessian whose products are made of gradients.

    Args:
        loss: an open context; it must stay open as long as products are taken.
        batches: the fixed sample; weights need not be normalised.
        dtype: of the vectors that come and go; None: that of the loss.
        partition: how vectors are dealt to ranks; None: all to this process.

    Raises:
        ValueError: for an empty sample.
    """

    fails_as_nan = False  # it takes memory between its sums

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype | None = None,
        partition: Partition | None = None,
    ) -> None:
        super().__init__(loss, batches, memory=0.0, partition=partition)
        self.dtype = loss.dtype if dtype is None else dtype

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss over the sample."""
        return self._centre().to(self.dtype, copy=True)

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch, of all ranks, with the gradient of its own mean loss, (n,)."""
        return self.other_gradients(self.batches)

    def other_gradients(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each of other micro-batches, of all ranks, with the gradient of its own mean loss, (n,)."""
        like = self._transfers.total
        own = (self._add(torch.zeros_like(like), [Turn(batch, 1.0)]) for batch, _ in self._rounds(batches))
        return self._dealt_out(batches, own)

    def mean_gradient(self, batches: Sequence[MicroBatch]) -> Tensor:  # (n,)
        """Gradient of the mean loss over other micro-batches, taken once."""
        return self._mean_at(None, self._rounds(batches)).to(self.dtype)

    def _norms(self, *vectors: Tensor) -> list[float]:
        """The lengths of vectors over all ranks, in one sum."""
        squares = torch.stack([torch.linalg.vector_norm(vector).square() for vector in vectors])
        norms: list[float] = self.partition.ranks.all_sum(squares).sqrt().tolist()
        return norms

    def _centre(self) -> Tensor:
        """This rank's part of g(theta), in the precision of the loss."""
        if self._mean is None:
            self._mean = self._mean_at(None, self._turns)
        return self._mean

    def _retain(self, memory: float) -> None:
        """Keep nothing."""
        self._graphs = [None] * len(self._turns)

    def _mean_at(
        self,
        direction: Tensor | None,  # (n,) of the whole space
        turns: Sequence[Turn],
        scale: float = 1.0,
    ) -> Tensor:
        """This rank's part of the gradient of the mean loss at theta + scale * direction."""

        def add(total: Tensor) -> None:
            self._add(total, turns, None if direction is None else direction * scale)

        return self._summed(add)

    def _add(self, total: Tensor, turns: Iterable[Turn], offset: Tensor | None = None) -> Tensor:
        """Add what this rank has of the gradient of the mean loss at theta + offset."""
        self._loss.displace(offset)
        try:
            for batch, share in turns:
                gradient = backward_gradient(self._loss, batch)
                if share:
                    total.add_(gradient, alpha=share)
        finally:
            self._loss.displace(None)
        return total
