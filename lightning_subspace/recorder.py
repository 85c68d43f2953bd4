"""One probe of a run with all that surrounds it: its time, its messages, its record and where that goes.

A record stays open until the optimizer step from its point has ended, since some numbers belong to that step.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_subspace._lightning import rank_zero_warn
from lightning_subspace.collectives import in_words
from lightning_subspace.curvature.choice import CheckError
from lightning_subspace.measurements.measurement import Prospect
from lightning_subspace.messages import Messages
from lightning_subspace.report import ProgressLine, Publisher
from lightning_subspace.sample import Sample
from lightning_subspace.schedule import Schedule
from lightning_subspace.tracker import OpenRecord, Tracker

# What a forecast is made of: at most so many products, or as many as take so long.
ENOUGH_PRODUCTS, ENOUGH_SECONDS = 10, 5.0


class Recorder:
    """Takes probes for a trainer, and publishes their records.

    Args:
        name: of the monitor, for the line of progress.
        schedule: keeps the account of the time.
        messages: what goes wrong is told there.
        publisher: where records go.
        max_overhead: the budget, for the forecast.

    Attributes:
        open: the record whose step has not ended yet.
    """

    def __init__(
        self, name: str, schedule: Schedule, messages: Messages, publisher: Publisher, max_overhead: float | None
    ) -> None:
        self.open: OpenRecord | None = None
        self._name = name
        self._schedule = schedule
        self._messages = messages
        self._publisher = publisher
        self._max_overhead = max_overhead
        self._tracker: Tracker | None = None  # that the open record came from

    def take(self, tracker: Tracker, trainer: Any, module: nn.Module, sample: Sample, step: int) -> None:
        """Probe and open a record, on all ranks or on none. What goes wrong is told, and raised only on request."""
        self._tracker = tracker
        moved = tracker.ranks.bytes_moved
        try:
            with self._schedule.probing(), ProgressLine(trainer) as line:
                opened = self._measure(tracker, trainer, module, sample, step, line)
        except Exception as error:
            if isinstance(error, CheckError) and tracker.plan.on_check_fail == "raise":
                raise
            self._messages.failure(f"the probe at step {step} failed and is left out", error, tracker.ranks)
            return
        costs = {"solver/seconds": self._schedule.last_seconds, "solver/overhead": self._schedule.overhead}
        if tracker.ranks.count > 1:
            costs["solver/megabytes_moved"] = (tracker.ranks.bytes_moved - moved) / 1e6
        opened.record = replace(opened.record, metrics={**opened.record.metrics, **costs})
        self.open = opened
        self._publisher.offer(trainer, opened.record)
        subspace = opened.record.subspace
        if subspace is not None and not subspace.trusted:
            self._messages.once(subspace.outcome.name, f"at step {step}, {subspace.verdict}")

    def see_gradient(self, module: nn.Module) -> None:
        """Keep the mini-batch gradient of the step from the open record's point."""
        if self.open is not None:
            self.open.see_gradient(module)

    def close(self, trainer: Any, module: nn.Module | None = None) -> None:
        """Close the open record, with what the step from its point tells if one was taken, and log it."""
        if self.open is None or self._tracker is None:
            return
        opened, self.open = self.open, None
        with self._schedule.aside():
            try:
                record = self._tracker.close(opened, module)
            except Exception as error:
                what = f"what the step from {opened.record.step} tells is left out"
                self._messages.failure(what, error, self._tracker.ranks)
                record = self._tracker.close(opened)
            self._publisher.offer(trainer, record)
            self._publisher.send(trainer, record)
        count = len(self._tracker.history)
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: TensorBoard keeps ten images a tag
            self.draw(trainer)

    def draw(self, trainer: Any) -> None:
        """Log the figures of the run so far."""
        if self._tracker is not None:
            overlaps = self._tracker.overlaps
            with self._schedule.aside():
                self._publisher.draw(trainer, self._tracker.history, *overlaps.matrix(), overlaps.error)

    def drop(self) -> None:
        """Forget the open record and the run it belongs to."""
        self.open = self._tracker = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds eigenvectors and the parameters of a module."""
        return {**vars(self), "open": None}

    def _measure(
        self, tracker: Tracker, trainer: Any, module: nn.Module, sample: Sample, step: int, line: ProgressLine
    ) -> OpenRecord:
        ranks = tracker.ranks  # only the first one warns, and a warning may be an error there
        if tracker.adapt(module):
            with ranks.together():
                rank_zero_warn(
                    f"SubspaceMonitor: the set of measured parameters has changed by step {step}; overlaps start anew."
                )
        solver = tracker.plan.solver
        if tracker.self_check is None:
            with self._schedule.aside():
                tracker.check(module, sample)
            with ranks.together():
                if tracker.notice is not None:
                    self._messages.once("self-check", tracker.notice)
                if solver.k and len(sample.hessian) == 1 and sample.hessian_share < 1.0:
                    self._messages.note(
                        "the sample is one micro-batch, which cannot be halved, so the gradient fraction gets no error "
                        "bar; pass a larger sample or a smaller batch_size."
                    )
        times = [time.monotonic()]
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        prospect = Prospect(tracker.num_probes, solver, sample, optimizer, ranks.count)
        tells = self._messages.is_new("forecast")

        def on_matvec(count: int, residual: float) -> None:
            nonlocal tells
            times.append(time.monotonic())
            if tells and is_enough(count, solver.k, times[-1] - times[1]):
                tells = False
                # Up to the first product, and the mean of those behind it: between ranks they vary.
                begun, product = times[1] - times[0], (times[-1] - times[1]) / (count - 1)
                try:
                    first, later = (begun + product * number for number in tracker.plan.expected_products(prospect))
                except Exception as error:  # of a measurement, which may be right in all that it measures
                    self._messages.note(f"no forecast, a measurement cannot tell what it takes: {in_words(error)}")
                else:
                    seconds, held = (first, later), sample.nbytes
                    self._messages.forecast(solver, tracker.partition, seconds, held, self._max_overhead)
            line.update(f"{self._name}: {count} Hessian products, residual {residual:.0e}")

        return tracker.measure(module, sample, step, optimizer=optimizer, on_matvec=on_matvec)


def is_enough(count: int, k: int, seconds: float) -> bool:
    """Whether so many products, the first apart in so many seconds, tell what a probe will take.

    Ten do, or as many as every solve takes, or two where they take long.
    """
    return count >= 2 and (count >= min(k, ENOUGH_PRODUCTS) or seconds >= ENOUGH_SECONDS)
