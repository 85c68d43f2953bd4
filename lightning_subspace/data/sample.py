"""Which examples a probe looks at: a fixed sample of the training set, drawn once.

The sample is the largest source of error of a probe. The Hessian gets `sample` examples; the gradient, which costs one
pass and is mostly noise when few examples are left to learn, gets `gradient_sample` examples that contain them.

Examples are drawn by a seeded permutation from the pool that training draws from. Micro-batches have the training
batch size, since a loss with batch-norm in train mode depends on it. They are kept on the CPU: what a dataset adds at
random (augmentation) is drawn once, and every probe sees the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_subspace._lightning import rank_zero_warn
from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.micro_batch import (
    MicroBatch,
    SampleError,
    Weight,
    checked_weight,
    checksum,
    detached_copy,
    number_of_examples,
    tensors_of,
)
from lightning_subspace.data.training_set import TrainingSet, batch_size_of, gives_batches, load
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.rng import preserved_random_state


@dataclass(frozen=True)
class Sample:
    """The micro-batches of a probe.

    Under ranks every rank lists all micro-batches, and holds the data of its own and of the first (`assign`).

    Attributes:
        hessian: for the Hessian, and the first part of the gradient.
        extra: the rest of the gradient's sample; empty where both use the same examples.
        population: number of examples in the training set; infinite where it is not known.
    """

    hessian: tuple[MicroBatch, ...]
    extra: tuple[MicroBatch, ...] = ()
    population: float = math.inf

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], sample: int | None, population: float = math.inf) -> Sample:
        """Give the first batches, up to `sample` examples, to the Hessian; all of them where `sample` is None."""
        seen, cut = 0, 0
        while cut < len(batches) and (sample is None or seen < sample):
            seen, cut = seen + batches[cut].size, cut + 1
        return cls(tuple(batches[:cut]), tuple(batches[cut:]), population)

    @property
    def hessian_share(self) -> float:
        """Share of the training set that the Hessian sees, in [0, 1]; 0 where the training set is not known."""
        return sum(batch.size for batch in self.hessian) / self.population

    @property
    def gradient_share(self) -> float:
        """Share of the training set that the gradient sees, in [0, 1]; 0 where the training set is not known."""
        return sum(batch.size for batch in (*self.hessian, *self.extra)) / self.population

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held on this rank."""
        return sum(t.nbytes for b in (*self.hessian, *self.extra) for t in tensors_of(b.data))


def sample_of_batches(batches: Iterable[Any], weight: Weight | None = None, ranks: Ranks | None = None) -> Sample:
    """Take given batches as the sample.

    Args:
        batches: a list of batches or of (batch, weight) pairs with a plain number as weight, or a loader. A DataLoader
            is read to its end by worker processes, in the order of its sampler, so that nothing random in its dataset
            moves; its iterator and its own workers are not touched.
        weight: share of a batch in the mean; by default its number of examples.
        ranks: the processes that share the work, all of which give the same batches.

    Raises:
        SampleError: when there are none, or the number of examples cannot be told.

    Example:
        >>> [b.weight for b in sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)]).hessian]
        [32.0, 8.0]
    """
    if isinstance(batches, tuple) and all(isinstance(item, Tensor) for item in batches):
        raise SampleError("batches: got one batch, a tuple of tensors, where a list of batches is expected: [batch].")
    with preserved_random_state():  # a shuffling loader draws from the global generator
        items = _read(batches, Ranks() if ranks is None else ranks) if isinstance(batches, DataLoader) else batches
        found = [_given(item, weight, index, ranks) for index, item in enumerate(items)]
    if not found:
        raise SampleError("batches: expected at least one batch, got none.")
    require_same_batches(found, Ranks() if ranks is None else ranks)
    return Sample(tuple(found))


def sample_of_current(batch: Any, ranks: Ranks | None = None) -> Sample:
    """A copy of a batch of the running training, which has been through the transfer hooks already.

    Under ranks those of all ranks together, each with the same weight, as in the gradient that training takes.
    """
    ranks = Ranks() if ranks is None else ranks
    own = MicroBatch(detached_copy(batch), 1.0, ranks.index, transferred=True)
    others = replace(own, data=None, is_local=False)
    return Sample(tuple(own if rank == ranks.index else replace(others, index=rank) for rank in range(ranks.count)))


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
    """Draw a fixed sample from the dataset behind a training loader, which is not iterated.

    Where the items of the dataset are batches (automatic batching is off), whole items are drawn. Under ranks every
    rank reads the whole sample in the same order and keeps its own share, so that what a dataset adds at random is the
    same for any number of ranks.

    Args:
        loader: gives dataset, collate function, batch size, workers, and the examples its sampler may choose from: see
            `TrainingSet`.
        sample: number of examples for the Hessian; None takes all, an epoch's worth where draws are weighted.
        gradient_sample: number of examples for the gradient, at least `sample`; None takes all. Ignored where
            `sample` is None.
        batch_size: of the micro-batches, at most: all are made nearly equal; by default the loader's.
        weight: share of a batch in the mean; by default its number of examples.
        seed: of the permutation, and of what the dataset does at random (augmentation).
        limit: batches that training takes in an epoch, on each rank.
        ranks: the processes that share the work.

    Raises:
        SampleError: for a loader without a sized dataset, or an empty one.
    """
    pool = TrainingSet.of(loader, limit)
    generator = torch.Generator().manual_seed(seed)
    order = pool.order(generator)
    goal = None if sample is None or gradient_sample is None else max(sample, gradient_sample)
    if gives_batches(loader):
        items = _until(goal, load(loader, order, generator), weight, ranks)
        require_same_batches(items, Ranks() if ranks is None else ranks)
        return Sample.of(items, sample)
    size = batch_size or batch_size_of(loader)
    first, rest = order[:sample], order[len(order[:sample]) : goal]
    chunks = [*_evenly(first, size), *_evenly(rest, size)]
    data = load(loader, chunks, generator)
    batches = [
        micro_batch(item, i, weight, size=len(chunk), ranks=ranks)
        for i, (chunk, item) in enumerate(zip(chunks, data, strict=True))
    ]
    require_same_batches(batches, Ranks() if ranks is None else ranks)
    return Sample.of(batches, sample, pool.population)


