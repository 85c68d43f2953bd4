"""Who evaluates which micro-batch: global micro-batches are dealt to ranks in rounds.

Micro-batches are fixed before they are dealt, so that any number of ranks sees the same function. The i-th belongs to
rank i mod W. In every round each rank evaluates exactly one, since a training step may contain collectives of its own:
a rank that has none left evaluates one that it holds at weight zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.parallel.ranks import Ranks


class Assignment(NamedTuple):
    """What this rank does in one round.

    Attributes:
        batch: the micro-batch that it evaluates.
        share: of this batch in the mean over all ranks, in [0, 1]; 0 where it only keeps the others company.
    """

    batch: MicroBatch
    share: float


def assign(batches: Sequence[MicroBatch], ranks: Ranks, fillers: Sequence[MicroBatch] = ()) -> list[Assignment]:
    """This rank's turns in the weighted mean over `batches`, equally many on every rank.

    Args:
        batches: all micro-batches of the mean, of all ranks; this rank holds the data of its own.
        ranks: the processes.
        held: where to look for one to evaluate at weight zero, beside `batches`.

    Raises:
        ValueError: when there is none.

    Example:
        >>> [turn.share for turn in assign([MicroBatch(None, 3.0, 0), MicroBatch(None, 1.0, 1)], Ranks())]
        [0.75, 0.25]
    """
    total = sum(batch.weight for batch in batches)
    owners = Counter(owner_rank(batch, ranks) for batch in batches)
    turns = [Assignment(batch, batch.weight / total) for batch in batches if owner_rank(batch, ranks) == ranks.index]
    company = next((batch for batch in (*batches, *fillers) if batch.is_local), None)
    if company is None:
        raise ValueError("batches: expected at least one micro-batch whose data are on this rank, got none.")
    return turns + [Assignment(company, 0.0)] * (max(owners.values(), default=0) - len(turns))


def group_by_round(batches: Sequence[MicroBatch], ranks: Ranks) -> list[list[MicroBatch]]:
    """The same rounds seen from above: the micro-batches that are evaluated together, by rank."""
    of_rank: dict[int, list[MicroBatch]] = {}
    for batch in batches:
        of_rank.setdefault(owner_rank(batch, ranks), []).append(batch)
    count = max(map(len, of_rank.values()), default=0)
    return [[own[i] for own in of_rank.values() if i < len(own)] for i in range(count)]


def owner_rank(batch: MicroBatch, ranks: Ranks) -> int:
    """The rank that a micro-batch belongs to."""
    return batch.index % ranks.count
