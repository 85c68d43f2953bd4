"""Records of a callback, for its user; the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subspace.callbacks.resumable import ANOTHER_RUN, Resumable
from lightning_subspace.probe.checkpoint import RunState, decode
from lightning_subspace.probe.entries import CheckpointError
from lightning_subspace.probe.schedule import Schedule
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.record import Record, to_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measured(Resumable):
    """Callback whose records a user reads, those of its present run."""

    _schedule: Schedule
    _settings: ProbeSettings

    @property
    def history(self) -> Sequence[Record]:
        """All records of the run, oldest first, without eigenvectors."""
        return [] if self._runner.run is None else self._runner.run.history

    def to_rows(self) -> list[dict[str, float]]:
        """The history as flat dicts, with nan where a value is absent."""
        return to_rows(self.history)

    def overlap_matrix(self) -> tuple[list[int], np.ndarray]:
        """Steps of probes, and the matrix of their spaces' overlaps.

        All of the first 64 that were trusted; of more, 64 that are spread evenly over log(step), the first, the last
        and that of `reference_step` among them.
        """
        run = self._runner.run
        return ([], np.zeros((0, 0))) if run is None else run.overlaps.matrix()

    def plot(self) -> Figure:
        """A matplotlib Figure of eigenvalues, fractions, overlaps and their matrix."""
        from lightning_subspace.report import summary_figure  # matplotlib takes a while to import

        error = None if self._runner.run is None else self._runner.run.overlaps.error
        return summary_figure(self.history, *self.overlap_matrix(), error=error)

    @property
    def overhead(self) -> float:
        """The share of training's wall time spent on probes, in [0, 1]."""
        return self._schedule.overhead

    @property
    def later_overhead(self) -> float:
        """The same without the first probe: what `max_overhead` bounds."""
        return self._schedule.later_overhead

    def _give_up_history(self) -> None:
        """Tell that another run begins, if there was one."""
        if self.history:
            self._notices.info_once(ANOTHER_RUN.format(len(self.history)))

    def _read(self, saved: Any, step: int) -> RunState | None:
        """The checkpoint's run; a warning and None if it cannot continue."""
        try:
            state = decode(saved)
            state.require_continuable(self._settings.k, self._settings.which, step)
        except CheckpointError as error:
            self._notices.warn(
                f"the state {self.name!r} of the checkpoint is not used: {error}. History and overlaps start anew."
            )
            return None
        return state
