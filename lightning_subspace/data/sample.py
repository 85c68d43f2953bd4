"""Fixed samples: micro-batches that are drawn once, given, or current.

The sample is the largest source of error of a probe. The gradient costs one pass, and is mostly noise late in training:
it gets `gradient_sample` examples, which contain the `sample` of the Hessian. Micro-batches have the training batch
size, since a loss with batch-norm in train mode depends on it. They stay on the CPU, augmented once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_subspace._lightning import bare_loader, rank_zero_warn
from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.micro_batch import (
    MicroBatch,
    SampleError,
    Weight,
    checksum,
    detached_copy,
    number_of_examples,
    tensors_of,
)
from lightning_subspace.data.training_set import TrainingSet, batch_size_of, gives_batches, load
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.object_graph import restore
from lightning_subspace.state.rng import preserved_random_state


@dataclass(frozen=True)
class Sample:
    """The micro-batches of a probe.

    Every rank lists all micro-batches, and holds the data of its own and of the first, its filler (see `assign`).

    Attributes:
        hessian: micro-batches for the Hessian, and the first part of the gradient's.
        extra: the rest of the gradient's; empty if both use the same examples.
        population: number of examples in the training set; infinite if not known.
    """

    hessian: tuple[MicroBatch, ...]
    extra: tuple[MicroBatch, ...] = ()
    population: float = math.inf

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
        """Bytes of the tensors on this rank."""
        return sum(t.nbytes for b in (*self.hessian, *self.extra) for t in tensors_of(b.data))


@dataclass(frozen=True)
class SampleSpec:
    """A user's choice of the sample; see the arguments of `SubspaceMonitor`."""

    sample: int | str | Iterable[Any]
    gradient_sample: int | str
    batch_size: int | None
    weight: Weight | None
    seed: int


def sample_of_batches(batches: Iterable[Any], weight: Weight | None = None, ranks: Ranks | None = None) -> Sample:
    """Take given batches as the sample.

    Args:
        batches: a list of batches or of (batch, weight) pairs with a plain number as weight, or a loader. A DataLoader
            is read to its end by workers of our own, in the order of its sampler; its generators are put back.
        weight: weight of a batch in the mean; by default its number of examples.
        ranks: the process group; all ranks give the same batches.

    Raises:
        SampleError: when there are none, or the number of examples cannot be told.

    Example:
        >>> [b.weight for b in sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)]).hessian]
        [32.0, 8.0]
    """
    ranks = ranks or Ranks()
    batches = bare_loader(batches)  # reading Fabric's own would count as one of its epochs
    if isinstance(batches, tuple) and all(isinstance(item, Tensor) for item in batches):
        raise SampleError("batches: expected a list of batches, got one batch, a tuple of tensors; pass [batch].")
    with preserved_random_state():  # a shuffling loader draws from the global generator
        items = _read(batches, ranks) if isinstance(batches, DataLoader) else batches
        found = [_given(item, weight, index, ranks) for index, item in enumerate(items)]
    if not found:
        raise SampleError("batches: expected at least one batch, got none.")
    require_same_batches(found, ranks)
    return Sample(tuple(found))


def sample_of_current(batch: Any, ranks: Ranks | None = None) -> Sample:
    """Copy the present training batch, of all ranks with equal weights."""
    ranks = ranks or Ranks()
    own = MicroBatch(detached_copy(batch), 1.0, ranks.index, transferred=True)
    other = replace(own, data=None, is_local=False)
    return Sample(tuple(own if rank == ranks.index else replace(other, index=rank) for rank in range(ranks.count)))


