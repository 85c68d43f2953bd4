"""Fixed samples that are drawn from the dataset behind a training loader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.micro_batch import MicroBatch, SampleError, Weight, with_equal_weights
from lightning_subspace.data.reading import ReadProgress, read
from lightning_subspace.data.sample import Sample, micro_batch, require_same_batches
from lightning_subspace.data.training_set import TrainingSet, batch_sampler_of, batch_size_of, chunks, gives_batches
from lightning_subspace.parallel.ranks import Ranks


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
            equal and no larger, unless a number was asked for and the loader drops an incomplete batch.
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
    # "all" means all: what `drop_last` leaves out is in the mean as well.
    whole = goal is not None and batch_size is None and bool(getattr(batch_sampler_of(loader), "drop_last", False))
    order = training_set.order(generator, None if goal is None else -(-goal // size) * size)
    cut = len(order) if sample is None else -(-sample // size) * size
    units = [unit for part in (order[:cut], order[cut:]) for unit in chunks(part, size, whole=whole)]
    if not units:
        raise SampleError(
            f"sample: expected at least one batch of {size} examples, got {len(order)} examples and drop_last=True."
        )
    return units
