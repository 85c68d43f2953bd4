"""Callback that probes on a schedule and logs what was found.

No mathematics here. A probe of theta_t is taken when t optimizer steps are done. Its record stays open until the next
step ends, since some numbers belong to the step taken *from* theta_t; then it is closed and logged at x = t. Every rank
does all of this; what a clock or an exception decides, ranks decide together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_subspace._lightning import Trainer, given_loaders, skips_backward, training_loaders, undeclared
from lightning_subspace.callbacks.measured import Measured
from lightning_subspace.callbacks.notices import Notices, OnFailure
from lightning_subspace.callbacks.project import (
    check_apart,
    check_project,
    check_steps,
    misconfiguration,
    warn_of_missing_keys,
)
from lightning_subspace.callbacks.recorder import Recorder
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.strategy import ranks_of
from lightning_subspace.callbacks.trained_weights import (
    AVERAGED,
    NOT_TRAINED,
    TrainedWeights,
    may_be_last,
    may_be_replaced,
)
from lightning_subspace.callbacks.updates import UpdateWatch
from lightning_subspace.curvature.selection import Curvature, OnCheckFail, Precision
from lightning_subspace.data.micro_batch import Weight
from lightning_subspace.data.reading import READ_TIMEOUT
from lightning_subspace.linalg.selection import Which
from lightning_subspace.loss.mode import Mode
from lightning_subspace.measurements import Measurement
from lightning_subspace.probe.arguments import require_name, require_number, require_steps, require_word
from lightning_subspace.probe.checkpoint import encode
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.schedule import Schedule
from lightning_subspace.probe.settings import ProbeSettings, require_sizes
from lightning_subspace.probe.verification import Verify
from lightning_subspace.report import Publisher
from lightning_subspace.report.loggers import LogLevel
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.room import BasisChoice

SPEAKER = "SubspaceMonitor"
NOT_RESUMED = "the state in the checkpoint is not used, history and overlaps start anew"


class SubspaceMonitor(Measured):
    """Log the gradient's share in the top eigenspace of the Hessian.

    Training is bit for bit what it is without the monitor. What a probe cannot stand behind is left out of its record,
    with a warning; a probe that fails does not stop training, unless asked to. See the README for the keys.

    Args:
        k: number of top eigenpairs, the number of classes being the natural choice; 0 takes one Hessian product a
            probe and gives only the numbers along the gradient.
        every_n_steps: optimizer steps between probes, or the list of steps to probe at (then nothing is probed beside
            them; otherwise the start is, and the end if the budget allows it).
        max_overhead: largest share of the wall time that probes after the first may take; candidate steps are passed
            over to keep it. None gives the exact schedule.
        sample: examples for the Hessian: a number, which are gathered from the batches that training uses (or drawn
            before, where the data are tensors in memory); "all", which reads the dataset; "current", the batch at
            hand; or a loader or a list of batches or of (batch, weight) pairs.
        gradient_sample: examples for the gradient, which contain the former: a number or "all". Used where `sample` is
            a number.
        resample: whether the sample is taken anew where the data of training change (at most once an epoch).
        read_timeout: seconds that reading a dataset, a loader or a list may take; beyond them nothing is measured.
        batch_size: of the micro-batches; by default batches are whole, as in training.
        weight: `weight(batch)` is a batch's share in averages, by default its examples; its tokens, for a mean of them.
        reference_step: also log the overlap with the space of the first probe at or after this step.
        which: end of the spectrum: "LA" (largest algebraic, the paper's "top"), "SA", "LM", "BE".
        tol: residual of the eigenpairs relative to the largest |eigenvalue|.
        max_matvecs: Hessian products a probe may take.
        ncv: largest number of basis vectors; by default min(n, 2k + 10), or what fits, at least k + 5.
        basis: where they lie: "device", "cpu" (host memory), or "auto", which takes that where a device has no room.
        verify: which probes exclude missed copies of equal eigenvalues; a number m: every m-th. See the README.
        params: shell-style patterns of parameter names; by default all trainable ones.
        loss_fn: `loss_fn(pl_module, batch, batch_idx) -> scalar` in place of `training_step`.
        mode: "train" (the objective that is being descended) or "eval".
        dtype: narrowest type computed in, "float32" or "float64"; or "native", the loss as it is trained.
        curvature: "hessian", exact second derivatives; "ggn", the Gauss-Newton matrix; "finite-difference", the Hessian
            without second derivatives: at one gradient a product where the self-check finds the loss smooth, elsewhere
            of float64 gradients; "empirical-fisher", the second moment of the gradients of single examples, or of
            micro-batches where the loss is no mean over examples; or "none", the step, the noise and the gradient alone
            (k is then 0). Where a model has no second derivatives, "finite-difference" takes the place of "hessian".
        on_check_fail: where second derivatives turn out wrong at the first probe: "warn" and mark what rests on them,
            "omit" it, "raise", or go on by "finite-difference", with which "ggn" omits it, and nothing is measured
            where what trains is no gradient. Where they cannot be checked, "raise" raises, and the others warn.
        measurements: more measurements, beside the default ones.
        log: "default" for what a person looks at, "all" for everything.
        on_failure: "warn" or "raise" when a probe fails.
        name: prefix of all keys, to be chosen where there are several monitors.
        seed: of the sample, the dropout masks and the start vectors, 0 to 2**63 - 1.

    Raises:
        MisconfigurationException: from `__init__`, `setup` or the start of training, naming the argument, what was
            expected, what came, and the way out.

    Example:
        >>> monitor = SubspaceMonitor(k=10, every_n_steps=200)
        >>> monitor.history
        []
    """

    def __init__(
        self,
        k: int = 10,
        *,
        every_n_steps: int | Sequence[int] = 100,
        max_overhead: float | None = 0.2,
        sample: int | str | Iterable[Any] = 1024,
        gradient_sample: int | str = 8192,
        resample: bool = True,
        read_timeout: float = READ_TIMEOUT,
        batch_size: int | None = None,
        weight: Weight | None = None,
        reference_step: int | None = None,
        which: Which = "LA",
        tol: float = 1e-3,
        max_matvecs: int = 200,
        ncv: int | None = None,
        basis: BasisChoice = "auto",
        verify: Verify | int = "always",
        params: Sequence[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,  # LightningCLI would refuse one without annotations as LossFunction
        mode: Mode = "train",
        dtype: Precision = "float32",
        curvature: Curvature = "hessian",
        on_check_fail: OnCheckFail = "warn",
        measurements: Sequence[Measurement] | None = None,
        log: LogLevel = "default",
        on_failure: OnFailure = "warn",
        name: str = "subspace",
        seed: int = 0,
    ) -> None:
        super().__init__()
        with misconfiguration(SPEAKER):
            self._settings = ProbeSettings.of(locals())
            every_n_steps = require_steps("every_n_steps", every_n_steps)
            if max_overhead is not None:
                share = "a number between 0 and 1 or None"
                max_overhead = require_number("max_overhead", max_overhead, share, lambda x: 0.0 < x < 1.0)
            require_word("log", log, get_args(LogLevel))
            require_sizes(self._settings)
            require_word("on_failure", on_failure, get_args(OnFailure))
            require_name("name", name)
        self.name = name
        self._schedule = Schedule(every_n_steps, max_overhead)
        self._notices = Notices(SPEAKER, on_failure)
        self._runner = ProbeRunner(self._settings, self._schedule, self._notices)
        extra = {key for measurement in self._settings.taken for key in measurement.extra}
        self._recorder = Recorder(self._runner, Publisher(name, log, extra), name)
        self._trained, self._updates = TrainedWeights(), UpdateWatch(self._runner)
        # A step is over only when this differs from `global_step`: while gradients accumulate, batches end without one.
        self._seen_step = -1
        # The step of the last probe, so that none is taken twice at one point: at the start, on resuming, at the end.
        self._probed_step = -1
        # The probe at the start is still owed: a gathered sample is there only after some batches.
        self._awaits_first = False

    def record_at(self, step: int, settings: ProbeSettings) -> Record | None:
        """The open record of this step, if these settings give its space.

        It has eigenvectors, and is open until the next step ends. `SubspaceProjection` takes its subspace from here.
        """
        opened = self._recorder.open
        is_same = self._settings.same_subspace_as(settings)
        return opened.record if is_same and opened is not None and opened.record.step == step else None

    def should_measure(self, step: int) -> bool:
        """Whether to probe after this optimizer step; override it for another schedule.

        It is asked once after each step. Under ranks the first one's answer counts.
        """
        return self._schedule.is_due(step)

    # -- hooks, in the order of a run ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything has run."""
        if stage == "fit":
            with misconfiguration(SPEAKER):
                monitors = [c for c in undeclared(trainer, "callbacks") if isinstance(c, SubspaceMonitor)]
                check_apart([(monitor.name, monitor._settings.measurements) for monitor in monitors])
                check_project(trainer, pl_module, self._settings.loss_fn)
                check_steps(self._settings.sample_spec, trainer, self._schedule.every_n_steps, given_loaders(trainer))
            warn_of_missing_keys(trainer, self.name)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Draw the sample, and probe the point where training starts."""
        step = trainer.global_step
        saved, self._saved = self._saved, None
        with misconfiguration(SPEAKER):
            ranks = ranks_of(trainer)
            if saved is None:
                check_steps(
                    self._settings.sample_spec, trainer, self._schedule.every_n_steps, training_loaders(trainer)
                )
        last = self.history[-1].step if self.history else -1
        continues = 0 <= last <= step and step > 0 and self._runner.goes_on(pl_module, ranks)
        self._notices.begin()
        self._recorder.begin(goes_on=continues and saved is None)
        if not continues:
            self._give_up_history()
        self._schedule.begin(step)
        self._updates.begin(step)
        self._seen_step = step
        self._probed_step = step if continues and saved is None and last == step else -1
        self._awaits_first = True
        self._runner.begin(trainer, pl_module, ranks, continues=continues, anew=saved is not None)
        if saved is not None and self._runner.run is not None:
            self._resume(trainer, self._runner.run, saved, step)
        self._take_first_probe(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Have the batch copied for a gathered sample."""
        if skips_backward(trainer):
            self._recorder.close(trainer)
            self._notices.info_once(NOT_TRAINED)
            return
        self._trained.drop()
        if self._runner.see_batch(trainer, batch_idx, lambda: self._take_first_probe(trainer, pl_module)):
            self._take_first_probe(trainer, pl_module)  # what the epoch before has given has to do
        self._updates.look(pl_module, is_scheduled=self._is_scheduled)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: nn.Module, optimizer: Optimizer) -> None:
        """Keep the first gradient after a probe, before it is clipped."""
        self._recorder.see_gradient(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the open record after an optimizer step, and probe if due."""
        self._recorder.losses.see(trainer, outputs, batch)
        step = trainer.global_step
        if step == self._seen_step or skips_backward(trainer):  # gradients are still being accumulated, or never used
            return
        self._seen_step = step
        self._recorder.close(trainer, pl_module)
        self._updates.see_step(pl_module, step)
        if self._agree_to_measure(trainer, step):
            self._probe(trainer, pl_module, step)
        if may_be_last(trainer):
            self._keep_weights(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Keep the weights of a step unknown to be the last."""
        self._keep_weights(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """A last probe, of the weights that were trained, and figures."""
        step = self._seen_step  # the epoch that `skips_backward` counts one more
        self._recorder.close(trainer, alone=trainer.interrupted)
        self._runner.source.end()
        is_new = not trainer.interrupted and step != self._probed_step
        with self._trained.lent(self._runner, pl_module) as is_there:
            if is_new and is_there and self._runner.should_probe(trainer, self._schedule.probes_last_step):
                if self._trained.is_lent:
                    self._notices.info_once(AVERAGED)
                self._probe(trainer, pl_module, step)
                self._recorder.close(trainer)
            self._runner.remember_end(pl_module)
        self._trained.drop()
        self._recorder.finish(trainer)
        self._recorder.tell_what_is_missing(trainer)
        self._runner.end(trainer)
        self._schedule.end()
        if (schedule := self._schedule).misses_what_was_asked:
            self._notices.budget_skipped(schedule.num_passed_over, schedule.passed_over, schedule.max_overhead)

    @override
    def on_exception(self, trainer: Trainer, pl_module: nn.Module, exception: BaseException) -> None:
        """Nothing measured is lost when training is interrupted."""
        self._recorder.close(trainer, alone=True)
        self._recorder.failed.tell(self._notices)
        self._saved = None  # where training has not begun: of no use to another fit
        self._trained.drop()
        self._runner.remember_end(pl_module)
        self._runner.end(trainer)
        self._schedule.end()

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _take_first_probe(self, trainer: Trainer, pl_module: nn.Module) -> None:
        step = trainer.global_step
        is_owed = self._awaits_first and self._schedule.probes_first_step and step != self._probed_step
        if is_owed and self._runner.should_probe(trainer):
            self._probe(trainer, pl_module, step)
        if self._runner.source.has_begun:
            self._awaits_first = False

    def _agree_to_measure(self, trainer: Trainer, step: int) -> bool:
        """Whether all ranks probe now; they communicate only where they may differ."""
        if self._is_scheduled:
            wants, may_differ = self.should_measure(step), self._schedule.was_candidate
        else:
            what, may_differ = f"should_measure({step}) failed, and was taken for False", True
            wants = bool(self._runner.on_all_ranks(what, lambda: self.should_measure(step)))
        return may_differ and self._runner.should_probe(trainer, wants)

    @property
    def _is_scheduled(self) -> bool:
        return getattr(self.should_measure, "__func__", None) is _SHOULD_MEASURE

    def _keep_weights(self, trainer: Trainer, module: nn.Module) -> None:
        step, may_probe = self._seen_step, self._schedule.may_probe_last_step and may_be_replaced(trainer)
        if may_probe and step not in (self._trained.step, self._probed_step):
            with self._schedule.aside():
                self._trained.keep(module, step)

    def _probe(self, trainer: Trainer, pl_module: nn.Module, step: int) -> None:
        self._probed_step, self._awaits_first = step, False
        self._recorder.take(trainer, pl_module, step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """History, overlaps and schedule of the run, without eigenvectors.

        With k eigenpairs and n parameters at most 256 k min(n, 4096) bytes of sketches (10.5 MB for k = 10), about half
        a kB a probe, and what the measurements keep.
        """
        if self._runner.run is None:
            return dict(self._saved) if isinstance(self._saved, Mapping) else {}
        try:
            state = self._recorder.completed(self._runner.run.state(self._schedule.position, self._recorder.open))
            return encode(replace(state, sample=self._runner.source.state))
        except Exception as error:  # a checkpoint is worth more than what the monitor has to add
            self._notices.failure("a checkpoint was written without what was measured", error, self._runner.ranks)
            return {}

    def _resume(self, trainer: Trainer, run: ProbeRun, saved: Any, step: int) -> None:
        """Continue the run of the checkpoint, or warn why not."""
        read = self._runner.on_all_ranks(NOT_RESUMED, lambda: self._read(saved, step))
        if read is None:
            return
        self._runner.resume_sample(trainer, read.sample)
        # The last record counts too: a user's `should_measure` need not ask the schedule.
        last_step = max([read.position.last_step, *(record.step for record in read.records)])
        has_sample = self._runner.source.sample is not None or self._runner.source.is_doubtful
        reopen = last_step == step and has_sample and self._schedule.probes_first_step
        resumed = self._runner.on_all_ranks(NOT_RESUMED, lambda: run.resumed(read, reopen=reopen))
        if resumed is None:
            return
        self._runner.run, is_reopened = resumed
        self._recorder.resume(read, self._runner.run)
        self._schedule.resume(read.position, step)
        # Where the checkpoint was written before our hook, the step is still due.
        is_due = last_step < step and self._agree_to_measure(trainer, step)
        is_owed = not self.history and not self._runner.source.has_begun
        self._awaits_first = is_reopened or is_due or is_owed
        self._probed_step = -1 if self._awaits_first or not self.history else self.history[-1].step

    def __getstate__(self) -> dict[str, Any]:
        """Leave out Lightning's logging methods, which hold the module."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}


# To notice one in its place: a user's need not be the same on all ranks.
_SHOULD_MEASURE = SubspaceMonitor.should_measure
