"""Fixed samples: micro-batches that are drawn once, given, or current.

The sample is the largest source of error of a probe. The gradient costs one pass, and is mostly noise late in training:
it gets `gradient_sample` examples, which contain the `sample` of the Hessian. Micro-batches have the training batch
size, since a loss with batch-norm in train mode depends on it. They stay on the CPU, augmented once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_subspace._lightning import bare_loader, rank_zero_warn
from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.example_count import ExampleCounter, Reading, readings
from lightning_subspace.data.micro_batch import (
    MicroBatch,
    SampleError,
    Weight,
    checksum,
    detached_copy,
    places,
    with_equal_weights,
)
from lightning_subspace.data.reading import READ_TIMEOUT, ReadProgress, read, unmoved
from lightning_subspace.data.training_set import TrainingSet, batch_sampler_of, batch_size_of, chunks, gives_batches
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import tensors_of
from lightning_subspace.state.layouts import bytes_of
from lightning_subspace.state.rng import preserved_random_state


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
        """Whether both parts are a number of examples, which can be gathered in training."""
        return isinstance(self.sample, int) and isinstance(self.gradient_sample, int)

    @property
    def is_given(self) -> bool:
        """Whether the user gives the batches."""
        return not isinstance(self.sample, int | str)


def sample_of_batches(
    batches: Iterable[Any],
    weight: Weight | None = None,
    ranks: Ranks | None = None,
    progress: ReadProgress | None = None,
) -> Sample:
    """Take given batches as the sample.

    Args:
        batches: a list of batches or of (batch, weight) pairs with a plain number as weight, or a loader. A DataLoader
            is read to its end by one of our own, in the order of its sampler; its generators are put back.
        weight: weight of a batch in the mean; by default its number of examples, told from all batches together, or
            the same for all where it cannot be told (see `ExampleCounter`).
        ranks: the process group; all ranks give the same batches.
        progress: of the reading, with its limit.

    Raises:
        SampleError: when there are none, or one cannot be copied.
        TimeoutError: when reading takes too long.

    Example:
        >>> [b.weight for b in sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)]).hessian]
        [32.0, 8.0]
    """
    ranks, progress = ranks or Ranks(), progress or ReadProgress()
    batches = bare_loader(batches)  # reading Fabric's own would count as one of its epochs
    if isinstance(batches, tuple) and all(isinstance(item, Tensor) for item in batches):
        raise SampleError("batches: expected a list of batches, got one batch, a tuple of tensors; pass [batch].")
    with preserved_random_state():  # a shuffling loader draws from the global generator
        items = _read(batches, ranks, progress) if isinstance(batches, DataLoader) else batches
        found, uncounted = list[MicroBatch](), dict[int, Mapping[str, Reading]]()
        for index, item in enumerate(items):
            is_weighted = weight is not None or isinstance(item, MicroBatch) or _is_pair(item)
            found.append(_given(item, (lambda data: 1.0) if not is_weighted else weight, index, ranks))
            if not is_weighted:
                uncounted[index] = readings(item)
            progress.add(found[-1].size)
    if not found:
        raise SampleError("batches: expected at least one batch, got none.")
    counter = ExampleCounter(batches.batch_size if isinstance(batches, DataLoader) else None)
    counter.learn(list(uncounted.values()))
    counted = [_counted(found[index], counter.count_of(reading)) for index, reading in uncounted.items()]
    for index, batch in zip(uncounted, with_equal_weights(counted), strict=True):
        found[index] = batch
    require_same_batches(found, ranks)
    return Sample(tuple(found))


def sample_of_current(batch: Any, ranks: Ranks | None = None) -> Sample:
    """Copy the present training batch, of all ranks with equal weights."""
    ranks = ranks or Ranks()
    own = MicroBatch(detached_copy(batch), 1.0, ranks.index, transferred=True, off_cpu=places(batch))
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
    progress: ReadProgress | None = None,
) -> Sample:
    """Draw a fixed sample from the dataset behind a training loader.

    It has whole batches of the size of training. If its items are batches (automatic batching is off), whole items are
    drawn. Every rank reads the whole sample and keeps its own part, so that random augmentation is the same for any
    number of ranks.

    Args:
        loader: gives dataset, collate function, batch size, workers, and the examples to draw from (`TrainingSet`).
        sample: number of examples for the Hessian; None takes all for both, an epoch's worth of weighted draws.
        gradient_sample: number of examples for the gradient, at least `sample`; None takes all.
        batch_size: size of the micro-batches, by default the loader's. Where all examples are taken, they are nearly
            equal and no larger, unless the loader drops an incomplete batch.
        weight: weight of a batch in the mean; by default its number of examples.
        seed: of the permutation and of the dataset's workers (augmentation).
        limit: batches that training takes in an epoch, on each rank.
        ranks: the process group.
        progress: of the reading, with its limit.

    Raises:
        SampleError: for a loader without a sized dataset, or an empty one.
        TimeoutError: when reading takes too long.
    """
    ranks, progress = ranks or Ranks(), progress or ReadProgress()
    training_set = TrainingSet.of(loader, limit)
    generator = torch.Generator().manual_seed(seed)
    goal = None if sample is None or gradient_sample is None else max(sample, gradient_sample)
    population, batches, seen, counter = math.inf, list[MicroBatch](), 0, ExampleCounter()
    if gives_batches(loader):
        units: list[Any] = training_set.order(generator, goal)
    else:
        population = training_set.population
        units = _units(training_set, loader, sample, goal, batch_size, generator)
        progress.count = sum(map(len, units))
    for unit, item in zip(units, read(loader, units, generator, progress), strict=True):
        size = None if gives_batches(loader) else len(unit)
        batches.append(micro_batch(item, len(batches), weight, size=size, ranks=ranks, counter=counter))
        seen += batches[-1].size
        progress.add(batches[-1].size)
        if goal is not None and seen >= goal:
            break
    batches = with_equal_weights(batches)
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
    batch = MicroBatch(data, float(value), index, transferred, examples, is_counted=is_counted)
    if transferred:
        batch = replace(batch, off_cpu=places(data))
    if ranks is not None and ranks.count > 1:
        batch = replace(batch, checksum=checksum(data))
        if index > 0 and owner_rank(batch, ranks) != ranks.index:
            return replace(batch, data=None, is_local=False)
    return replace(batch, data=detached_copy(data, "cpu"))


def _given(item: Any, weight: Weight | None, index: int, ranks: Ranks) -> MicroBatch:
    if isinstance(item, MicroBatch):
        return item
    if _is_pair(item):
        return micro_batch(item[0], index, lambda data: item[1], ranks=ranks)
    return micro_batch(item, index, weight, ranks=ranks)


def _is_pair(item: Any) -> bool:
    """Whether an item is a batch with its weight."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float))


