"""What a user reads off a monitor, during a run and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_subspace.record import Record, to_rows
from lightning_subspace.schedule import Schedule
from lightning_subspace.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Readings:
    """Everything that has been measured so far, on every rank the same."""

    _tracker: Tracker | None
    _schedule: Schedule

    @property
    def history(self) -> Sequence[Record]:
        """All records of the run, oldest first, without eigenvectors."""
        return [] if self._tracker is None else self._tracker.history

    def to_rows(self) -> list[dict[str, float]]:
        """The history as one flat dict a probe, nan where a value is absent."""
        return to_rows(self.history)

    def overlap_matrix(self) -> tuple[list[int], np.ndarray]:
        """Steps, and the matrix of overlaps between the spaces of all their probes (estimated from sketches)."""
        return ([], np.zeros((0, 0))) if self._tracker is None else self._tracker.overlaps.matrix()

    def plot(self) -> Figure:
        """A matplotlib Figure: eigenvalues, fractions and overlaps over steps, and the overlap matrix."""
        from lightning_subspace.report import summary_figure  # matplotlib takes a while to import

        error = None if self._tracker is None else self._tracker.overlaps.error
        return summary_figure(self.history, *self.overlap_matrix(), error=error)

    @property
    def overhead(self) -> float:
        """Share of the wall time since training began that went into probes, in [0, 1]."""
        return self._schedule.overhead

    @property
    def later_overhead(self) -> float:
        """The same without the first probe: what `max_overhead` bounds."""
        return self._schedule.later_overhead
