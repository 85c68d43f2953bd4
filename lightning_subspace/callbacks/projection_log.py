"""Numbers of a projection, to callbacks, loggers and the tab of TensorBoard."""

from __future__ import annotations

from lightning_subspace._lightning import Trainer
from lightning_subspace.callbacks.failed_probes import FailedProbes
from lightning_subspace.callbacks.projector import Keep
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.tab_log import TabLog
from lightning_subspace.report import Publisher
from lightning_subspace.subspace.record import Record


class ProjectionLog:
    """Publishes one number after another.

    Args:
        name: of the projection, the prefix of its keys.
        keep: what it keeps, for the tab.
        runner: computes its spaces.
    """

    def __init__(self, name: str, keep: Keep, runner: ProbeRunner) -> None:
        self._publisher = Publisher(name, "all", frozenset())
        self._tab = TabLog(runner, self._publisher)
        self._keep = keep
        self._last: Record | None = None  # with all numbers of the last step
        self._lack: tuple[int, str] | None = None  # the last step without a new space, and why
        self._refreshes = FailedProbes("refreshes gave no new space")
        self._notices = runner.notices

    def begin(self, *, goes_on: bool) -> None:
        """Another fit begins, of a new run or of the last one."""
        self._tab.begin()
        self._refreshes.begin(goes_on=goes_on)
        self._last = self._lack = None

    def refreshed(self, trainer: Trainer, step: int, reason: str | None = None) -> None:
        """Count a refresh; tell the tab why it gave no space."""
        self._refreshes.see(step, reason)
        if reason is not None:
            self._lack = step, reason
            self._tell(trainer, Record(step, {}))

    def finish(self, missed: str | None) -> None:
        """Tell how many gave none, and what was waited for in vain."""
        self._refreshes.tell(self._notices)
        if missed is not None:
            self._notices.info_once(missed)

    def write(self, trainer: Trainer, key: str, value: float, step: int) -> None:
        """Publish a number of a step."""
        record = Record(step, {key: value})
        self._publisher.update_callback_metrics(trainer, record)
        self._publisher.log(trainer, record)
        # Of two entries of a step the later one counts: it has the numbers of the earlier one, too.
        earlier = self._last.metrics if self._last is not None and self._last.step == step else {}
        self._last = Record(step, {**earlier, key: value})
        self._tell(trainer, self._last)

    def _tell(self, trainer: Trainer, record: Record) -> None:
        reason = self._lack[1] if self._lack is not None and self._lack[0] == record.step else None
        self._tab.tell(trainer, record, reason, keep=self._keep)
