"""Sample gathered from the batches that training uses.

The batches are copied as they reach `training_step`: after all hooks and transfers, whole, in the size they came in. No
dataset is read a second time. Each rank keeps its own batches, and all exchange the numbers of examples. The Hessian's
part is full first; the gradient's goes on filling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.micro_batch import MicroBatch, Weight, with_equal_weights
from lightning_subspace.data.sample import Sample, micro_batch
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import tensors_of
from lightning_subspace.state.free_memory import free_memory
from lightning_subspace.state.layouts import bytes_of

FREE_SHARE = 0.25  # of the free memory, that the copies may take


@dataclass(frozen=True)
class Gathered:
    """What has been gathered, to be handed on.

    Attributes:
        batches: so far, with their data.
        epoch: the one they are of.
        is_closed: whether none will be added.
    """

    batches: tuple[MicroBatch, ...]
    epoch: int | None
    is_closed: bool


class GatheredSample:
    """A sample that fills with the batches of one epoch.

    Args:
        sample: number of examples for the Hessian, in whole batches.
        gradient_sample: number of examples for the gradient, those of the Hessian included.
        weight: weight of a batch in the mean; by default its number of examples.
        counter: of the examples in a batch.
        ranks: the process group.

    Attributes:
        epoch: the one it is gathered in; None before its first batch.
        bound: what bounds it, in words, where that is the memory.

    Example:
        >>> gathered = GatheredSample(6, 12)
        >>> for epoch, batch in [(0, torch.zeros(4, 2)), (0, torch.ones(4, 2)), (1, torch.zeros(4, 2))]:
        ...     gathered.add(batch, epoch)
        ...     gathered.sample is not None
        False
        True
        True
        >>> [batch.size for batch in gathered.sample.hessian], gathered.sample.extra
        ([4, 4], ())
    """

    def __init__(
        self,
        sample: int,
        gradient_sample: int,
        weight: Weight | None = None,
        counter: ExampleCounter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.epoch: int | None = None  # the first one: in the next, the same examples come again
        self.bound: str | None = None
        self.is_closed = False
        self._sizes = sample, max(sample, gradient_sample)
        self._weight = weight
        self._ranks = ranks or Ranks()
        self._counter = ExampleCounter() if counter is None else counter
        self._batches: list[MicroBatch] = []
        self._sample: Sample | None = None
        self._has_warned = False  # of weights that are not known
        self._room: float | None = None  # bytes that are left for copies on this rank

    @property
    def num_examples(self) -> int:
        """Number of examples so far, on all ranks."""
        return sum(batch.size for batch in self._batches)

    @property
    def is_complete(self) -> bool:
        """Whether no further batch is needed."""
        return self.is_closed or self.num_examples >= self._sizes[1]

    @property
    def filled(self) -> float:
        """Share of the gradient's examples that is there, in [0, 1]."""
        return min(self.num_examples / self._sizes[1], 1.0)

    @property
    def sample(self) -> Sample | None:
        """The sample so far, or None if too small for the Hessian."""
        if not self._batches or (not self.is_closed and self.num_examples < self._sizes[0]):
            return None
        if self._sample is None:
            batches = with_equal_weights(self._batches, warn=not self._has_warned)
            self._has_warned = self._has_warned or not all(batch.is_counted for batch in batches)
            count = self._ranks.count
            first = -(-len(Sample.of(batches, self._sizes[0]).hessian) // count) * count  # a rank has its own alone
            self._sample = Sample(tuple(batches[:first]), tuple(batches[first:]), filled=self.filled)
        return self._sample

    def add(self, batch: Any, epoch: int, batch_idx: int | None = None) -> None:
        """Add a copy of a batch until there are enough. A collective.

        Raises:
            SampleError: when a weight is not positive and finite, or the batch cannot be copied.
        """
        if self.epoch is None:
            self.epoch = epoch
        if epoch != self.epoch or self.is_complete:
            return self.close()
        with self._ranks.agree():
            if not self._batches:  # what a batch's number of examples is, is decided once, and for all ranks
                self._counter.count(batch)
                self._counter.learned = self._ranks.broadcast_object(self._counter.learned)
            index = len(self._batches) + self._ranks.index
            own = micro_batch(batch, index, self._weight, counter=self._counter, transferred=True)
            own = replace(own, batch_idx=batch_idx)
            fits = self._take_room(sum(bytes_of(tensor) for tensor in tensors_of(own.data)))
            listed = self._ranks.all_gather_object((replace(own, data=None, is_local=False), fits))
        if not all(fits for _, fits in listed) and self._batches:
            self.bound = (
                f"the sample is bounded by the memory, to {self.num_examples} of {self._sizes[1]} examples; pass a "
                "smaller sample and gradient_sample"
            )
            return self.close()
        self._batches.extend(own if other.index == index else other for other, _ in listed)
        self._sample = None
        return None

    def close(self) -> None:
        """Add no more: the epoch or training is over."""
        self.is_closed = True

    def fill_up(self, gradient_sample: int) -> None:
        """Go on to so many examples for the gradient."""
        self._sizes = self._sizes[0], max(self._sizes[0], gradient_sample)
        self._sample = None

    def rebind(self, ranks: Ranks) -> bool:
        """Use another fit's process group; False if its size differs."""
        if ranks.count == self._ranks.count:
            self._ranks = ranks
        return ranks.count == self._ranks.count

    @property
    def state(self) -> Gathered:
        """What is there, for `resume`."""
        return Gathered(tuple(self._batches), self.epoch, self.is_closed)

    def resume(self, state: Gathered) -> None:
        """Go on from what another one has gathered, on one process."""
        self._batches, self.epoch, self.is_closed = list(state.batches), state.epoch, state.is_closed
        self._sample = None

    def _take_room(self, nbytes: int) -> bool:
        """Whether so many bytes are left for another copy."""
        if self._room is None:
            self._room = FREE_SHARE * free_memory(torch.device("cpu")) / self._ranks.count
        self._room -= nbytes
        return self._room >= 0.0
