"""Samples of batches that the user gives: a list or loader.

A loader is read to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_subspace._lightning import bare_loader
from lightning_subspace.data.example_count import ExampleCounter, Reading, readings
from lightning_subspace.data.micro_batch import MicroBatch, SampleError, Weight, with_equal_weights
from lightning_subspace.data.reading import ReadProgress, read, unmoved
from lightning_subspace.data.sample import Sample, micro_batch, require_same_batches
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.rng import preserved_random_state


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
