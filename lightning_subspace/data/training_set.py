"""Examples that training draws from, and loading them without a trace.

Worker processes of our own load them, with a generator of our own: iterating the trainer's loader would change what
training sees next, and loading in this process would move the dataset's random numbers. If the loader has no workers
and none can be forked, loading does happen in this process, and its state is put back.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from lightning_subspace._lightning import undistributed
from lightning_subspace.data.micro_batch import SampleError
from lightning_subspace.state.object_graph import packages_of, restore, walk
from lightning_subspace.state.rng import preserved_random_state


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
        if not is_drawable(loader):
            raise SampleError(
                "sample: got an iterable dataset, which has no fixed examples; pass sample='current' or [batch, ...]."
            )
        count = len(loader.dataset)  # type: ignore[arg-type]  # it is sized
        batch_sampler = _batch_sampler(loader)
        sampler, num_replicas = undistributed(getattr(batch_sampler, "sampler", loader.sampler))
        if isinstance(sampler, WeightedRandomSampler):
            found = cls(range(len(sampler.weights)), sampler.weights, sampler.num_samples, sampler.replacement)
        elif (indices := getattr(sampler, "indices", None)) is not None:
            found = cls([int(i) for i in indices])
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

    def order(self, generator: torch.Generator) -> list[int]:
        """Indices of an epoch in random order; each beginning is a sample."""
        if self.weights is None:
            drawn = torch.arange(len(self.indices))
        else:
            # Without replacement the heavy examples come first; the permutation below undoes that.
            drawn = torch.multinomial(self.weights, self.num_draws, self.replacement, generator=generator)
        order = drawn[torch.randperm(len(drawn), generator=generator)]
        return [self.indices[i] for i in order.tolist()]


def is_drawable(loader: Any) -> bool:
    """Whether the dataset's examples can be drawn by their index."""
    has_items = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return has_items and hasattr(loader.dataset, "__len__")


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether each item of the dataset is a batch."""
    return _batch_sampler(loader) is None


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Number of examples in a full training batch.

    Raises:
        SampleError: when the loader does not know it.
    """
    size = loader.batch_size or getattr(_batch_sampler(loader), "batch_size", None)
    if not isinstance(size, int):
        raise SampleError("batch_size: expected a loader with a batch size, got one without; pass batch_size=.")
    return size


def load(loader: DataLoader[Any], units: Sequence[Any] | None, generator: torch.Generator) -> Iterator[Any]:
    """Load and collate as a loader does, in processes of our own.

    Args:
        loader: gives dataset, collate function and workers; it is not iterated.
        units: for each batch its indices, or one index if items are batches; None reads an iterable dataset to its end.
        generator: draws the seeds of the workers.
    """
    batching: dict[str, Any] = {"batch_size": None, "sampler": units}
    if units is None:
        batching = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        batching = {"batch_sampler": units}
    num_workers, context = _workers(loader)
    own: DataLoader[Any] = DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=context,
        generator=generator,
        **batching,
    )
    return iter(own) if num_workers else _in_this_process(own)


def _workers(loader: DataLoader[Any]) -> tuple[int, Any]:
    """Number of worker processes, and how to start them."""
    if loader.num_workers > 0:
        return loader.num_workers, loader.multiprocessing_context
    # Spawning runs the script again, which a script without workers need not allow; forking does not.
    return (1, "fork") if "fork" in multiprocessing.get_all_start_methods() else (0, None)


def _in_this_process(own: DataLoader[Any]) -> Iterator[Any]:
    """Load here, and put back random numbers and the dataset's state."""
    found = walk([vars(own.dataset)] if hasattr(own.dataset, "__dict__") else [], packages_of([own.dataset]))
    try:
        with preserved_random_state():
            yield from own
    finally:
        restore(found.containers, found.generators)


def _batch_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler that gives lists of indices, or None."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    sampler: object = loader.sampler
    return sampler if isinstance(sampler, BatchSampler) else None
