"""Micro-batches without a loss, which have no part in the mean.

Lightning lets `training_step` return None for a batch, which it skips. Such a micro-batch is left out of the sample on
all ranks, as if it had not been drawn; the weights of the others stay as they are. It is looked for only once a probe
has met one, and at every probe from then on, since it may depend on the parameters: one forward pass of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.assignment import assign, owner_rank
from lightning_subspace.data.micro_batch import MicroBatch, detached_copy
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import LossError, NoLossError, WrittenError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.failure import free_frames, is_out_of_memory
from lightning_subspace.state.free_memory import remember_limits
from lightning_subspace.subspace.record import Record

T = TypeVar("T")
KEY = "solver/batches_without_loss"
MOST_REPEATS = 3  # one finds all that an evaluation writes to; another branch of the training step may write to more


class Screening:
    """Gives blocks of a run the micro-batches that have a loss.

    Attributes:
        is_needed: whether a batch without a loss was met.
        footprint: of the operators in the blocks.
        every, left: how many micro-batches the last block was for, and how many it was given.
    """

    def __init__(self) -> None:
        self.is_needed = False
        self.footprint = Footprint()
        self.every = self.left = 0

    def run(self, block: Callable[[Sample], T], sample: Sample, loss: Callable[[], TrainingLoss], ranks: Ranks) -> T:
        """Run a block on what has a loss. A collective.

        It runs again where a rank has found that its evaluations write to state around the module, and, with fewer
        graphs kept, where memory has run out: all ranks then do, so that their collectives stay the same.

        Args:
            block: what to do, inside of `ranks.agree()`: it fails on all ranks or on none.
            sample: as it was drawn.
            loss: makes the loss of the probe, to be opened.
            ranks: the processes that measure together.

        Raises:
            LossError: when no micro-batch for the Hessian has a loss.
        """
        number = 0
        while True:
            self.footprint.begin()
            try:
                return self._run(block, sample, loss, ranks)
            except Exception as error:
                if not self._is_to_be_repeated(error, ranks, number):
                    raise
            number += 1

    def _is_to_be_repeated(self, error: Exception, ranks: Ranks, number: int) -> bool:
        """Whether a failed block runs again, on all ranks."""
        if is_short := is_out_of_memory(error):
            remember_limits(error)
            free_frames(error)  # which hold what has filled the memory, and whoever caught it may try again at once
        own = isinstance(error, WrittenError), is_short, self.footprint.kept
        written, short, kept = zip(*ranks.all_gather_object(own), strict=True)
        if any(short) and self.footprint.lower(max(kept)):
            return True
        return any(written) and number < MOST_REPEATS

    def _run(self, block: Callable[[Sample], T], sample: Sample, loss: Callable[[], TrainingLoss], ranks: Ranks) -> T:
        self.every = self.left = _count(sample)
        if not self.is_needed:
            try:
                with ranks.agree():
                    return block(sample)
            except Exception as error:
                if not any(ranks.all_gather_object(isinstance(error, NoLossError))):
                    raise
                self.is_needed = True
        with ranks.agree():
            with loss() as opened:
                kept = with_loss(opened, sample, ranks)
            self.left = _count(kept)
            return block(kept)

    def counted(self, record: Record) -> Record:
        """The record with the number of micro-batches left out, if any were."""
        without = self.every - self.left
        return replace(record, metrics={**record.metrics, KEY: float(without)}) if without else record

    @property
    def notice(self) -> str | None:
        """How many micro-batches were left out; None for none."""
        if self.left == self.every:
            return None
        return (
            f"{self.every - self.left} of {self.every} micro-batches gave no loss (the training step returned None) "
            "and have no part in the mean, as in training."
        )


def with_loss(loss: TrainingLoss, sample: Sample, ranks: Ranks) -> Sample:
    """The micro-batches that have a loss, found by one forward pass each.

    Every rank holds the first of them, as it did the first of all. A collective.

    Args:
        loss: an open context.
        sample: all micro-batches.
        ranks: the processes that share them.

    Raises:
        LossError: when none for the Hessian has a loss, or one cannot be evaluated.
    """
    missing: set[tuple[int, int]] = set()
    for batch, _ in assign((*sample.hessian, *sample.extra), ranks):
        try:
            loss.value_at(None, [(batch, 1.0)])
        except NoLossError:
            missing.add(batch.key)
    missing = set().union(*ranks.all_gather_object(missing))
    if not missing:
        return sample
    hessian, extra = (tuple(b for b in part if b.key not in missing) for part in (sample.hessian, sample.extra))
    if not hessian:
        raise LossError(
            f"the loss of {type(loss.module).__name__}: expected a tensor or {{'loss': ...}} for one micro-batch at "
            f"least, got none for this batch or any other of the Hessian's {len(sample.hessian)}; pass a larger sample."
        )
    kept = Sample(_with_first_everywhere(hessian, ranks), extra)
    # The training set has as many without a loss in proportion, which are no part of the whole either.
    left, every = (sum(b.size for b in (*one.hessian, *one.extra)) for one in (kept, sample))
    return replace(kept, population=sample.population * left / every if every else math.inf)


def _count(sample: Sample) -> int:
    return len(sample.hessian) + len(sample.extra)


def _with_first_everywhere(batches: tuple[MicroBatch, ...], ranks: Ranks) -> tuple[MicroBatch, ...]:
    """Send the first micro-batch to the ranks that do not hold it."""
    first, *others = batches
    if all(ranks.all_gather_object(first.is_local)):
        return batches
    owner = owner_rank(first, ranks)
    data = ranks.all_gather_object(detached_copy(first.data, "cpu") if ranks.index == owner else None)[owner]
    return (first if first.is_local else replace(first, data=data, is_local=True), *others)
