"""Which examples of a dataset training draws, and loading them without disturbing training.

Examples are loaded in worker processes of our own, with a generator of our own: iterating the trainer's loader would
change what training sees next, and loading in this process would move the random numbers of the dataset itself. Where
the project has no workers and none can be forked, loading does happen in this process, and what it moved is put back.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_subspace._lightning import undistributed
from lightning_subspace.data.micro_batch import SampleError
from lightning_subspace.state.object_graph import FOREIGN, ObjectGraph, walk
from lightning_subspace.state.rng import preserved_random_state


@dataclass(frozen=True)
class TrainingSet:
    """The examples that training draws from, and how often each comes.

    Known samplers are followed: what a SubsetRandomSampler leaves out stays out; a WeightedRandomSampler's weights are
    those of the pool; without shuffling, what lies behind the last batch of an epoch (`limit_train_batches`,
    `overfit_batches`, `drop_last`) is never seen and stays out, while shuffling brings every example in sooner or
    later. Under ranks the pool is that of all together. Any other sampler, or batch sampler without one, is taken to
    draw all examples of the dataset equally often.

    Attributes:
        indices: of the examples in the dataset.
        weights: (len(indices),), how often each is drawn relative to the others; None for equally often.
        num_draws: draws in an epoch, where they are weighted.
        replacement: whether an example may come twice in an epoch, where draws are weighted.
    """

    indices: Sequence[int]
    weights: Tensor | None = None
    num_draws: int = 0
    replacement: bool = False

    @classmethod
    def of(cls, loader: DataLoader[Any], limit: float = math.inf) -> TrainingSet:
        """The pool behind a training loader, of which an epoch takes at most `limit` batches.

        Raises:
            SampleError: for a loader without a sized dataset, or an empty one.
        """
        if not isinstance(loader, DataLoader):
            raise SampleError(
                f"sample: expected a DataLoader, got {type(loader).__name__}; pass the batches themselves, "
                "sample=[batch, ...], or a DataLoader of their own."
            )
        if not is_drawable(loader):
            raise SampleError(
                "sample: an iterable dataset has no fixed examples to draw from; pass sample='current', or the batches "
                "themselves, sample=[batch, ...]."
            )
        pool = cls._of_sampler(loader, limit)
        if not len(pool.indices):
            raise SampleError("sample: the training dataset is empty.")
        return pool

    @classmethod
    def _of_sampler(cls, loader: DataLoader[Any], limit: float) -> TrainingSet:
        count = len(loader.dataset)  # type: ignore[arg-type]  # it is sized
        batch_sampler = _batch_sampler(loader)
        sampler, num_replicas = undistributed(getattr(batch_sampler, "sampler", loader.sampler))
        indices = getattr(sampler, "indices", None)
        if isinstance(sampler, WeightedRandomSampler):
            return cls(range(len(sampler.weights)), sampler.weights, sampler.num_samples, sampler.replacement)
        if indices is not None:
            return cls([int(i) for i in indices])
        if isinstance(sampler, SequentialSampler) and type(batch_sampler) in (BatchSampler, type(None)):
            size = 1 if batch_sampler is None else batch_sampler.batch_size
            return cls(range(int(min(count, num_replicas * size * min(limit, len(loader))))))
        return cls(range(count))

    @property
    def population(self) -> float:
        """How many examples there are to draw; infinite where they are weighted, as no share of them can be told."""
        return float(len(self.indices)) if self.weights is None else math.inf

    def order(self, generator: torch.Generator) -> list[int]:
        """One epoch in random order, so that each beginning of it is a fair sample."""
        if self.weights is None:
            drawn = torch.arange(len(self.indices))
        else:
            # Without replacement the heavy examples come first, hence the permutation after it.
            drawn = torch.multinomial(self.weights, self.num_draws, self.replacement, generator=generator)
        order = drawn[torch.randperm(len(drawn), generator=generator)]
        return [self.indices[i] for i in order.tolist()]


def is_drawable(loader: Any) -> bool:
    """Whether a loader has a dataset whose examples can be drawn by their index."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return hasattr(loader.dataset, "__len__")


def gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether each item of the dataset is a batch: automatic batching is off, and the sampler gives single indices."""
    return _batch_sampler(loader) is None


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Number of examples in a full batch.

    Raises:
        SampleError: when the loader does not know it.
    """
    size = loader.batch_size or getattr(_batch_sampler(loader), "batch_size", None)
    if not isinstance(size, int):
        raise SampleError("batch_size: the training loader has no batch size of its own; pass batch_size=.")
    return size


def load(loader: DataLoader[Any], units: Sequence[Any] | None, generator: torch.Generator) -> Iterator[Any]:
    """Load and collate as a loader does, in processes of our own.

    Args:
        loader: gives dataset, collate function and workers; it is not iterated.
        units: what is given to the dataset, one a batch: lists of indices, or single ones where items are batches;
            None reads an iterable dataset to its end.
        generator: gives the workers their seeds.
    """
    batching: dict[str, Any]
    if units is None:
        batching = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        batching = {"batch_sampler": units}
    else:
        batching = {"batch_size": None, "sampler": units}
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
    """How many worker processes, and how they are started."""
    if loader.num_workers > 0:
        return loader.num_workers, loader.multiprocessing_context
    # A project without workers need not be able to start one: spawning runs its script anew, forking does not.
    return (1, "fork") if "fork" in multiprocessing.get_all_start_methods() else (0, None)


def _in_this_process(own: DataLoader[Any]) -> Iterator[Any]:
    """Load here, and put back the global random numbers and the state of the dataset and what it holds."""
    packages = frozenset(cls.__module__.split(".")[0] for cls in type(own.dataset).__mro__) - FOREIGN
    found = walk([vars(own.dataset)] if hasattr(own.dataset, "__dict__") else [], ObjectGraph(packages))
    try:
        with preserved_random_state():
            yield from own
    finally:
        for container in found.containers:
            container.replace_contents(container.items)
        for set_state, state in found.generators:
            set_state(state)


def _batch_sampler(loader: DataLoader[Any]) -> Any:
    """What gives lists of indices: the batch sampler, or a sampler of lists where automatic batching is off."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    sampler: Sampler[Any] = loader.sampler  # type: ignore[assignment]  # torch allows any iterable
    return sampler if isinstance(sampler, BatchSampler) else None
