"""Callback that measures saved checkpoints in place of training.

A Trainer that fits sets up the module, its data, the devices and the processes. Where training would start, this
callback puts one checkpoint after another into the module, and takes the probe that a monitor would have taken there;
then it ends the fit by `WalkEnd`. Nothing of the user's runs but what sets up the project.

What is measured is kept in a file after each checkpoint, and the walk goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_subspace._lightning import Callback, Trainer, training_loaders
from lightning_subspace.callbacks.notices import Notices
from lightning_subspace.callbacks.project import check_project, misconfiguration
from lightning_subspace.callbacks.recorder import Recorder
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.saved_points import SavedPoint, optimizers_at, put_counters, put_weights, read
from lightning_subspace.callbacks.strategy import ranks_of
from lightning_subspace.data.fixed import fingerprint, fixed_sample
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.results import Results, read_results, write_results
from lightning_subspace.probe.schedule import Schedule
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.report import Publisher
from lightning_subspace.state.failure import free_frames

SPEAKER = "lightning-subspace"
STOPPED = "SIGTERM arrived; the same command goes on with this checkpoint"
BEHIND = "its step lies before one that is measured already; --anew measures all of them in their order"


class WalkEnd(BaseException):
    """The walk is over, and nothing is trained."""


class CheckpointWalk(Callback):
    """Measures checkpoints, one after another, on the same sample.

    Args:
        points: the checkpoints, in the order of their steps.
        settings: what is measured.
        file: of the results; it is gone on with where it is there.
        asked: what was asked for, as plain values; where it goes on, it has to be the same.
        loggers: where records go, beside the file.
        name: of the monitor that the results look like.
        trust: whether checkpoints are read that hold more than tensors and plain values.
        anew: whether an earlier file is written over.
        each: wraps the points that are left, for a bar of progress.

    Attributes:
        failures: the points that could not be measured, and why.
        is_stopped: whether a signal has ended the walk.
    """

    def __init__(
        self,
        points: Sequence[SavedPoint],
        settings: ProbeSettings,
        file: Path,
        asked: Mapping[str, Any],
        *,
        loggers: Sequence[Any] = (),
        name: str = "subspace",
        trust: bool = False,
        anew: bool = False,
        each: Callable[[Sequence[SavedPoint]], Iterable[SavedPoint]] = iter,
    ) -> None:
        super().__init__()
        self.failures: dict[SavedPoint, str] = {}
        self.is_stopped = False
        self._points, self._file, self._asked = points, file, asked
        self._loggers, self._name, self._trust, self._anew = list(loggers), name, trust, anew
        self._each = each
        self._settings = settings
        self._schedule = Schedule(1, None)  # asked for its account of the time alone
        self._runner = ProbeRunner(settings, self._schedule, Notices(SPEAKER, "raise"))
        extra = {key for measurement in settings.taken for key in measurement.extra}
        self._recorder = Recorder(self._runner, Publisher(name, "default", extra), name)
        self._files: dict[int, str] = {}
        self._sample = 0

    @override
    def setup(self, trainer: Trainer, pl_module: nn.Module, stage: str) -> None:
        """Refuse a strategy or a module that cannot be probed."""
        with misconfiguration(SPEAKER):
            check_project(trainer, pl_module, self._settings.loss_fn)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Measure all that is left, and end the fit.

        Raises:
            WalkEnd: when it is done.
            ValueError: where the results are of something else.
        """
        ranks = ranks_of(trainer)
        own = trainer.loggers
        self._schedule.begin(0)
        self._recorder.begin(goes_on=False)
        self._runner.begin(trainer, pl_module, ranks, continues=False)
        with ranks.agree():
            if self._runner.source.sample is None:
                self._runner.source.sample = fixed_sample(training_loaders(trainer), self._settings.sample_spec, ranks)
            self._sample = fingerprint(self._runner.source.sample, ranks)
            self._go_on(ranks)
        trainer.loggers = self._loggers
        try:
            self._walk(trainer, pl_module, ranks)
            self._recorder.finish(trainer)
        finally:
            self._runner.end(trainer)
            trainer.loggers = own
        raise WalkEnd

    def _go_on(self, ranks: Ranks) -> None:
        """Take up earlier results. A collective.

        The first rank reads them: by then another may have written more.

        Raises:
            ValueError: where the processes have other checkpoints.
        """
        steps = ranks.all_gather_object([point.step for point in self._points])
        if any(other != steps[0] for other in steps):
            raise ValueError(
                f"--ckpt: expected checkpoints that each process can read, got those of the steps {steps}, by process; "
                "put them where all of them read."
            )
        found = None
        if ranks.index == 0 and not self._anew:
            found = read_results(self._file, self._name)
        found = ranks.broadcast_object(found)
        run = self._runner.run
        if found is None or run is None:
            return
        found.require_same(self._asked)
        found.require_same_sample(self._sample)
        found.state.require_continuable(self._settings.k, self._settings.which, max(p.step for p in self._points))
        self._runner.run, _ = run.resumed(found.state)
        self._recorder.keeper.resume(found.state.measurements, ranks)
        self._files = dict(found.files)

    def _walk(self, trainer: Trainer, module: nn.Module, ranks: Ranks) -> None:
        run = self._runner.run
        assert run is not None, "the runner raises where there is none"
        last = run.history[-1].step if run.history else -1
        left = [point for point in self._points if point.step not in self._files]
        self.failures |= {point: BEHIND for point in left if point.step < last}
        optimizers = list(trainer.optimizers)
        for point in self._each([point for point in left if point.step > last]):
            if any(ranks.all_gather_object(_has_sigterm(trainer))):
                self.is_stopped, self.failures[point] = True, STOPPED
                return
            try:
                self._measure(trainer, module, point, optimizers, ranks)
            except Exception as error:
                self._recorder.open = None
                self.failures[point] = ranks.describe(error)
                free_frames(error)
                continue
            if self.is_stopped:
                return
            with ranks.agree():
                self._keep(ranks)

    def _measure(
        self, trainer: Trainer, module: nn.Module, point: SavedPoint, optimizers: list[Any], ranks: Ranks
    ) -> None:
        """Measure one checkpoint. A collective."""
        with ranks.agree():
            saved = read(point.path, trust=self._trust)
            put_weights(module, saved, point.path)
            put_counters(trainer, saved)
            trainer.strategy.optimizers = optimizers_at(optimizers, saved, module)
        if self._runner.should_probe(trainer):
            self._recorder.take(trainer, module, point.step)
        if self._recorder.open is None:  # anything but a signal raises
            self.is_stopped, self.failures[point] = True, STOPPED
            return
        self._recorder.close(trainer)
        self._files[point.step] = point.path.name

    def _keep(self, ranks: Ranks) -> None:
        """Write what is known by now, on the first rank."""
        run = self._runner.run
        if ranks.index > 0 or run is None:
            return
        for logger in self._loggers:
            logger.experiment.flush()  # before the file says that this point is done
        state = replace(run.state(self._schedule.position), measurements=self._recorder.keeper.state())
        write_results(self._file, self._name, Results(state, self._asked, self._sample, self._files))


def _has_sigterm(trainer: Any) -> bool:
    """Whether Lightning has received this signal, which it leaves to its loops."""
    return bool(getattr(trainer, "received_sigterm", False))
