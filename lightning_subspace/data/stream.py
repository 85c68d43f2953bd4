"""The first examples seen in training, for data that nothing can be drawn from: iterable datasets, loaders of any kind.

Copies of the batches that training gets are kept as they come, on the CPU; the trainer's loader is not iterated. They
have been through the transfer hooks, which are not called on them again. Under ranks each keeps its own, and tells the
others how many examples they have, until there are enough in all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_subspace.data.micro_batch import MicroBatch, SampleError, Weight
from lightning_subspace.data.sample import Sample, micro_batch
from lightning_subspace.parallel.ranks import Ranks


class StreamSample:
    """A sample that fills with the first batches of training, but never with the same ones again.

    Args:
        sample: examples for the Hessian, in whole batches.
        gradient_sample: examples for the gradient, which contain the former.
        weight: share of a batch in the mean; by default its number of examples.
        ranks: the processes that share the work.

    Raises:
        SampleError: for a size that is not a number, as a stream has no end to wait for.

    Example:
        >>> import torch
        >>> first_seen = StreamSample(6, 12)
        >>> for epoch, batch in [(0, torch.zeros(4, 2)), (0, torch.ones(4, 2)), (1, torch.zeros(4, 2))]:
        ...     first_seen.add(batch, epoch)
        ...     first_seen.sample is not None
        False
        True
        True
        >>> [batch.size for batch in first_seen.sample.hessian], first_seen.sample.extra
        ([4, 4], ())
    """

    def __init__(
        self,
        sample: int | str,
        gradient_sample: int | str,
        weight: Weight | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if isinstance(sample, str) or isinstance(gradient_sample, str):
            raise SampleError(
                "sample: 'all' needs a training set whose end is known, and this one is iterable; pass numbers of "
                "examples as sample= and gradient_sample=, or sample='current'."
            )
        self._sizes = sample, max(sample, gradient_sample)
        self._weight = weight
        self._ranks = Ranks() if ranks is None else ranks
        self._batches: list[MicroBatch] = []
        self._epoch: int | None = None
        self._is_closed = False

    @property
    def num_examples(self) -> int:
        """Number of examples kept so far, on all ranks."""
        return sum(batch.size for batch in self._batches)

    @property
    def sample(self) -> Sample | None:
        """What has been seen, as soon as it is enough for the Hessian; the gradient's part grows on."""
        if not self._batches or (not self._is_closed and self.num_examples < self._sizes[0]):
            return None
        return Sample.of(self._batches, self._sizes[0])

    def add(self, batch: Any, epoch: int) -> None:
        """Keep a copy of a batch of training, unless there are enough. A collective, as long as there are not.

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

    @property
    def num_ranks(self) -> int:
        """Number of processes that share the work."""
        return self._ranks.count

    def rebind(self, ranks: Ranks) -> None:
        """The same processes, as another fit knows them."""
        self._ranks = ranks

    def close(self) -> None:
        """No more is to come: the first epoch is over, or training is."""
        self._is_closed = True
