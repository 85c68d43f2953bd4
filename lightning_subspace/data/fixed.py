"""Fixed samples of training data that are read beside no training.

What has a length is drawn from at random, as tensors in memory are for a monitor; of what has none, the first batches
are taken. Both depend on the seed alone, not on the number of ranks, each of which reads all of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_subspace._lightning import CombinedLoader
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.micro_batch import MicroBatch, SampleError, checksum, with_equal_weights
from lightning_subspace.data.reading import ReadProgress, read
from lightning_subspace.data.sample import Sample, SampleSpec, micro_batch, require_same_batches
from lightning_subspace.data.several_loaders import sample_of_loaders
from lightning_subspace.data.training_set import batch_size_of, is_sized
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.rng import preserved_random_state, seed_generators


def fixed_sample(loaders: CombinedLoader, spec: SampleSpec, ranks: Ranks) -> Sample:
    """The sample of these loaders. A collective.

    Raises:
        SampleError: where they cannot give it.
        TimeoutError: where reading takes too long.
    """
    parts = loaders.flattened
    if len(parts) > 1 or loaders.iterables is not parts[0] or is_sized(parts[0]):
        return sample_of_loaders(loaders, spec, ranks)
    [loader] = parts
    sample, gradient_sample = spec.sample, spec.gradient_sample
    if isinstance(sample, int) and isinstance(gradient_sample, int):
        return first_batches(loader, sample, gradient_sample, spec, ranks)
    raise SampleError("sample: expected a number of examples for data without a length, got 'all'.")


def first_batches(loader: Any, sample: int, gradient_sample: int, spec: SampleSpec, ranks: Ranks) -> Sample:
    """The first batches of a loader that has no length. A collective.

    Raises:
        SampleError: where there are none, or they differ between ranks.
        TimeoutError: where reading takes too long.
    """
    progress = ReadProgress(spec.read_timeout)
    counter = ExampleCounter(batch_size_of(loader))
    batches: list[MicroBatch] = []
    seen = 0
    for item in _items(loader, spec.seed, progress):
        batches.append(micro_batch(item, len(batches), spec.weight, ranks=ranks, counter=counter))
        seen += batches[-1].size
        progress.add(batches[-1].size)
        if seen >= gradient_sample:
            break
    if not batches:
        raise SampleError("sample: expected a training loader with batches, got an empty one.")
    batches = with_equal_weights(batches)
    require_same_batches(batches, ranks)
    return Sample.of(batches, sample, math.inf)


def fingerprint(sample: Sample, ranks: Ranks) -> int:
    """Checksum of a sample, for any number of ranks. A collective.

    Raises:
        SampleError: for a batch that cannot be copied.
    """
    batches = (*sample.hessian, *sample.extra)
    own = {batch.index: checksum(batch.data) for batch in batches if batch.is_local}
    found: dict[int, int] = {}
    for part in ranks.all_gather_object(own):
        found |= part
    return zlib.crc32(repr((sorted(found.items()), [batch.weight for batch in batches])).encode())


def _items(loader: Any, seed: int, progress: ReadProgress) -> Iterator[Any]:
    if isinstance(loader, DataLoader):
        yield from read(loader, None, torch.Generator().manual_seed(seed), progress)
        return
    with preserved_random_state():
        seed_generators(seed)
        for item in loader:
            progress.check()
            yield item
