"""Samples: the micro-batches of a probe.

The sample is the largest source of error of a probe. The gradient costs one pass, and is mostly noise late in training:
it gets `gradient_sample` examples, which contain the `sample` of the Hessian. Micro-batches have the training batch
size, since a loss with batch-norm in train mode depends on it. They stay on the CPU, augmented once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from lightning_subspace._arguments import wrong
from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.micro_batch import (
    MicroBatch,
    SampleError,
    Weight,
    checksum,
    detached_copy,
    places,
)
from lightning_subspace.data.reading import READ_TIMEOUT
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import tensors_of
from lightning_subspace.state.layouts import bytes_of
from lightning_subspace.state.notice import warn_on_first_rank


@dataclass(frozen=True)
class Sample:
    """The micro-batches of a probe.

    Every rank lists all micro-batches, and holds the data of its own and of the first, its filler (see `assign`).

    Attributes:
        hessian: micro-batches for the Hessian, and the first part of the gradient's.
        extra: the rest of the gradient's; empty if both use the same examples.
        population: number of examples in the training set; infinite if not known.
        filled: share of the number of examples asked for that is there, in (0, 1], where they are gathered in training.
    """

    hessian: tuple[MicroBatch, ...]
    extra: tuple[MicroBatch, ...] = ()
    population: float = math.inf
    filled: float | None = None

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], sample: int | None, population: float = math.inf) -> Sample:
        """Give the first `sample` examples to the Hessian; None: all."""
        seen = accumulate((batch.size for batch in batches), initial=0)  # before each batch
        cut = len(batches) if sample is None else sum(before < sample for before in seen)
        return cls(tuple(batches[:cut]), tuple(batches[cut:]), population)

    @property
    def hessian_share(self) -> float:
        """The Hessian's share of the training set, in [0, 1]; 0: unknown."""
        return sum(batch.size for batch in self.hessian) / self.population

    @property
    def gradient_share(self) -> float:
        """The gradient's share of the training set, in [0, 1]; 0: unknown."""
        return sum(batch.size for batch in (*self.hessian, *self.extra)) / self.population

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors on this rank, which repeated draws share."""
        held = {id(batch.data): batch.data for batch in (*self.hessian, *self.extra)}
        return sum(bytes_of(tensor) for data in held.values() for tensor in tensors_of(data))


@dataclass(frozen=True)
class SampleSpec:
    """A user's choice of the sample; see the arguments of `SubspaceMonitor`."""

    sample: int | str | Iterable[Any]
    gradient_sample: int | str
    batch_size: int | None
    weight: Weight | None
    seed: int
    resample: bool = True
    read_timeout: float = READ_TIMEOUT

    @property
    def is_number(self) -> bool:
        """Whether both parts are numbers of examples, which can be gathered."""
        return isinstance(self.sample, int) and isinstance(self.gradient_sample, int)

    @property
    def is_given(self) -> bool:
        """Whether the user gives the batches."""
        return not isinstance(self.sample, int | str)


def sample_of_current(batch: Any, ranks: Ranks | None = None, batch_idx: int | None = None) -> Sample:
    """Copy the present training batch, of all ranks with equal weights."""
    ranks = ranks or Ranks()
    own = MicroBatch(
        detached_copy(batch), 1.0, ranks.index, transferred=True, off_cpu=places(batch), batch_idx=batch_idx
    )
    other = replace(own, data=None, is_local=False)
    return Sample(tuple(own if rank == ranks.index else replace(other, index=rank) for rank in range(ranks.count)))


def micro_batch(
    data: Any,
    index: int,
    weight: Weight | None = None,
    *,
    size: int | None = None,
    transferred: bool = False,
    ranks: Ranks | None = None,
    counter: ExampleCounter | None = None,
) -> MicroBatch:
    """Copy a batch to the CPU as a micro-batch.

    Args:
        data: the batch.
        index: its place in the sample.
        weight: weight of a batch in the mean; by default its number of examples.
        size: number of examples; by default told by the `counter`.
        transferred: whether it has been through the transfer hooks.
        ranks: the process group; the owner keeps the data, and all ranks those of the first batch.
        counter: of examples, with what it has learned from other batches. Where it cannot tell, the weight is 1 (see
            `with_equal_weights`) and the size what the loader puts into a batch, or 1.

    Raises:
        SampleError: for a batch that cannot be copied.
    """
    counter = ExampleCounter() if counter is None else counter
    count = counter.count(data) if size is None else size
    examples = (counter.batch_size or 1) if count is None else count
    value = weight(data) if weight is not None else 1.0 if count is None else count
    is_counted = weight is not None or count is not None
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise SampleError(str(wrong("weight", "a positive finite number for every batch", value))) from None
    batch = MicroBatch(data, value, index, transferred, examples, is_counted=is_counted)
    if transferred:
        batch = replace(batch, off_cpu=places(data))
    if ranks is not None and ranks.count > 1:
        batch = replace(batch, checksum=checksum(data))
        if index > 0 and owner_rank(batch, ranks) != ranks.index:
            return replace(batch, data=None, is_local=False)
    return replace(batch, data=detached_copy(data, "cpu"))


def require_same_batches(batches: Sequence[MicroBatch], ranks: Ranks) -> None:
    """Warn if ranks have read different examples. A collective.

    Raises:
        SampleError: when they have different numbers of micro-batches, or give them different weights.
    """
    if ranks.count == 1:
        return
    own = [(batch.index, batch.weight, batch.checksum) for batch in batches]
    everybody = ranks.all_gather_object(own)
    if any([entry[:2] for entry in other] != [entry[:2] for entry in own] for other in everybody):
        raise SampleError(
            "sample: expected the same batches on every rank, got different numbers or weights: "
            f"{[len(other) for other in everybody]} batches on ranks 0..{ranks.count - 1}."
        )
    if any(other != own for other in everybody):
        warn_on_first_rank(
            "SubspaceMonitor: ranks have read different examples for the same sample, so that some count twice and "
            "others not at all; make the dataset's order and augmentation the same on all, or pass sample=[batch, ...]."
        )