def _counted(batch: MicroBatch, count: int | None) -> MicroBatch:
    if count is None:
        return replace(batch, is_counted=False)
    return replace(batch, weight=float(count), size=count)


def _read(loader: DataLoader[Any], ranks: Ranks, progress: ReadProgress) -> Iterator[Any]:
    """One epoch of a user's loader, in the first rank's order."""
    if isinstance(loader.dataset, IterableDataset):
        return read(loader, None, torch.Generator().manual_seed(0), progress)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = getattr(sampler, "sampler", None)
    if ranks.count > 1 and isinstance(inner or sampler, DistributedSampler):
        raise SampleError(
            "sample: expected a loader of all examples, got one whose DistributedSampler gives each rank a part; pass "
            "a loader without it, the same one on all ranks."
        )
    held = [loader.dataset, getattr(inner or sampler, "data_source", None)]
    with unmoved([loader, sampler, inner], held):
        units = ranks.broadcast_object(list(sampler))
    if loader.batch_sampler is not None:
        progress.count = sum(map(len, units))
    return read(loader, units, torch.Generator().manual_seed(0), progress)


def _units(
    training_set: TrainingSet,
    loader: DataLoader[Any],
    sample: int | None,
    goal: int | None,
    batch_size: int | None,
    generator: torch.Generator,
) -> list[Sequence[int]]:
    """The indices of each micro-batch, those of the Hessian first."""
    size = batch_size or batch_size_of(loader)
    if size is None:
        raise SampleError("batch_size: expected a loader with a batch size, got one without; pass batch_size=.")
    whole = batch_size is None and bool(getattr(batch_sampler_of(loader), "drop_last", False))
    order = training_set.order(generator, None if goal is None else -(-goal // size) * size)
    cut = len(order) if sample is None else -(-sample // size) * size
    units = [unit for part in (order[:cut], order[cut:]) for unit in chunks(part, size, whole=whole)]
    if not units:
        raise SampleError(
            f"sample: expected at least one batch of {size} examples, got {len(order)} examples and drop_last=True."
        )
    return units


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
