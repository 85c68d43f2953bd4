"""Samples of batches that the user gives: a list or loader.

A loader is read to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_subspace._arguments import described, wrong
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
    name: str = "batches",
) -> Sample:
    """Take given batches as the sample.

    Args:
        batches: a list of batches or of (batch, weight) pairs with a plain number as weight, or a loader. A DataLoader
            is read to its end by one of our own, in the order of its sampler; its generators are put back.
        weight: weight of a batch in the mean; by default its number of examples, told from all batches together, or
            the same for all where it cannot be told (see `ExampleCounter`).
        ranks: the process group; all ranks give the same batches.
        progress: of the reading, with its limit.
        name: of the user's argument, for errors.

    Raises:
        SampleError: when there are none, one cannot be copied, or they are no batches (see `require_given_batches`).
        TimeoutError: when reading takes too long.

    Example:
        >>> [b.weight for b in sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)]).hessian]
        [32.0, 8.0]
    """
    ranks, progress = ranks or Ranks(), progress or ReadProgress()
    require_given_batches(name, batches)
    batches = bare_loader(batches)  # reading Fabric's own would count as one of its epochs
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
        raise SampleError(f"{name}: expected at least one batch, got none.")
    counter = ExampleCounter(batches.batch_size if isinstance(batches, DataLoader) else None)
    counter.learn(list(uncounted.values()))
    counted = [_counted(found[index], counter.count_of(reading)) for index, reading in uncounted.items()]
    for index, batch in zip(uncounted, with_equal_weights(counted), strict=True):
        found[index] = batch
    require_same_batches(found, ranks)
    return Sample(tuple(found))


def require_given_batches(name: str, value: Any, others: str = "") -> None:
    """Refuse what is no loader or list of batches; nothing is read.

    Args:
        name: of the argument.
        value: the argument.
        others: what else it may be, in words with a comma behind each.

    Raises:
        SampleError: naming what was expected, what came, and the way out.

    Example:
        >>> require_given_batches("sample", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)])
        Traceback (most recent call last):
        lightning_subspace.data.micro_batch.SampleError: sample: expected a loader or a list of batches, got ...
    """
    expected = f"{others}a loader or a list of batches"
    is_batch = isinstance(value, Tensor | np.ndarray | Mapping) or hasattr(value, "_fields") or _is_one_batch(value)
    if is_batch:
        got = described(value) if isinstance(value, Tensor | np.ndarray) else f"a {type(value).__name__}"
        raise SampleError(f"{name}: expected {expected}, got one batch, {got}; pass [batch].")
    if isinstance(value, str | bytes | type | nn.Module) or not hasattr(value, "__iter__"):
        way_out = "pass a DataLoader of it" if hasattr(value, "__getitem__") else ""
        raise SampleError(str(wrong(name, expected, value, way_out)))
    if isinstance(value, list | tuple):
        if not value:
            raise SampleError(str(wrong(name, "at least one batch", value)))
        for item in value:
            if isinstance(item, Real | type):
                raise SampleError(f"{name}: expected {expected}, got {described(item)} in the place of a batch.")


def _is_one_batch(value: Any) -> bool:
    """Whether a list or tuple holds the tensors of one batch."""
    if not isinstance(value, list | tuple) or not any(isinstance(item, Tensor) for item in value):
        return False
    if any(isinstance(item, Mapping) for item in value):
        return True
    if not all(isinstance(item, Tensor) for item in value):
        return False
    if isinstance(value, tuple):
        return True
    # Batches are alike but for their lengths: along the first dimension, or of padded sequences. A column of targets
    # beside inputs of as many rows is no such thing.
    first, *rest = value
    return any(
        item.dtype != first.dtype
        or item.ndim != first.ndim
        or (item.ndim > 1 and len(item) == len(first) and item[:1].numel() == 1 < first[:1].numel())
        for item in rest
    )


def _given(item: Any, weight: Weight | None, index: int, ranks: Ranks) -> MicroBatch:
    if isinstance(item, MicroBatch):
        return item
    if _is_pair(item):
        return micro_batch(item[0], index, lambda data: item[1], ranks=ranks)
    return micro_batch(item, index, weight, ranks=ranks)


def _is_pair(item: Any) -> bool:
    """Whether an item is a batch with its weight."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Real)


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
