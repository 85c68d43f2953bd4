"""Records of a monitor, from the probe to the loggers.

A record stays open until the optimizer step from its point has ended, since some numbers belong to that step. The loss
of its sample is compared with those that training returns before and after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_subspace._lightning import Trainer
from lightning_subspace.callbacks.failed_probes import FailedProbes
from lightning_subspace.callbacks.keeper import Keeper
from lightning_subspace.callbacks.loss_comparison import LossComparison
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.tab_log import TabLog
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.findings import findings_of
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.probe.arguments import described
from lightning_subspace.probe.checkpoint import RunState
from lightning_subspace.probe.forecast import Forecast
from lightning_subspace.probe.open_record import OpenRecord
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.verification import unverified
from lightning_subspace.report import ProgressLine, Publisher
from lightning_subspace.state.signals import waiting_signals
from lightning_subspace.subspace.record import Record


class Recorder:
    """Takes probes for a trainer, and publishes their records.

    Args:
        runner: takes the probes.
        publisher: where records go.
        name: of the monitor, for the line of progress.

    Attributes:
        open: the record whose step has not ended yet.
        losses: of training, beside those of the sample.
        failed: the probes of the fit that failed.
        keeper: of what the measurements remember.
    """

    def __init__(self, runner: ProbeRunner, publisher: Publisher, name: str) -> None:
        self.open: OpenRecord | None = None
        self.losses = LossComparison(runner)
        self.failed = FailedProbes()
        self.keeper = Keeper(runner.settings, runner.notices)
        self._has_closed = False  # a record of this fit; one without has no figures to draw
        self._tab = TabLog(runner, publisher)
        self._runner = runner
        self._publisher = publisher
        self._name = name

    @waiting_signals()  # what a handler saves has the record of this step
    def take(self, trainer: Trainer, module: nn.Module, step: int) -> None:
        """Probe and open a record, on all ranks or on none."""
        ranks, schedule = self._runner.ranks, self._runner.schedule
        moved = ranks.bytes_moved
        self._runner.notices.last_failure = None
        self._tab.open(trainer)
        with schedule.probing(), ProgressLine(trainer) as line:
            opened = self._runner.probe(
                module, step, lambda run, sample: self._measure(run, trainer, module, sample, step, line)
            )
        self.failed.see(step, self._runner.notices.last_failure)
        if opened is None:
            self._tab.fail(trainer, step)
            return
        costs = {"solver/seconds": schedule.last_seconds, "solver/overhead": schedule.overhead}
        if ranks.count > 1:
            costs["solver/megabytes_moved"] = (ranks.bytes_moved - moved) / 1e6
        opened.record = replace(opened.record, metrics={**opened.record.metrics, **costs})
        self.open = opened
        self.losses.ask(opened.probe)
        self._publisher.update_callback_metrics(trainer, opened.record)
        subspace = opened.record.subspace
        if subspace is not None and not subspace.trusted:
            cause = f"{subspace.outcome.name}, {subspace.gap_given_up}"
            self._runner.notices.warn_once(cause, f"at step {step}, {subspace.verdict}")
        if subspace is not None and (told := unverified(subspace, self._runner.settings.verify)) is not None:
            self._runner.notices.info_once(f"at step {step}, {told}", "unverified")
        if subspace is not None and subspace.poor_values is not None:
            self._runner.notices.info_once(f"at step {step}, {subspace.poor_values}", "poor values")

    def see_gradient(self, module: nn.Module) -> None:
        """Keep the mini-batch gradient of the step from the open record's point."""
        if self.open is not None:
            self.open.see_gradient(module)

    def close(self, trainer: Trainer, module: nn.Module | None = None, *, alone: bool = False) -> None:
        """Add the numbers of its step to the open record; log it.

        Args:
            trainer: has the loggers.
            module: after the step; None where none was taken, as training has ended.
            alone: whether other ranks or a device may not answer, as after an exception.
        """
        run = self._runner.run
        if module is None and not alone:
            self.losses.answer(trainer)  # no more will follow
        if self.open is None or run is None:
            return
        opened, self.open = self.open, None
        if not alone:
            metrics = {**opened.record.metrics, **self.losses.running_mean()}
            opened.record = replace(opened.record, metrics=metrics)
        with self._runner.schedule.aside():
            try:
                record = run.close(opened, module)
            except Exception as error:
                if not self._runner.notices.is_of_signal(opened.record.step, error, run.ranks):
                    what = f"the numbers of the step from {opened.record.step} are left out"
                    self._runner.notices.failure(what, error, run.ranks)
                record = run.close(opened)
            self._publisher.update_callback_metrics(trainer, record)
            self._publisher.log(trainer, record)
            self._tab.close(trainer, run, record)
        self._has_closed = True
        count = len(run.history)
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: TensorBoard keeps ten images a tag
            self.draw(trainer)

    def draw(self, trainer: Trainer) -> None:
        """Log the figures of the run so far."""
        run = self._runner.run
        if run is not None and self._has_closed:
            with self._runner.schedule.aside():
                self._publisher.draw(trainer, run.history, run.overlaps)
                taken = self._runner.settings.taken
                self._publisher.draw_new(trainer, (drawn for measurement in taken for drawn in measurement.figures()))

    def finish(self, trainer: Trainer) -> None:
        """Log the figures of the run, and its file; tell what failed."""
        self.draw(trainer)
        run = self._runner.run
        if run is not None and (self._has_closed or self.failed.reasons):
            self._publisher.keep(trainer, run.history, run.overlaps, self.failed.reasons)
        self.failed.tell(self._runner.notices)
        untrusted = _untrusted([] if run is None else run.history)
        if len(untrusted.reasons) > 1:  # of a single one the warning has told all
            untrusted.tell(self._runner.notices)

    def tell_what_is_missing(self, trainer: Trainer) -> None:
        """Tell of what was asked for later than training went."""
        run, end = self._runner.run, f"by step {trainer.global_step}, where training ended"
        if run is None or self.failed.reasons:
            return
        reference_step = self._runner.settings.reference_step
        if not run.history:
            asked = described(self._runner.schedule.every_n_steps)
            self._runner.notices.info_once(f"no probe was taken {end}; every_n_steps={asked}.")
        elif self._runner.settings.k and reference_step is not None and run.overlaps.reference_step is None:
            self._runner.notices.info_once(f"no reference was taken {end}; reference_step={reference_step}.")

    def begin(self, *, goes_on: bool) -> None:
        """Another fit begins: forget the open record, tell of settings.

        Raises:
            MisconfigurationException: where the measurements of a run that goes on were used elsewhere.
        """
        self.open, self._has_closed = None, False
        if (text := self._runner.settings.without_effect) is not None:
            self._runner.notices.info_once(text)
        self.losses.begin()
        self.failed.begin(goes_on=goes_on)
        self._tab.begin()
        self.keeper.begin(goes_on=goes_on)

    def completed(self, state: RunState) -> RunState:
        """A run's state with what measurements keep and what failed."""
        return replace(state, measurements=self.keeper.state(), failed=self.failed.reasons)

    def resume(self, state: RunState, run: ProbeRun) -> None:
        """Go on from the checkpoint of a run. A collective."""
        self.keeper.resume(state.measurements, self._runner.ranks)
        self.failed.resume(state.failed, run.num_probes)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds eigenvectors and the parameters of a module."""
        return {**vars(self), "open": None}

    def _measure(
        self, run: ProbeRun, trainer: Trainer, module: nn.Module, sample: Sample, step: int, line: ProgressLine
    ) -> OpenRecord:
        self.keeper.require_own()
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        settings, notices = run.settings, self._runner.notices
        drawn, count = run.examples.drawn(sample), run.ranks.count
        prospect = Prospect(run.num_probes, settings.solver, drawn, optimizer, count, run.space)
        budget, device = self._runner.schedule.max_overhead, next(iter(run.space.tensors(module))).device
        forecast = Forecast(settings, prospect, run.partition, budget, run.examples.footprint, device)

        def on_matvec(count: int, residual: float) -> None:
            if notices.is_new("forecast") and (text := forecast.see(count)) is not None:
                notices.info_once(text + findings_of(module).scores.text, "forecast")
            line.update(f"{self._name}: {count} Hessian products, residual {residual:.0e}")

        return run.measure(module, sample, step, optimizer=optimizer, on_matvec=on_matvec)


def _untrusted(history: Iterable[Record]) -> FailedProbes:
    """Those of the probes whose eigenspace is not trusted."""
    found = FailedProbes("probes have no trusted eigenspace")
    for record in history:
        if (subspace := record.subspace) is not None:
            found.see(record.step, None if subspace.trusted else subspace.verdict)
    return found