def micro_batch(
    data: Any,
    index: int,
    weight: Weight | None = None,
    *,
    size: int | None = None,
    transferred: bool = False,
    ranks: Ranks | None = None,
) -> MicroBatch:
    """A copy of a batch on the CPU, weighted by its number of examples if nothing else is said.

    Args:
        data: the batch.
        index: its place in the sample.
        weight: share of a batch in the mean.
        size: number of examples where it is known; by default the length of the first tensor, or 1 where there is none
            and `weight` is given.
        transferred: whether it has been through the transfer hooks.
        ranks: the processes that share the work: the data are kept where they belong, and the first ones everywhere.

    Raises:
        SampleError: when the number of examples cannot be told.
    """
    if size is None:
        size = 1
        with suppress(*([] if weight is None else [SampleError])):
            size = number_of_examples(data)
    value = float(size) if weight is None else weight(data)
    return _kept(MicroBatch(data, checked_weight(value), index, transferred, size), ranks)


def _given(item: Any, weight: Weight | None, index: int, ranks: Ranks | None) -> MicroBatch:
    if isinstance(item, MicroBatch):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        return _kept(MicroBatch(item[0], checked_weight(item[1]), index), ranks)
    value = number_of_examples(item) if weight is None else weight(item)
    return _kept(MicroBatch(item, checked_weight(value), index), ranks)


def _kept(batch: MicroBatch, ranks: Ranks | None) -> MicroBatch:
    """The batch with a copy of its data, or without them where it is another rank's."""
    if ranks is not None and ranks.count > 1:
        batch = replace(batch, checksum=checksum(batch.data))
    if ranks is None or batch.index == 0 or owner_rank(batch, ranks) == ranks.index:
        return replace(batch, data=detached_copy(batch.data, "cpu"))
    return replace(batch, data=None, is_local=False)


def _read(loader: DataLoader[Any], ranks: Ranks) -> Iterator[Any]:
    """The batches of one epoch of a user's loader, in the order that the first rank draws; generators are put back."""
    if isinstance(loader.dataset, IterableDataset):
        return load(loader, None, torch.Generator().manual_seed(0))
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = getattr(sampler, "sampler", None)
    if ranks.count > 1 and isinstance(inner or sampler, DistributedSampler):
        raise SampleError(
            "sample: this loader's DistributedSampler gives each rank a part of the examples, which the monitor does "
            "by itself; pass a loader without it, the same one on all ranks."
        )
    generators = {g for owner in (loader, sampler, inner) if (g := getattr(owner, "generator", None)) is not None}
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        units = ranks.broadcast_object(list(sampler))
    finally:
        for generator, state in states:
            generator.set_state(state)
    return load(loader, units, torch.Generator().manual_seed(0))


def _evenly(indices: list[int], size: int) -> Iterator[list[int]]:
    """Cut into parts of nearly equal length, at most `size`: a batch-norm would make little of a short remainder."""
    count = -(-len(indices) // size)
    for part in range(count):
        yield indices[part * len(indices) // count : (part + 1) * len(indices) // count]


def _until(goal: int | None, items: Iterator[Any], weight: Weight | None, ranks: Ranks | None) -> list[MicroBatch]:
    """Batches of unknown sizes, until they have `goal` examples together."""
    batches: list[MicroBatch] = []
    seen = 0
    while goal is None or seen < goal:
        try:
            batches.append(micro_batch(next(items), len(batches), weight, ranks=ranks))
        except StopIteration:
            break
        seen += batches[-1].size
    return batches


def require_same_batches(batches: Sequence[MicroBatch], ranks: Ranks) -> None:
    """Warn where ranks have read different examples. A collective.

    Raises:
        SampleError: when they have different numbers of micro-batches, or give them different weights.
    """
    if ranks.count == 1:
        return
    own = [(batch.index, batch.weight, batch.checksum) for batch in batches]
    everybody = ranks.all_gather_object(own)
    if any([entry[:2] for entry in other] != [entry[:2] for entry in own] for other in everybody):
        raise SampleError(
            f"sample: every rank has to read the same batches, but they differ in number or in weight: "
            f"{[len(other) for other in everybody]} batches on ranks 0 to {ranks.count - 1}."
        )
    if any(other != own for other in everybody):
        rank_zero_warn(
            "SubspaceMonitor: ranks have read different examples for the same sample, so that some are counted twice "
            "and others not at all; is the dataset in another order on each rank, or is what it adds at random not "
            "seeded? Make it the same on all ranks, or pass the batches themselves, sample=[batch, ...]."
        )
