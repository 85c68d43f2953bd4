"""Examples that training draws from: which ones, and how often.

Also whether they can be read without any effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_subspace._lightning import undistributed
from lightning_subspace.data.micro_batch import SampleError

SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Up to here all indices are put in a random order, which takes some ms; beyond, only those that are drawn are made.
LISTED = 1 << 20


@dataclass(frozen=True)
class TrainingSet:
    """The examples that training draws from, and how often.

    The set is that of all ranks together. A SubsetRandomSampler leaves examples out, and so does an epoch without
    shuffling behind its last batch (`limit_train_batches`, `overfit_batches`, `drop_last`); a WeightedRandomSampler has
    weights. Any other sampler, or batch sampler without one, is taken to draw all examples equally often.

    Attributes:
        indices: of the examples in the dataset.
        weights: (len(indices),), relative frequencies of the draws; None if all are equal.
        num_draws: draws in an epoch, if there are weights.
        replacement: whether an example may be drawn twice in an epoch, if there are weights.
    """

    indices: Sequence[int]
    weights: Tensor | None = None
    num_draws: int = 0
    replacement: bool = False

    @classmethod
    def of(cls, loader: DataLoader[Any], limit: float = math.inf) -> TrainingSet:
        """The training set of epochs of at most `limit` batches.

        Raises:
            SampleError: for a loader without a sized dataset, or an empty one.
        """
        if not isinstance(loader, DataLoader):
            raise SampleError(
                f"sample: expected a DataLoader, got {type(loader).__name__}; pass one, or sample=[batch, ...]."
            )
        if not is_sized(loader):
            raise SampleError(
                "sample: expected a dataset whose end is known for 'all', got an iterable one; pass a number of "
                "examples, which are gathered in training, or sample=[batch, ...]."
            )
        count = len(loader.dataset)  # type: ignore[arg-type]  # it is sized
        batch_sampler = batch_sampler_of(loader)
        sampler, num_replicas = undistributed(getattr(batch_sampler, "sampler", loader.sampler))
        if isinstance(sampler, WeightedRandomSampler):
            found = cls(range(len(sampler.weights)), sampler.weights, sampler.num_samples, sampler.replacement)
        elif (indices := getattr(sampler, "indices", None)) is not None:
            found = cls(indices)
        elif isinstance(sampler, SequentialSampler) and type(batch_sampler) in (BatchSampler, type(None)):
            size = 1 if batch_sampler is None else batch_sampler.batch_size
            found = cls(range(int(min(count, num_replicas * size * min(limit, len(loader))))))
        else:
            found = cls(range(count))
        if not len(found.indices):
            raise SampleError("sample: expected a training dataset with examples, got an empty one.")
        return found

    @property
    def population(self) -> float:
        """Number of examples; infinite if weighted: a sample is then no share."""
        return float(len(self.indices)) if self.weights is None else math.inf

    @property
    def epoch_size(self) -> int:
        """Number of draws in an epoch."""
        return len(self.indices) if self.weights is None else self.num_draws

    def order(self, generator: torch.Generator, count: int | None = None) -> list[int]:
        """Indices of `count` draws in random order, by default of an epoch."""
        count = self.epoch_size if count is None else min(count, self.epoch_size)
        if self.weights is None:
            drawn = _permutation(len(self.indices), count, generator)
        else:
            # Without replacement the heavy examples come first; the permutation undoes that.
            drawn = torch.multinomial(self.weights, self.num_draws, self.replacement, generator=generator)
            drawn = drawn[_permutation(len(drawn), count, generator)]
        return [int(self.indices[i]) for i in drawn.tolist()]


def is_in_memory(loader: Any) -> bool:
    """Whether the dataset can be read, as in training, without any effect.

    These are tensors, under samplers, batches and a collate function of torch itself. Their examples are drawn; those
    of all others are gathered as training uses them.

    Example:
        >>> data = TensorDataset(torch.zeros(8, 2))
        >>> is_in_memory(DataLoader(data)), is_in_memory(DataLoader(data, collate_fn=lambda items: items))
        (True, False)
    """
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler, _ = undistributed(loader.batch_sampler.sampler)
    return loader.collate_fn is default_collate and type(sampler) in SAMPLERS and bool(tensors_in(loader.dataset))


def is_sized(loader: Any) -> bool:
    """Whether a loader has indexed examples of a known number."""
    has_items = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return has_items and hasattr(loader.dataset, "__len__")


def has_epochs(loader: Any) -> bool:
    """Whether a user's sampler or dataset may depend on the epoch.

    Such a one is told of it, by `set_epoch`.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    places = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    places = [undistributed(place)[0] for place in places if not _is_torch_distributed(place)]
    return any(hasattr(place, "set_epoch") for place in (*places, getattr(loader, "dataset", None)))


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether each item of the dataset is a batch."""
    return batch_sampler_of(loader) is None


def batch_size_of(loader: Any) -> int | None:
    """Number of examples in a full training batch; None if unknown."""
    sampler = batch_sampler_of(loader) if isinstance(loader, DataLoader) else None
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def chunks(order: Sequence[int], size: int, *, whole: bool) -> list[Sequence[int]]:
    """Cut an order into batches.

    Args:
        order: indices.
        size: of a training batch.
        whole: whether all have this size, as with `drop_last`. Otherwise they are nearly equal and no larger, since a
            batch-norm needs more than a short remainder.
    """
    if whole:
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    count = -(-len(order) // size)
    return [order[part * len(order) // count : (part + 1) * len(order) // count] for part in range(count)]


def batch_sampler_of(loader: DataLoader[Any]) -> Any:
    """The sampler that gives lists of indices, or None."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    sampler: object = loader.sampler
    return sampler if isinstance(sampler, BatchSampler) else None


def _permutation(length: int, count: int, generator: torch.Generator) -> Tensor:
    """The first `count` of a random permutation of 0..length-1."""
    if length <= LISTED or count > length // 2:
        return torch.randperm(length, generator=generator)[:count]
    drawn: dict[int, None] = {}  # in order, each once
    while len(drawn) < count:
        drawn.update(dict.fromkeys(torch.randint(length, (count,), generator=generator).tolist()))
    return torch.tensor(list(drawn)[:count])


def tensors_in(dataset: object) -> list[Tensor]:
    """The tensors of a dataset in memory; none of any other.

    Example:
        >>> len(tensors_in(Subset(TensorDataset(torch.zeros(8, 2), torch.zeros(8)), [1, 2]))), tensors_in([0, 1])
        (2, [])
    """
    if type(dataset) is Subset:
        return tensors_in(dataset.dataset)
    if type(dataset) is ConcatDataset:
        parts = [tensors_in(part) for part in dataset.datasets]
        return [tensor for part in parts for tensor in part] if all(parts) else []
    if type(dataset) is TensorDataset:
        return list(dataset.tensors)
    return [dataset] if type(dataset) is Tensor else []


def _is_torch_distributed(sampler: object) -> bool:
    """Whether `set_epoch` does nothing but shuffle anew."""
    return type(sampler) is DistributedSampler
