"""Joined micro-batches along a run of probes.

They are tried before the first probe, and given up where they fail. Every decision is made of numbers that all ranks
have, and is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

from torch import nn

from lightning_subspace.curvature import CurvatureConfig, Operator
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.curvature.joining import SHORT, JoinedLossError, JoinError
from lightning_subspace.data.joined import grouped
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.failure import is_out_of_memory

P = ParamSpec("P")
T = TypeVar("T")


class Joining:
    """Joins the micro-batches of a run's probes; see `curvature/joining.py`.

    Attributes:
        remark: what became of it, for the user; None where there is nothing to join.
    """

    def __init__(self) -> None:
        self.remark: str | None = None
        self._may_join = False
        self._footprint = Footprint()  # of the run's operators

    def begin(
        self, choice: CurvatureConfig, module: nn.Module, sample: Sample, partition: Partition
    ) -> CurvatureConfig:
        """The configuration that joins micro-batches, if they can be. A collective.

        Raises:
            LossError: when the loss cannot be evaluated.
        """
        self.remark, self._may_join = None, False
        try:
            found = choice.joining(module, sample, partition)
        except JoinError as error:
            self.refuse(str(error))
            return choice
        if found.most_joined > 1:
            self._may_join = True
            count = len(grouped(sample.hessian, partition.ranks, found.most_joined, found.joined_bytes))
            self.remark = f"micro-batches joined for products: {len(sample.hessian)} -> {count}."
        return found

    def operator(
        self, choice: CurvatureConfig, footprint: Footprint
    ) -> Callable[[TrainingLoss, Sample, Partition], Operator]:
        """What makes the operator of a probe, on all ranks at once."""
        self._footprint = footprint

        def made(loss: TrainingLoss, sample: Sample, partition: Partition) -> Operator:
            operator = chosen(loss, sample, partition)
            if not loss.is_another:
                operator.footprint = footprint  # also of those that keep no graphs
            return operator

        def chosen(loss: TrainingLoss, sample: Sample, partition: Partition) -> Operator:
            if loss.is_another:  # not tried whether it can be joined, and what it holds is not the probe's
                return replace(choice, most_joined=1).operator(loss, sample, partition, replace(footprint))
            if self._may_join:
                try:
                    return choice.operator(loss, sample, partition, footprint)
                except JoinError as error:
                    self.refuse(str(error))
            return replace(choice, most_joined=1).operator(loss, sample, partition, footprint)

        return made

    def run(self, ranks: Ranks, block: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a block, and again without joining where that has failed.

        For lack of memory, or since a loss of joined ones cannot be evaluated, on any rank. A collective.
        """
        try:
            return block(*args, **kwargs)
        except Exception as error:
            reasons = ranks.all_gather_object(_reason(error)) if self._may_join else []
            reason = SHORT if SHORT in reasons else next(filter(None, reasons), None)
            if reason is None:
                raise
            self.refuse(reason)
            if reason == SHORT:
                self._footprint.forget()  # graphs of single ones may fit where those of joined ones did not
        return block(*args, **kwargs)  # not above, where the exception still holds what was built

    @property
    def refusal(self) -> str | None:
        """The remark, where it says that none are joined."""
        return None if self._may_join else self.remark

    def refuse(self, reason: str | None) -> None:
        """Join none from now on; a reason is told."""
        self._may_join, self.remark = False, None if reason is None else f"micro-batches not joined: {reason}."


def _reason(error: Exception) -> str | None:
    """Why to join none from now on; None: something else failed."""
    if is_out_of_memory(error):
        return SHORT
    return str(error) if isinstance(error, JoinedLossError) else None
