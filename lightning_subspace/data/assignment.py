"""Assignment of micro-batches to ranks.

The micro-batches of all ranks are fixed first, so that any number of ranks sees the same function. A training step may
contain collectives of its own, so each rank evaluates exactly one in every round: a rank without one left evaluates a
filler, at weight zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.parallel.ranks import Ranks


class Assignment(NamedTuple):
    """One evaluation by this rank.

    Attributes:
        batch: the micro-batch.
        share: of this batch in the mean over all ranks, in [0, 1]; 0 for a filler.
    """

    batch: MicroBatch
    share: float


def assign(batches: Sequence[MicroBatch], ranks: Ranks, fillers: Sequence[MicroBatch] = ()) -> list[Assignment]:
    """This rank's evaluations for a weighted mean, equally many on all.

    Args:
        batches: all micro-batches of the mean, of all ranks; the data of its own are on this rank.
        ranks: the process group.
        fillers: more micro-batches that may be evaluated at weight zero.

    Raises:
        ValueError: when the data of none of them are on this rank.

    Example:
        >>> [one.share for one in assign([MicroBatch(None, 3.0, 0), MicroBatch(None, 1.0, 1)], Ranks())]
        [0.75, 0.25]
    """
    total = sum(batch.weight for batch in batches)
    counts = Counter(owner_rank(batch, ranks) for batch in batches)
    own = [Assignment(batch, batch.weight / total) for batch in batches if owner_rank(batch, ranks) == ranks.index]
    filler = next((batch for batch in (*batches, *fillers) if batch.is_local), None)
    if filler is None:
        raise ValueError("batches: expected at least one micro-batch whose data are on this rank, got none.")
    return own + [Assignment(filler, 0.0)] * (max(counts.values(), default=0) - len(own))


def group_by_round(batches: Sequence[MicroBatch], ranks: Ranks) -> list[list[MicroBatch]]:
    """The micro-batches that are evaluated at the same time, round by round."""
    of_rank: dict[int, list[MicroBatch]] = {}
    for batch in batches:
        of_rank.setdefault(owner_rank(batch, ranks), []).append(batch)
    return [[batch for batch in together if batch is not None] for together in zip_longest(*of_rank.values())]


def owner_rank(batch: MicroBatch, ranks: Ranks) -> int:
    """The rank that a micro-batch belongs to, in 0..W-1."""
    return batch.index % ranks.count