def sample_of_dataset(
    loader: DataLoader[Any],
    sample: int | None,
    gradient_sample: int | None = None,
    *,
    batch_size: int | None = None,
    weight: Weight | None = None,
    seed: int = 0,
    limit: float = math.inf,
    ranks: Ranks | None = None,
) -> Sample:
    """Draw a fixed sample from the dataset behind a training loader.

    If its items are batches (automatic batching is off), whole items are drawn. Every rank reads the whole sample and
    keeps its own part, so that random augmentation is the same for any number of ranks.

    Args:
        loader: gives dataset, collate function, batch size, workers, and the examples to draw from (`TrainingSet`).
        sample: number of examples for the Hessian; None takes all for both, an epoch's worth of weighted draws.
        gradient_sample: number of examples for the gradient, at least `sample`; None takes all.
        batch_size: largest size of the micro-batches, which are nearly equal; by default the loader's.
        weight: weight of a batch in the mean; by default its number of examples.
        seed: of the permutation and of the dataset's workers (augmentation).
        limit: batches that training takes in an epoch, on each rank.
        ranks: the process group.

    Raises:
        SampleError: for a loader without a sized dataset, or an empty one.
    """
    ranks = ranks or Ranks()
    training_set = TrainingSet.of(loader, limit)
    generator = torch.Generator().manual_seed(seed)
    order = training_set.order(generator)
    goal = None if sample is None or gradient_sample is None else max(sample, gradient_sample)
    population, batches = math.inf, list[MicroBatch]()
    if gives_batches(loader):
        seen = 0
        for item in load(loader, order, generator):
            batches.append(micro_batch(item, len(batches), weight, ranks=ranks))
            seen += batches[-1].size
            if goal is not None and seen >= goal:
                break
    else:
        population, size = training_set.population, batch_size or batch_size_of(loader)
        chunks = [*_evenly(order[:sample], size), *_evenly(order[len(order[:sample]) : goal], size)]
        for chunk, item in zip(chunks, load(loader, chunks, generator), strict=True):
            batches.append(micro_batch(item, len(batches), weight, size=len(chunk), ranks=ranks))
    require_same_batches(batches, ranks)
    return Sample.of(batches, sample, population)


def micro_batch(
    data: Any,
    index: int,
    weight: Weight | None = None,
    *,
    size: int | None = None,
    transferred: bool = False,
    ranks: Ranks | None = None,
) -> MicroBatch:
    """Copy a batch to the CPU as a micro-batch.

    Args:
        data: the batch.
        index: its place in the sample.
        weight: weight of a batch in the mean; by default its number of examples.
        size: number of examples; by default the length of the first tensor, or 1 without one but with a `weight`.
        transferred: whether it has been through the transfer hooks.
        ranks: the process group; the owner keeps the data, and all ranks those of the first batch.

    Raises:
        SampleError: when the number of examples cannot be told.
    """
    if size is None:
        size = 1
        with suppress(*([] if weight is None else [SampleError])):
            size = number_of_examples(data)
    batch = MicroBatch(data, float(size if weight is None else weight(data)), index, transferred, size)
    if ranks is not None and ranks.count > 1:
        batch = replace(batch, checksum=checksum(data))
        if index > 0 and owner_rank(batch, ranks) != ranks.index:
            return replace(batch, data=None, is_local=False)
    return replace(batch, data=detached_copy(data, "cpu"))


def _given(item: Any, weight: Weight | None, index: int, ranks: Ranks) -> MicroBatch:
    if isinstance(item, MicroBatch):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        return micro_batch(item[0], index, lambda data: item[1], ranks=ranks)
    return micro_batch(item, index, weight, ranks=ranks)


def _read(loader: DataLoader[Any], ranks: Ranks) -> Iterator[Any]:
    """One epoch of a user's loader, in the first rank's order."""
    if isinstance(loader.dataset, IterableDataset):
        return load(loader, None, torch.Generator().manual_seed(0))
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = getattr(sampler, "sampler", None)
    if ranks.count > 1 and isinstance(inner or sampler, DistributedSampler):
        raise SampleError(
            "sample: expected a loader of all examples, got one whose DistributedSampler gives each rank a part; pass "
            "a loader without it, the same one on all ranks."
        )
    generators = {g for holder in (loader, sampler, inner) if (g := getattr(holder, "generator", None)) is not None}
    states = [(generator.set_state, generator.get_state()) for generator in generators]
    try:
        units = ranks.broadcast_object(list(sampler))
    finally:
        restore([], states)
    return load(loader, units, torch.Generator().manual_seed(0))


def _evenly(indices: list[int], size: int) -> Iterator[list[int]]:
    """Cut into parts of nearly equal length, at most `size`."""
    count = -(-len(indices) // size)  # nearly equal, since batch-norm needs more than a short remainder
    for part in range(count):
        yield indices[part * len(indices) // count : (part + 1) * len(indices) // count]


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
        rank_zero_warn(
            "SubspaceMonitor: ranks have read different examples for the same sample, so that some count twice and "
            "others not at all; make the dataset's order and augmentation the same on all, or pass sample=[batch, ...]."
        )
