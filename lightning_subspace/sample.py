"""Which examples a probe looks at: a fixed sample of the training set, drawn once.

The sample is the largest source of error of a probe. The Hessian gets `sample` examples; the gradient, which costs one
pass and is mostly noise when few examples are left to learn, gets `gradient_sample` examples that contain them.

Examples are drawn by a seeded permutation from the training *dataset*, through a loader of our own with worker
processes and a generator of its own: iterating the trainer's loader would change what training sees next, and loading
in this process would move the random numbers of the dataset. Micro-batches have the training batch size, since a loss
with batch-norm in train mode depends on it. They are kept on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_subspace.containment import copied
from lightning_subspace.random_state import preserved_random_state
from lightning_subspace.training_loss import MicroBatch

Weight = Callable[[Any], float]


class SampleError(ValueError):
    """The training data cannot give a fixed sample; the message says what to pass instead."""


@dataclass(frozen=True)
class Sample:
    """The micro-batches of a probe.

    Attributes:
        hessian: for the Hessian, and the first part of the gradient.
        extra: the rest of the gradient's sample; empty where both use the same examples.
        population: number of examples in the training set; infinite where it is not known.
    """

    hessian: tuple[MicroBatch, ...]
    extra: tuple[MicroBatch, ...] = ()
    population: float = math.inf

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
        """Bytes of the tensors that are held."""
        return sum(t.nbytes for b in (*self.hessian, *self.extra) for t in _tensors(b.data))


@dataclass(frozen=True)
class SampleRequest:
    """What a user asks for; see the arguments of `SubspaceMonitor`."""

    sample: int | str | Iterable[Any]
    gradient_sample: int | str
    batch_size: int | None
    weight: Weight | None
    seed: int

    @property
    def is_current(self) -> bool:
        """Whether each probe takes the batch just trained on, so that there is no fixed sample."""
        return isinstance(self.sample, str) and self.sample == "current"

    def draw(self, loader: Any) -> Sample:
        """The fixed sample of a run, from the trainer's loader or from what was given instead.

        Raises:
            SampleError: see `sample_of_batches` and `sample_of_dataset`.
        """
        if not isinstance(self.sample, int | str):
            return sample_of_batches(self.sample, self.weight)
        sizes = (None if size == "all" else int(size) for size in (self.sample, self.gradient_sample))
        return sample_of_dataset(loader, *sizes, batch_size=self.batch_size, weight=self.weight, seed=self.seed)


def sample_of_batches(batches: Iterable[Any], weight: Weight | None = None) -> Sample:
    """Take given batches as the sample.

    Args:
        batches: a list of batches or of (batch, weight) pairs with a plain number as weight, or a loader.
        weight: share of a batch in the mean; by default its number of examples.

    Raises:
        SampleError: when there are none, or the number of examples cannot be told.

    Example:
        >>> [b.weight for b in sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)]).hessian]
        [32.0, 8.0]
    """
    with preserved_random_state():  # a shuffling loader draws from the global generator
        found = [_micro_batch(item, weight, index) for index, item in enumerate(batches)]
    if not found:
        raise SampleError("batches: expected at least one batch, got none.")
    return Sample(tuple(found))


def sample_of_current(batch: Any, weight: Weight | None = None) -> Sample:
    """A copy of a batch of the running training, which has been through the transfer hooks already.

    Raises:
        SampleError: when the number of examples cannot be told.
    """
    value = number_of_examples(batch) if weight is None else weight(batch)
    return Sample((MicroBatch(_copied(batch), _checked(value), 0, transferred=True),))


def sample_of_dataset(
    loader: DataLoader[Any],
    sample: int | None,
    gradient_sample: int | None = None,
    *,
    batch_size: int | None = None,
    weight: Weight | None = None,
    seed: int = 0,
) -> Sample:
    """Draw a fixed sample from the dataset behind a training loader, which is not iterated.

    Args:
        loader: gives dataset, collate function, batch size, workers, and the examples its sampler may choose from.
        sample: number of examples for the Hessian; None takes all.
        gradient_sample: number of examples for the gradient, at least `sample`; None takes all. Ignored where
            `sample` is None.
        batch_size: of the micro-batches; by default the loader's.
        weight: share of a batch in the mean; by default its number of examples.
        seed: of the permutation, and of what the dataset does at random (augmentation).

    Raises:
        SampleError: for a loader without a sized dataset, or an empty one.
    """
    pool = _pool(loader)
    size = batch_size or _batch_size(loader)
    generator = torch.Generator().manual_seed(seed)
    order = [pool[i] for i in torch.randperm(len(pool), generator=generator).tolist()]
    first = order if sample is None else order[:sample]
    rest = [] if sample is None else order[len(first) : gradient_sample]
    chunks = [part[i : i + size] for part in (first, rest) for i in range(0, len(part), size)]
    own = DataLoader(
        loader.dataset,
        batch_sampler=chunks,
        collate_fn=loader.collate_fn,
        num_workers=max(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
    )
    batches = [
        MicroBatch(
            _copied(data, "cpu"),
            float(len(chunk)) if weight is None else _checked(weight(data)),
            index,
            size=len(chunk),
        )
        for index, (chunk, data) in enumerate(zip(chunks, own, strict=True))
    ]
    cut = -(-len(first) // size)
    return Sample(tuple(batches[:cut]), tuple(batches[cut:]), population=float(len(pool)))


def few_examples(batch: MicroBatch, count: int) -> MicroBatch:
    """The first `count` examples of a batch, where all its tensors share their first dimension; else the batch."""
    lengths = {len(t) if t.ndim else 0 for t in _tensors(batch.data)}
    if len(lengths) != 1 or next(iter(lengths)) <= count:
        return batch
    return MicroBatch(
        apply_to_collection(batch.data, Tensor, lambda t: t[:count]), float(count), batch.index, batch.transferred
    )


def number_of_examples(batch: Any) -> int:
    """Length of the first dimension of the first tensor in a batch.

    Raises:
        SampleError: when there is no tensor with a dimension.
    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise SampleError(
        f"the number of examples in a batch of type {type(batch).__name__} cannot be told; pass weight=, a function "
        "from a batch to a number."
    )


