"""Examples of a run: what is measured of a sample.

Of a loss that is random beside its examples several draws are taken, where the sample is ours to draw; the draws of
given batches, and of the current one, were chosen by their user. Of the draws those count that have a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from torch import nn

from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.assignment import assign
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import NoLossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.probe.freshness import differ, traits_of
from lightning_subspace.probe.joining import Joining
from lightning_subspace.probe.randomness import is_random, remark, with_draws
from lightning_subspace.probe.screening import Screening
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.record import Record

T = TypeVar("T")
ONE_MICRO_BATCH = (
    "the sample is one micro-batch, which cannot be halved, so the gradient fraction gets no error bar; pass a larger "
    "sample or a smaller batch_size."
)


class Examples:
    """Finds what is measured of a sample.

    Args:
        settings: of the run; they say whether the sample is ours to draw, and how many evaluations it may have.

    Attributes:
        joining: of micro-batches, for products.
        is_random: whether the loss was found random beside its examples.
        remarks: what a user should know about it, by cause.
    """

    def __init__(self, settings: ProbeSettings) -> None:
        self.joining = Joining()
        self.is_random = False
        self.remarks: dict[str, str] = {}
        self._spec = settings.sample_spec
        self._measures = bool(settings.taken)
        self._wants_error_bar = bool(settings.k and settings.defaults)
        self._has_products = settings.choice.has_products
        self._screening = Screening()

    @property
    def footprint(self) -> Footprint:
        """What the last operator of the run has held, and may keep."""
        return self._screening.footprint

    def prepared(
        self, choice: CurvatureConfig, module: nn.Module, sample: Sample, partition: Partition
    ) -> CurvatureConfig:
        """The configuration that joins micro-batches, if they can be. A collective.

        It is seen before whether the loss is random.

        Raises:
            LossError: when the loss cannot be evaluated.
        """
        self.is_random = self._are_random(choice, module, sample, partition)
        self._has_products = choice.has_products
        if self.is_random:
            asks = self._has_products and len(sample.hessian) > 1  # otherwise there is nothing to join
            self.joining.refuse("the loss is random" if asks else None)
            return choice
        return self.joining.begin(choice, module, sample, partition)

    def _are_random(self, choice: CurvatureConfig, module: nn.Module, sample: Sample, partition: Partition) -> bool:
        """Whether to take several draws of a random loss. A collective."""
        if not (isinstance(self._spec.sample, int) or self._spec.sample == "all"):
            return False
        with choice.loss(module, partition.space, partition.ranks) as loss:
            operator = partial(choice.operator, footprint=self.footprint)
            return is_random(loss, operator, sample.hessian[: partition.ranks.count], partition)

    @property
    def told(self) -> dict[str, str]:
        """All remarks, by cause, with what became of joining micro-batches."""
        text = self.joining.remark
        return self.remarks if text is None else {**self.remarks, text: text}

    def can_be_evaluated(
        self, choice: CurvatureConfig, module: nn.Module, sample: Sample, partition: Partition
    ) -> bool:
        """Whether all ranks can evaluate the sizes of the micro-batches. A collective.

        Each tries its first and its smallest one: a loss has to be finite, or there is none.
        """
        ranks = partition.ranks
        own = [batch for batch, _ in assign((*sample.hessian, *sample.extra), ranks)]
        with ranks.agree(), choice.loss(module, partition.space, ranks) as loss:
            found = [_has_value(loss, batch) for batch in (own[0], min(own, key=lambda batch: batch.size))]
            return bool(ranks.all_reduce_min(int(all(found))))

    def differ(
        self, choice: CurvatureConfig, module: nn.Module, one: Sample, other: Sample, partition: Partition
    ) -> bool:
        """Whether two samples differ. A collective.

        Costs one forward pass of the Hessian's part of each.
        """
        ranks = partition.ranks
        with ranks.agree(), choice.loss(module, partition.space, ranks) as loss:
            return differ(*(traits_of(loss, sample, ranks) for sample in (one, other)))

    def drawn(self, sample: Sample) -> Sample:
        """Several draws of a random loss; otherwise the sample itself.

        A function of the sample and the settings alone, whatever the number of ranks.
        """
        if self.is_random:
            sample = with_draws(sample, self._spec, measures=self._measures)
            has_bar = self._wants_error_bar and self._has_products
            self.remarks["random loss"] = remark(sample, has_products=self._has_products, has_bar=has_bar)
        if self._wants_error_bar and len(sample.hessian) == 1 and sample.hessian_share < 1.0:
            self.remarks["one micro-batch"] = ONE_MICRO_BATCH
        return sample

    def screened(
        self,
        block: Callable[[Sample], T],
        sample: Sample,
        choice: CurvatureConfig,
        module: nn.Module,
        partition: Partition,
    ) -> T:
        """Run a block on the micro-batches that have a loss. A collective.

        Raises:
            LossError: when no micro-batch for the Hessian has a loss.
        """
        ranks = partition.ranks
        result = self.joining.run(
            ranks, self._screening.run, block, sample, lambda: choice.loss(module, partition.space, ranks), ranks
        )
        if self._screening.notice is not None:
            self.remarks["no loss"] = self._screening.notice
        if self.footprint.notice is not None:
            self.remarks["graphs"] = self.footprint.notice
        return result

    def remark_on(self, *texts: str, by_cause: Mapping[str, str]) -> None:
        """Add sentences that a user should know; "" is none."""
        self.remarks.update({**{text: text for text in texts if text}, **by_cause})

    def counted(self, record: Record) -> Record:
        """The record with the number of micro-batches without a loss, if any."""
        return self._screening.counted(record)


def _has_value(loss: TrainingLoss, batch: MicroBatch) -> bool:
    try:
        return math.isfinite(loss.value_at(None, [(batch, 1.0)]))
    except Exception as error:  # the user's code may need the whole batch in any way
        return isinstance(error, NoLossError)
