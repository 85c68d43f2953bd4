"""Output of a monitor for each record: scalars, callback metrics, histogram, figures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_subspace.report.loggers import LogLevel, Reporter, logged_name, select
from lightning_subspace.subspace.record import Record

if TYPE_CHECKING:
    from lightning_subspace._lightning import Trainer


class Publisher:
    """Sends the records of one monitor to a trainer and its loggers.

    The loggers get theirs from the first rank alone.

    Args:
        name: prefix of all keys.
        log: "default" or "all"; see `select`.
        extra: keys that "default" leaves out.
    """

    def __init__(self, name: str, log: LogLevel, extra: Set[str]) -> None:
        self._name = name
        self._level: LogLevel = log
        self._extra = extra
        self._reporter = Reporter()
        self._drawn: Record | None = None

    def update_callback_metrics(self, trainer: Trainer, record: Record) -> None:
        """Show the values to ModelCheckpoint and EarlyStopping; earlier ones stay."""
        named = {logged_name(self._name, key): torch.tensor(value) for key, value in record.metrics.items()}
        trainer.callback_metrics.update(named)

    def log(self, trainer: Trainer, record: Record) -> None:
        """Log scalars and the histogram of the eigenvalues, at the record's step."""
        if not trainer.is_global_zero:
            return
        selected = select(record.metrics, self._level, self._extra)
        named = {logged_name(self._name, key): value for key, value in selected.items()}
        self._reporter.scalars(trainer.loggers, named, record.step)
        if record.subspace is not None and record.subspace.converged:
            values = record.subspace.eigenvalues[record.subspace.known]
            if len(values):
                self._reporter.histogram(trainer.loggers, f"{self._name}/eigenvalues", values, record.step)

    def draw(
        self, trainer: Trainer, history: Sequence[Record], steps: Sequence[int], matrix: np.ndarray, error: float | None
    ) -> None:
        """Log figures of the last spectrum, once, and the overlaps. Never raises."""
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
