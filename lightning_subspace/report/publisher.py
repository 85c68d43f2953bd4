"""Output of a monitor, to a trainer and to its loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from lightning_subspace.report.guard import Guard
from lightning_subspace.report.loggers import LogLevel, Reporter, logged_name, select
from lightning_subspace.report.tab_entry import failed_entry, tab_entry
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.tensorboard_tab.schema import tag_of, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_subspace._lightning import Trainer


class Publisher:
    """Sends the records of one monitor to a trainer and its loggers.

    The loggers get theirs from the first rank alone. No `Exception` leaves any method (see `Guard`).

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
        self._guard = Guard()
        self._drawn: Record | None = None

    def update_callback_metrics(self, trainer: Trainer, record: Record) -> None:
        """Show the values to ModelCheckpoint and EarlyStopping; earlier ones stay."""
        with self._guard.of("values for other callbacks are missing"):
            named = {logged_name(self._name, key): value for key, value in record.metrics.items()}
            self._reporter.callback_metrics(trainer, named)

    def log(self, trainer: Trainer, record: Record) -> None:
        """Log scalars and the histogram of the eigenvalues, at the record's step."""
        with self._guard.of("a record was not logged"):
            if not trainer.is_global_zero:
                return
            selected = select(record.metrics, self._level, self._extra)
            named = {logged_name(self._name, key): value for key, value in selected.items()}
            self._reporter.scalars(trainer.loggers, named, record.step)
            if record.subspace is None or not record.subspace.converged:
                return
            if len(values := record.subspace.eigenvalues[record.subspace.known]):
                self._reporter.histogram(trainer.loggers, f"{self._name}/eigenvalues", values, record.step)

    def tell(self, trainer: Trainer, make: Callable[[], Mapping[str, Any]]) -> None:
        """Write an entry for the tab, made where a logger takes it."""
        with self._guard.of("an entry for the tab of TensorBoard was lost"):
            if trainer.is_global_zero and self._reporter.takes_entries(trainer.loggers):
                entry = make()
                self._reporter.tab(trainer.loggers, self._name, to_json(entry), entry["step"])

    def draw(self, trainer: Trainer, history: Sequence[Record], overlaps: OverlapHistory) -> None:
        """Log figures of the last spectrum, once, the layers and the overlaps."""
        with self._guard.of("the figures could not be drawn"):
            if not trainer.is_global_zero or not self._reporter.takes_figures(trainer.loggers):
                return
            last = next((r for r in reversed(history) if r.subspace is not None and r.subspace.converged), None)
            if last is None or last is self._drawn:
                return
            self._drawn, step = last, last.step
            from lightning_subspace.report.figures import overlap_figure, spectrum_figure  # matplotlib takes a while
            from lightning_subspace.report.layer_figure import layers_figure

            self._reporter.figure(trainer.loggers, f"{self._name}/spectrum", spectrum_figure([last]), step)
            if any("layers" in record.tables for record in history):
                self._reporter.figure(trainer.loggers, f"{self._name}/layers", layers_figure(history), step)
            steps, matrix = overlaps.matrix()
            if len(steps) > 1:
                figure = overlap_figure(steps, matrix, overlaps.error)
                self._reporter.figure(trainer.loggers, f"{self._name}/overlaps", figure, step)

    def draw_new(self, trainer: Trainer, figures: Iterable[tuple[str, int, Figure]]) -> None:
        """Log figures of measurements, made where a logger takes them."""
        with self._guard.of("the figures of a measurement could not be drawn"):
            if trainer.is_global_zero and self._reporter.takes_figures(trainer.loggers):
                for name, step, figure in figures:
                    self._reporter.figure(trainer.loggers, f"{self._name}/{name}", figure, step)

    def keep(
        self, trainer: Trainer, history: Sequence[Record], overlaps: OverlapHistory, failed: Mapping[int, str]
    ) -> None:
        """Hand all entries to loggers that keep files.

        `lightning-subspace show` reads them. `failed` has the reasons of probes that failed, by step.
        """
        with self._guard.of("the file of all probes was lost"):
            if not trainer.is_global_zero or not self._reporter.takes_files(trainer.loggers):
                return
            found = {step: failed_entry(step, reason) for step, reason in failed.items()}
            found |= {record.step: tab_entry(record, overlaps) for record in history}
            if found:
                entries = ",".join(to_json(found[step]) for step in sorted(found))
                text = f'{{"{self._name}":{{"{tag_of(self._name)}":[{entries}]}}}}'
                self._reporter.file(trainer.loggers, f"{self._name}_probes.json", text, max(found))
