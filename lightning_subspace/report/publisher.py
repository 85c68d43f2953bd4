"""What a monitor sends out for each record: scalars, callback metrics, a histogram, and now and then figures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from lightning_subspace._lightning import Trainer
from lightning_subspace.report.loggers import LogLevel, Reporter, logged_name, select
from lightning_subspace.subspace.record import Record


class Publisher:
    """Sends the records of one monitor to a trainer and its loggers.

    Args:
        name: prefix of all keys.
        log: "default" or "all"; see `select`.
    """

    def __init__(self, name: str, log: LogLevel) -> None:
        self._name = name
        self._log = log
        self._reporter = Reporter()
        self._drawn: Record | None = None

    def offer(self, trainer: Trainer, record: Record) -> None:
        """Let ModelCheckpoint and EarlyStopping see the values; a withheld one leaves the last good one there."""
        trainer.callback_metrics.update(
            {logged_name(self._name, key): torch.tensor(value) for key, value in record.metrics.items()}
        )

    def send(self, trainer: Trainer, record: Record) -> None:
        """Scalars and the histogram of the eigenvalues, at x = the step of the record; from the first rank alone."""
        if not trainer.is_global_zero:
            return
        named = {logged_name(self._name, key): value for key, value in select(record.metrics, self._log).items()}
        self._reporter.scalars(trainer.loggers, named, record.step)
        if record.subspace is not None and record.subspace.converged:
            values = record.subspace.eigenvalues
            self._reporter.histogram(trainer.loggers, f"{self._name}/eigenvalues", values, record.step)

    def draw(
        self, trainer: Trainer, history: Sequence[Record], steps: Sequence[int], matrix: np.ndarray, error: float | None
    ) -> None:
        """The spectrum of the last converged record and the overlaps between all; once for each. Never raises.

        From the first rank alone, as above.
        """
        last = next((r for r in reversed(history) if r.subspace is not None and r.subspace.converged), None)
        if last is None or not trainer.is_global_zero or not trainer.loggers or last is self._drawn:
            return
        self._drawn, step = last, last.step
        try:
            from lightning_subspace.report.figures import overlap_figure, spectrum_figure  # matplotlib takes a while

            self._reporter.figure(trainer.loggers, f"{self._name}/spectrum", spectrum_figure([last]), step)
            if len(steps) > 1:
                figure = overlap_figure(steps, matrix, error)
                self._reporter.figure(trainer.loggers, f"{self._name}/overlaps", figure, step)
        except Exception as problem:
            warnings.warn(f"the figures of step {step} could not be drawn: {problem!r}", stacklevel=2)
