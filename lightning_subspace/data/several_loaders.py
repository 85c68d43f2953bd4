"""Fixed samples from several training loaders.

They come as a dict, a list or a CombinedLoader. Lightning's own CombinedLoader combines lists of indices here, in the
mode of training; only the sample is loaded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_subspace._lightning import CombinedLoader
from lightning_subspace.data.drawn import sample_of_dataset
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.micro_batch import MicroBatch, SampleError
from lightning_subspace.data.reading import ReadProgress, read
from lightning_subspace.data.sample import Sample, SampleSpec, micro_batch, require_same_batches
from lightning_subspace.data.training_set import TrainingSet, batch_size_of
from lightning_subspace.parallel.ranks import Ranks


@dataclass(frozen=True)
class IndexBatch:
    """Indices of one batch of one of the loaders."""

    part: int
    indices: list[int]


def sample_of_loaders(loaders: CombinedLoader, spec: SampleSpec, ranks: Ranks) -> Sample:
    """Draw a fixed sample from the datasets behind the training loaders.

    With several loaders, whole combined batches of one epoch are drawn; examples of all loaders count, and their number
    is the default weight. In "max_size_cycle" a short loader begins again, in "max_size" it gives None.

    Args:
        loaders: of training; one of them alone is drawn from by `sample_of_dataset`.
        spec: numbers of examples, or "all".
        ranks: the process group.

    Raises:
        SampleError: for a loader without a sized dataset, an empty one, or a batch size for several loaders.
        TimeoutError: when reading takes longer than the limit of `spec`.
    """
    sizes: list[Any] = [None if isinstance(size, str) else size for size in (spec.sample, spec.gradient_sample)]
    sample, gradient_sample = sizes
    goal = None if sample is None or gradient_sample is None else max(sample, gradient_sample)
    parts = loaders.flattened
    limits = [math.inf] * len(parts) if loaders.limits is None else loaders.limits
    progress = ReadProgress(spec.read_timeout)
    if len(parts) == 1 and loaders.iterables is parts[0]:
        options: dict[str, Any] = {"batch_size": spec.batch_size, "weight": spec.weight, "seed": spec.seed}
        return sample_of_dataset(
            parts[0], sample, gradient_sample, limit=limits[0], ranks=ranks, progress=progress, **options
        )
    if spec.batch_size is not None:
        raise SampleError("batch_size: several training loaders keep the batch size of each; leave it out.")
    generator = torch.Generator().manual_seed(spec.seed)
    of_part = []
    for number, (loader, limit) in enumerate(zip(parts, limits, strict=True)):
        order, size = TrainingSet.of(loader, limit).order(generator), batch_size_of(loader)
        if size is None:
            raise SampleError("sample: expected loaders with a batch size, got one without; pass sample=[batch, ...].")
        of_part.append([IndexBatch(number, order[i : i + size]) for i in range(0, len(order), size)])
    combined = list(_combinations(loaders, of_part))
    chosen, seen = [], 0
    for i in torch.randperm(len(combined), generator=generator).tolist():
        if goal is not None and seen >= goal:
            break
        used = _chunks(combined[i])
        size = sum(len(chunk.indices) for chunk in used)
        chosen.append((combined[i], used, size))
        seen += size
    progress.count = seen
    data = []
    for number, loader in enumerate(parts):
        units = [chunk.indices for _, used, _ in chosen for chunk in used if chunk.part == number]
        data.append(read(loader, units, generator, progress))
    batches: list[MicroBatch] = []
    for item, _, size in chosen:
        loaded = apply_to_collection(item, IndexBatch, lambda chunk: next(data[chunk.part]))
        batches.append(micro_batch(loaded, len(batches), spec.weight, size=size, ranks=ranks))
        progress.add(size)
    require_same_batches(batches, ranks)
    return Sample.of(batches, sample)


class CombinedCounter(ExampleCounter):
    """Counter of the examples of combined batches: those of all loaders together.

    Args:
        batch_sizes: what each loader puts into a batch, if it is known.

    Example:
        >>> counter = CombinedCounter([4, 6])
        >>> counter.count({"a": torch.zeros(4, 2), "b": [torch.zeros(6, 2), torch.zeros(6)]})
        10
    """

    def __init__(self, batch_sizes: Sequence[int | None]) -> None:
        known = [size for size in batch_sizes if size is not None]
        super().__init__(sum(known) if len(known) == len(batch_sizes) else None)
        self._parts = [ExampleCounter(size) for size in batch_sizes]

    @property
    def learned(self) -> Any:
        """What the counters of the parts have learned."""
        return [part.learned for part in self._parts]

    @learned.setter
    def learned(self, values: Any) -> None:
        for part, value in zip(getattr(self, "_parts", ()), values, strict=False):
            part.learned = value

    def count(self, batch: Any) -> int | None:
        """The number of examples in all parts."""
        items = list(batch.values() if isinstance(batch, Mapping) else batch) if _is_collection(batch) else []
        if len(items) != len(self._parts):
            return super().count(batch)
        counts = [0 if item is None else part.count(item) for part, item in zip(self._parts, items, strict=True)]
        return None if None in counts else sum(count for count in counts if count is not None)


def _is_collection(batch: Any) -> bool:
    return isinstance(batch, (Mapping, list, tuple))


def _combinations(loaders: CombinedLoader, of_part: list[list[IndexBatch]]) -> Iterator[Any]:
    """The combined batches of an epoch, as indices."""
    own = copy.copy(loaders)  # with the mode, and the structure of a combined batch
    own.flattened = of_part
    iter(own)
    for item, _, _ in islice(own, len(own)):
        yield item


def _chunks(item: Any) -> list[IndexBatch]:
    """The parts of one combined batch, in the order of loading."""
    found: list[IndexBatch] = []
    apply_to_collection(item, IndexBatch, found.append)
    return found
