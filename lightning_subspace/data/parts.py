"""Parts of a sample's batches, where whole ones are too large.

Batches of training are measured whole. They are cut where the user gives a `batch_size`, or where one batch is more
than the number of examples for the Hessian: its first examples are the Hessian's, and the rest belongs to the
gradient's, which has all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_subspace.data.micro_batch import MicroBatch, parts_of
from lightning_subspace.data.sample import Sample, SampleSpec
from lightning_subspace.parallel.ranks import Ranks

# Between the indices of two parts of a batch, for each rank: more batches than a sample has.
STRIDE = 1 << 16


def cut_sample(sample: Sample, spec: SampleSpec, ranks: Ranks) -> Sample:
    """The sample, its batches cut where they are too large. A collective.

    Args:
        sample: of whole batches.
        spec: gives the number of examples for the Hessian, and the largest size of a part.
        ranks: the process group. Where one of them cannot cut a batch, no rank cuts any.

    Example:
        >>> import torch
        >>> whole = Sample((MicroBatch(torch.zeros(8, 2), 8.0, 0, size=8),))
        >>> found = cut_sample(whole, SampleSpec(3, 8, None, None, 0), Ranks())
        >>> [batch.size for batch in found.hessian], [batch.size for batch in found.extra]
        ([3], [5])
    """
    every = (*sample.hessian, *sample.extra)
    num_heads, share = len(sample.hessian), None
    if isinstance(spec.sample, int):
        count = min(ranks.count, len(every))  # one batch of each rank
        if num_heads <= count and every[0].size > -(-spec.sample // count):
            num_heads, share = count, -(-spec.sample // count)
    sizes = [_sizes(batch.size, spec.batch_size, share if i < num_heads else None) for i, batch in enumerate(every)]
    if all(len(parts) == 1 for parts in sizes):
        return sample
    pieces = [_cut(batch, parts, ranks) for batch, parts in zip(every, sizes, strict=True)]
    if not ranks.all_reduce_min(int(None not in pieces)):
        return sample
    first, rest = list[MicroBatch](), list[MicroBatch]()
    for number, parts in enumerate(filter(None, pieces)):
        seen = 0
        for part in parts:
            (first if number < num_heads and (share is None or seen < share) else rest).append(part)
            seen += part.size
    return replace(sample, hessian=tuple(first), extra=tuple(rest))


def _sizes(size: int, most: int | None, share: int | None) -> list[int]:
    """Sizes of a batch's parts, nearly equal; the first make a share."""
    pieces = [size] if share is None or size <= share else [share, size - share]
    if most is None:
        return pieces
    counts = [-(-piece // most) for piece in pieces]
    return [
        (part + 1) * piece // count - part * piece // count
        for piece, count in zip(pieces, counts, strict=True)
        for part in range(count)
    ]


def _cut(batch: MicroBatch, sizes: Sequence[int], ranks: Ranks) -> list[MicroBatch] | None:
    """The parts of a batch, on its rank, with their own indices."""
    if len(sizes) == 1:
        return [batch]
    parts = [replace(batch, size=size, weight=batch.weight * size / batch.size) for size in sizes]
    if batch.is_local:
        if (found := parts_of(batch, sizes)) is None:
            return None
        parts = found
    return [replace(part, index=batch.index + number * STRIDE * ranks.count) for number, part in enumerate(parts)]