def _micro_batch(item: Any, weight: Weight | None, index: int) -> MicroBatch:
    if isinstance(item, MicroBatch):
        return item
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        return MicroBatch(_copied(item[0], "cpu"), _checked(item[1]), index)
    value = number_of_examples(item) if weight is None else weight(item)
    return MicroBatch(_copied(item, "cpu"), _checked(value), index)


def _checked(weight: float) -> float:
    value = float(weight)
    if not 0.0 < value < float("inf"):
        raise SampleError(f"weight: expected a positive finite number for every batch, got {value}.")
    return value


def _copied(data: Any, device: str | None = None) -> Any:
    """A copy that nobody else holds, on the given device or where it is."""
    return copied(data, lambda t: t.detach().to(device or t.device, copy=True))


def _tensors(data: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(data, Tensor, found.append)
    return found


def _pool(loader: DataLoader[Any]) -> Sequence[int]:
    """The indices that training may draw: held-out examples of a SubsetRandomSampler stay out."""
    if not isinstance(loader, DataLoader):
        raise SampleError(
            f"sample: expected the trainer to have one DataLoader, got {type(loader).__name__}; pass the batches "
            "themselves, sample=[batch, ...], or a DataLoader of their own."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise SampleError(
            "sample: an iterable dataset has no fixed examples to draw from; pass sample='current', or the batches "
            "themselves, sample=[batch, ...]."
        )
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    indices = getattr(sampler, "indices", None)
    pool: Sequence[int] = range(len(loader.dataset)) if indices is None else [int(i) for i in indices]
    if not len(pool):
        raise SampleError("sample: the training dataset is empty.")
    return pool


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise SampleError("batch_size: the training loader has no batch size of its own; pass batch_size=.")
    return size
