"""Driver of probes in a Trainer, on all ranks or on none.

Both callbacks have one. It builds the run, draws the sample or gathers it, checks the second derivatives, and takes a
probe when it is asked to. What goes wrong in any of this becomes one warning.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn

from lightning_subspace._lightning import MisconfigurationException, Trainer
from lightning_subspace.callbacks.end_point import EndPoint
from lightning_subspace.callbacks.hook_watch import HookWatch, change_notice
from lightning_subspace.callbacks.notices import Notices
from lightning_subspace.callbacks.tap import before_training_step, forget_batches
from lightning_subspace.curvature.selection import CheckError
from lightning_subspace.data.gathered import Gathered
from lightning_subspace.data.micro_batch import SampleError
from lightning_subspace.data.parts import cut_sample
from lightning_subspace.data.sample import Sample
from lightning_subspace.data.source import SampleSource
from lightning_subspace.parallel.parameters import is_lazy
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.open_record import OpenRecord
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.schedule import Schedule
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.state.signals import waiting_signals

T = TypeVar("T")


class ProbeRunner:
    """Takes the probes of one callback along the runs of a Trainer.

    Args:
        settings: what is measured.
        schedule: keeps the account of the time.
        notices: gets the warnings.
        otherwise: what happens where a probe fails, to be added to the warning.

    Attributes:
        settings, schedule, notices: as given.
        run: the probes so far; None before training, and when there can be none.
        ranks: the processes of the run.
        source: of the examples.
    """

    def __init__(self, settings: ProbeSettings, schedule: Schedule, notices: Notices, otherwise: str = "") -> None:
        self.run: ProbeRun | None = None
        self.ranks = Ranks()
        self.source = SampleSource(settings.sample_spec)
        self.settings = settings
        self.schedule = schedule
        self.notices = notices
        self._otherwise = f"; {otherwise}" if otherwise else ""
        self._whole: Sample | None = None  # the sample that was last cut, and what came of it
        self._parts: Sample | None = None
        self._watch = HookWatch()
        self._awaits_shapes = False  # of lazy parameters: then the run is built later
        self._can_cut: bool | None = None  # whether the loss can be evaluated on a part; None before it was tried
        self._owners: tuple[weakref.ref[Any], ...] = ()  # trainer and module of the run
        self._end: EndPoint | None = None  # of the last fit; None during one

    def begin(self, trainer: Trainer, module: nn.Module, ranks: Ranks, *, continues: bool, anew: bool = False) -> None:
        """Build the run, and draw or prepare the sample. A collective.

        Args:
            trainer: gives the data of training.
            module: as training begins.
            ranks: the processes of this fit.
            continues: whether the run and a gathered sample of the fit before go on.
            anew: whether the run begins anew all the same, to be resumed from a checkpoint.

        Raises:
            MisconfigurationException: when what the user asked for cannot be had, on any rank.
        """
        self.ranks, self._can_cut = ranks, None
        self._owners, self._end = (weakref.ref(trainer), weakref.ref(module)), None
        self.run = self.run if continues and not anew else None
        self._awaits_shapes = self.run is None and is_lazy(module)
        if self._awaits_shapes:
            self.notices.info_once("lazy parameters have no shape before the first batch; probes begin after it.")
        elif self.run is None:
            self._build(module, ValueError)
        else:
            self.run.rebind(ranks)
        self._draw(lambda: self.source.begin(trainer, ranks, continues=continues))
        if self.source.may_differ:
            self._watch.begin(trainer)
        if self.source.remark is not None:
            self.notices.warn(self.source.remark)

    def remember_end(self, module: nn.Module) -> None:
        """End the fit, if there is one, where the module is now."""
        if self._end is None:
            self._end = EndPoint.of(module)

    def goes_on(self, module: nn.Module, ranks: Ranks) -> bool:
        """Whether a fit starts where the last one has ended. A collective."""
        is_there = ranks.count == self.ranks.count and self._end is not None and self._end.is_at(module)
        return all(ranks.all_gather_object(is_there))

    def is_of(self, trainer: Trainer, module: Any) -> bool:
        """Whether the run is one of this module in this trainer."""
        return [owner() for owner in self._owners] == [trainer, module]

    def on_all_ranks(self, what: str, block: Callable[[], T], wrong: type[Exception] | None = None) -> T | None:
        """Run a block on all ranks; a failure gives None.

        Args:
            what: comes of it when the block fails, in words.
            block: what to do.
            wrong: the exception that says that the user has asked for something that cannot be.

        Raises:
            MisconfigurationException: when it was such an exception, on any rank.
        """
        try:
            with self.ranks.agree(), self.schedule.aside():
                return block()
        except Exception as error:
            if wrong is not None and any(self.ranks.all_gather_object(isinstance(error, wrong))):
                raise MisconfigurationException(f"{self.notices.speaker}: {error}") from error
            self.notices.failure(f"{what}{self._otherwise}", error, self.ranks)
            return None

    def resume_sample(self, trainer: Trainer, gathered: Gathered | None) -> None:
        """Go on with a checkpoint's sample, or say that another is gathered."""
        is_resumed = self.ranks.broadcast_object(self.source.resume(trainer, gathered))
        if not is_resumed and self.source.is_gathered and self.settings.sample != "current":
            with self.ranks.agree():
                self.notices.info_once(
                    "the sample is gathered anew, as the checkpoint does not hold it (too large, no plain data, or "
                    "dealt to several processes); probes go on when it is full."
                )

    def see_batch(self, trainer: Trainer, batch_idx: int, after: Callable[[], None]) -> bool:
        """Have a batch observed where needed; whether an epoch begins.

        Args:
            trainer: at the start of a batch.
            batch_idx: of the batch, as training has it.
            after: called when the batch has been observed, as it reaches `training_step`.
        """
        is_new = self.source.epoch != trainer.current_epoch
        if is_new:
            self.on_all_ranks("the sample stays as it is", lambda: self.source.begin_epoch(trainer))
        is_watched = self._watch.see_batch(trainer, is_first=is_new)
        if not is_watched and self.source.may_differ:
            self._watch.go_on(trainer)
        if is_watched or self.source.wants_batches():
            before_training_step(
                trainer, self, lambda batch: self._observe(trainer, batch, batch_idx, after, is_watched=is_watched)
            )
        return is_new

    def end(self, trainer: Trainer) -> None:
        """Free the examples; no batch is observed any more."""
        self._whole = self._parts = None
        forget_batches(trainer, self)
        forget_batches(trainer, self._watch)
        self.source.release()

    def should_probe(self, trainer: Trainer, wants: bool = True) -> bool:
        """Whether the first rank wants to probe and all can. A collective."""
        if self._awaits_shapes and not is_lazy(module := trainer.lightning_module):
            self._awaits_shapes = False
            self._build(module)
        if self.run is None or not self.ranks.broadcast_object(wants):
            return False
        if self.source.is_outdated:
            self._draw(lambda: self.source.refresh(trainer))

        def sample() -> Sample | None:
            self.source.failure.end(keeps=True)
            if self.source.sample is None and self.schedule.is_listed and not self.source.is_doubtful:
                self.notices.info_once(
                    f"no probe at step {trainer.global_step}: the sample is still being gathered from the batches of "
                    "training; pass sample='all', a loader or a list of batches for one that is there before."
                )
            return self.source.sample

        return self.on_all_ranks(NOT_COPIED, sample) is not None

    @waiting_signals()  # a handler may talk to the other ranks: not before all have left the probe
    def probe(
        self, module: nn.Module, step: int, measure: Callable[[ProbeRun, Sample], OpenRecord] | None = None
    ) -> OpenRecord | None:
        """Take a probe, on all ranks or on none, after `should_probe`.

        Args:
            module: as it is at this step.
            step: for messages and the record.
            measure: takes the probe, by default without an optimizer.

        Raises:
            CheckError: as `on_check_fail` asks.
        """
        run = self.run
        assert run is not None, "asked for before"
        self.notices.inform_of_threads()
        try:
            sample = self._sample(run, module)
            self._prepare(run, module, sample, step)
            opened = run.measure(module, sample, step) if measure is None else measure(run, sample)
            for cause, text in run.examples.told.items():
                self.notices.info_once(text, cause, in_process=text == run.examples.joining.refusal)
            return opened
        except Exception as error:
            if self.notices.is_of_signal(step, error, self.ranks):
                return None
            if isinstance(error, CheckError) and self.settings.on_check_fail == "raise":
                raise
            what = f"the probe at step {step} failed and is left out"
            self.notices.failure(f"{what}{self._otherwise}", error, self.ranks)
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Leave trainer, module and examples behind: a copy is of no trainer."""
        return {**vars(self), "_owners": (), "_whole": None, "_parts": None}

    def _build(self, module: nn.Module, wrong: type[Exception] | None = None) -> None:
        block = partial(ProbeRun, self.settings, module, self.ranks)
        self.run = self.on_all_ranks("nothing is measured", block, wrong)

    def _draw(self, block: Callable[[], None]) -> None:
        """Draw the sample on all ranks; where one fails, there is none."""
        # Another ValueError than a SampleError may be of the data's own.
        what = "the sample could not be drawn, so nothing is measured"
        if self.on_all_ranks(what, lambda: (block(), True), SampleError) is None:  # type: ignore[func-returns-value]
            self.source.forget()

    def _observe(
        self, trainer: Trainer, batch: Any, batch_idx: int, after: Callable[[], None], *, is_watched: bool
    ) -> None:
        """Keep a batch for the sample."""
        try:
            with self.schedule.aside():
                if is_watched and self.source.may_differ:
                    self._compare(trainer, batch)
                self.source.observe(batch, trainer.current_epoch, batch_idx)
        except Exception as error:
            what = NOT_COPIED if self.source.spec.sample == "current" else NOT_GATHERED
            self.notices.failure(f"{what}{self._otherwise}", error, self.ranks)
        if self.source.bound is not None:
            self.notices.warn_once("memory", f"{self.source.bound}.")
        after()

    def _compare(self, trainer: Trainer, batch: Any) -> None:
        """Notice a hook that has changed a batch. A collective."""
        was_used, gathers = not self.source.is_doubtful, self.source.spec.is_number
        with self.ranks.agree():
            has_changed = any(self.ranks.all_gather_object(self._watch.has_changed(batch)))
            self.source.settle(trainer, has_changed=has_changed)
            if has_changed and was_used:
                self.notices.warn(change_notice(trainer.global_step, gathers=gathers))
        if not has_changed:
            self._watch.go_on(trainer)

    def _sample(self, run: ProbeRun, module: nn.Module) -> Sample:
        """The sample, cut where batches are too large. A collective."""
        sample = self.source.sample
        assert sample is not None, "asked for before"
        if (fresh := self.source.fresh) is not None:
            sample = self.source.choose(fresh if run.differ(module, sample, fresh) else sample)
        spec = self.source.spec
        if not spec.is_number or self._can_cut is False:
            return sample
        if self._whole is not sample:
            with self.ranks.agree():
                self._parts = cut_sample(sample, spec, self.ranks)
            self._whole = sample
        parts = self._parts
        if parts is None or parts is sample:
            return sample
        if self._can_cut is None:
            self._can_cut = run.can_evaluate(module, parts)
        return parts if self._can_cut else sample

    def _prepare(self, run: ProbeRun, module: nn.Module, sample: Sample, step: int) -> None:
        """Refresh the parameters, and make the self-check if it is still due."""
        if run.refresh_parameters(module):
            self.notices.warn(f"the set of measured parameters has changed by step {step}; overlaps start anew.")
        if run.self_check is not None:
            return
        with self.schedule.aside():
            run.check(module, sample)
        if run.notice is not None:
            self.notices.warn_once("self-check", run.notice)


NOT_COPIED = "the batch could not be copied, so nothing is measured"
NOT_GATHERED = "a batch of training is left out of the sample"
