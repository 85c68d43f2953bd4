"""Losses of a training loop beside that of the sample.

One warning where they differ by more than their spreads explain.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_subspace._lightning import Trainer
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.loss.mode import Mode
from lightning_subspace.measurements import Probe
from lightning_subspace.measurements.sample_loss import SampleMean
from lightning_subspace.probe.loss_window import LossWindow
from lightning_subspace.probe.second_opinion import BLOCK, KEPT, Comparison, SecondOpinion

NOT_COMPARED = "the loss of the sample is not compared with training's"


class LossComparison:
    """Keeps what training returned, and compares it with each probe.

    With a `loss_fn` of the user's, which may be another loss by intention, nothing is compared.

    Args:
        runner: of the probes; its ranks compare together.

    Attributes:
        opinion: what the comparisons have shown.
    """

    def __init__(self, runner: ProbeRunner) -> None:
        self.opinion = SecondOpinion()
        self._window = LossWindow(KEPT)
        self._size: int | None = None  # examples in this rank's first batch; 1 where it cannot be told
        self._has_renewed = False  # whether a sample was taken anew for its loss, and none has agreed since
        self._runner = runner

    def begin(self) -> None:
        """Another fit begins."""
        self._has_renewed = False
        self.opinion.begin()
        self._window.clear()
        self._size = None

    def see(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        """Keep the loss of a batch; compare a probe when due."""
        if self._size is None:
            self._size = _examples(batch)
        self._window.add(outputs, trainer.accumulate_grad_batches)
        if self.opinion.is_due(self._window.seen):
            self.answer(trainer)

    def ask(self, probe: Probe) -> None:
        """A probe has been taken."""
        if self._runner.settings.loss_fn is None and not self._runner.source.is_renewing:
            self.opinion.ask(
                SampleMean.of(probe.losses, (*probe.sample.hessian, *probe.sample.extra)), self._window.seen
            )

    def running_mean(self) -> dict[str, float]:
        """`training_loss`, the mean of training's last 16 losses. A collective."""
        read = self._runner.on_all_ranks(NOT_COMPARED, lambda: self._window.read(self._runner.ranks))
        losses = [value for value in (read or [])[-BLOCK:] if math.isfinite(value)]
        if not losses:
            return {}
        mean = sum(losses) / len(losses)
        if self.opinion.start is None:
            self.opinion.start = mean
        return {"training_loss": mean}

    def answer(self, trainer: Trainer) -> None:
        """Compare the probe that waits; warn at the second that differs.

        A sample of an earlier epoch may only be stale: another one is taken first, and compared in its place. A
        collective.
        """
        if not self.opinion.is_pending:
            return
        ranks, opinion = self._runner.ranks, self.opinion

        def compared() -> bool:
            losses = self._window.read(ranks)
            opinion.answer(losses, self._window.seen, float(sum(ranks.all_gather_object(self._size or 1))))
            return opinion.is_confirmed

        is_confirmed = self._runner.on_all_ranks(NOT_COMPARED, compared)
        if not opinion.differs:
            self._has_renewed = False
        may_be_stale = opinion.differs and not self._has_renewed and self._runner.settings.mode == "train"
        if may_be_stale and self._runner.source.renew(trainer):
            self._has_renewed = True  # if another one differs as well, age is not the cause
            opinion.forget()
        elif is_confirmed and opinion.last is not None:
            self._runner.notices.warn_once("second opinion", _warning(opinion.last, self._runner.settings.mode))


def _warning(found: Comparison, mode: Mode) -> str:
    evaluated = "mode='eval', in which dropout and batch-norm are not those of training, " if mode == "eval" else ""
    return (
        f"sample: expected a mean loss like that of training, {found.training:.4g}, got {found.sample:.4g}, at two "
        f"probes in a row and by more than spreads explain ({found.allowed:.2g}): what is measured may not be what is "
        f"trained. Usual causes: {evaluated}a sampler that prefers some examples, data reloaded or changed since the "
        "sample was taken, weights swapped by another callback, a loss that draws random numbers, a module whose mode "
        "in training is not that of the probe. Pass batches as training has them as sample=, or the loss you mean as "
        "loss_fn=."
    )


def _examples(batch: Any) -> int:
    try:
        return ExampleCounter().count(batch) or 1
    except Exception:  # it counts in a way of its own
        return 1
