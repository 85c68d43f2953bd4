"""Evaluations that come first: what must hold before derivatives.

It has one value for one batch, and depends on the parameters that are measured, by their copies alone.
"""

from __future__ import annotations

from contextlib import suppress

from lightning_subspace.data.assignment import assign
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.ranks import Ranks

# How far two evaluations of a batch may be apart: on a CPU not at all, but an accelerator may sum in another order.
SUM_ROUNDING = 1e-5


def can_evaluate(loss: TrainingLoss, batch: MicroBatch) -> bool:
    """Whether a part of a batch has a finite loss."""
    with loss:
        try:
            loss(batch)
        except Exception:  # the user's code may need the whole in any way
            return False
    return True


def require_value(loss: TrainingLoss, batch: MicroBatch, sample: Sample, ranks: Ranks) -> None:
    """Refuse a loss without one value of the parameters. A collective.

    Args:
        loss: to be opened.
        batch: evaluated twice, the same one on all ranks.
        sample: where `batch` depends on no parameter, as one without an object in it may, another one has to.
        ranks: the processes that share the sample.

    Raises:
        LossError: for such a loss, or when it cannot be evaluated.
    """
    with loss:
        values = [loss(batch).value.item() for _ in range(2)]
        if not loss.dependence.reaches_copies:
            _require_dependence(loss, sample, ranks)
    if abs(values[0] - values[1]) > SUM_ROUNDING * max(map(abs, values)):
        text = (
            f"loss: expected one value from two evaluations of a batch, got {values[0]} and {values[1]}; it "
            "depends on something outside of the module, perhaps a random generator: pass loss_fn=, a loss without."
        )
        # What makes it another one may be changed by each evaluation: there are no more of them.
        loss.refuse(text)


def _require_dependence(loss: TrainingLoss, sample: Sample, ranks: Ranks) -> None:
    for batch, _ in assign(sample.hessian, ranks):
        if not loss.dependence.reaches_copies:
            with suppress(Exception):  # the probe will meet it
                loss(batch)
    if not any(ranks.all_gather_object(loss.dependence.reaches_copies)):
        raise LossError(
            f"loss: expected one that depends on {', '.join(loss.space.names[:3])} of {type(loss.module).__name__}, "
            f"got none at {len(sample.hessian)} micro-batches; choose other params=, or pass a loss_fn= that uses the "
            "module it is given."
        )
