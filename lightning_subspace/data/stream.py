"""Fixed sample of a stream: copies of the first batches of training.

For loaders whose examples cannot be drawn by index; they are not iterated. The copies have been through the transfer
hooks, which are not called again. Each rank keeps its own batches, and all exchange the numbers of examples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_subspace.data.micro_batch import MicroBatch, SampleError, Weight
from lightning_subspace.data.sample import Sample, micro_batch
from lightning_subspace.parallel.ranks import Ranks


class StreamSample:
    """A sample that fills with the batches of the first epoch.

    Args:
        sample: number of examples for the Hessian, in whole batches.
        gradient_sample: number of examples for the gradient, those of the Hessian included.
        weight: weight of a batch in the mean; by default its number of examples.
        ranks: the process group.

    Raises:
        SampleError: for a size that is not a number, since a stream may have no end.

    Example:
        >>> import torch
        >>> stream = StreamSample(6, 12)
        >>> for epoch, batch in [(0, torch.zeros(4, 2)), (0, torch.ones(4, 2)), (1, torch.zeros(4, 2))]:
        ...     stream.add(batch, epoch)
        ...     stream.sample is not None
        False
        True
        True
        >>> [batch.size for batch in stream.sample.hessian], stream.sample.extra
        ([4, 4], ())
    """

    def __init__(
        self, sample: int | str, gradient_sample: int | str, weight: Weight | None = None, ranks: Ranks | None = None
    ) -> None:
        if isinstance(sample, str) or isinstance(gradient_sample, str):
            raise SampleError(
                "sample: expected numbers of examples, got 'all', which needs a training set whose end is known; pass "
                "numbers as sample= and gradient_sample=, or sample='current'."
            )
        self._sizes = sample, max(sample, gradient_sample)
        self._weight = weight
        self._ranks = ranks or Ranks()
        self._batches: list[MicroBatch] = []
        self._epoch: int | None = None  # the first one: in the next, the same examples come again
        self._is_closed = False

    @property
    def num_examples(self) -> int:
        """Number of examples so far, on all ranks."""
        return sum(batch.size for batch in self._batches)

    @property
    def sample(self) -> Sample | None:
        """The sample so far, or None if too small for the Hessian."""
        if not self._batches or (not self._is_closed and self.num_examples < self._sizes[0]):
            return None
        return Sample.of(self._batches, self._sizes[0])

    def add(self, batch: Any, epoch: int) -> None:
        """Add a copy of a batch until there are enough. A collective.

        Raises:
            SampleError: when its number of examples cannot be told.
        """
        if self._epoch is None:
            self._epoch = epoch
        if epoch != self._epoch or self.num_examples >= self._sizes[1]:
            self.close()
        if self._is_closed:
            return
        with self._ranks.agree():
            index = len(self._batches) + self._ranks.index
            own = micro_batch(batch, index, self._weight, transferred=True)
            listed = self._ranks.all_gather_object(replace(own, data=None, is_local=False))
        self._batches.extend(own if other.index == index else other for other in listed)

    def rebind(self, ranks: Ranks) -> bool:
        """Use another fit's process group; False if its size differs."""
        if ranks.count == self._ranks.count:
            self._ranks = ranks
        return ranks.count == self._ranks.count

    def close(self) -> None:
        """Add no more: the first epoch or training is over."""
        self._is_closed = True
