"""The callback: decides when to probe, and hands what a probe found to the trainer and its loggers.

No mathematics here. A probe of theta_t is taken when t optimizer steps are done. Its record stays open until the next
step ends, since some numbers belong to the step taken *from* theta_t; then it is closed and logged at x = t. Every rank
does all of this; what a clock or an exception decides, ranks decide together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from lightning_subspace import configuration as check
from lightning_subspace._lightning import Callback, ranks_of
from lightning_subspace.checkpoint import resumed, tracker_state
from lightning_subspace.collectives import Ranks
from lightning_subspace.curvature.choice import Curvature, OnCheckFail, Precision
from lightning_subspace.joint import NOT_COPIED, Joint
from lightning_subspace.measurements import Measurement, default_measurements
from lightning_subspace.messages import Messages
from lightning_subspace.plan import Plan
from lightning_subspace.readings import Readings
from lightning_subspace.record import Record
from lightning_subspace.recorder import Recorder
from lightning_subspace.report import Publisher, add_layout
from lightning_subspace.sample import SampleError, Weight
from lightning_subspace.sample_source import SampleRequest, SampleSource
from lightning_subspace.schedule import Schedule
from lightning_subspace.solver import Solver, Which
from lightning_subspace.tracker import Tracker
from lightning_subspace.training_loss import Mode


class SubspaceMonitor(Readings, Callback):
    """Log how much of the gradient lies in the top eigenspace of the Hessian of the training loss.

    Training is bit for bit what it is without the monitor. What a probe cannot stand behind is left out of its record,
    with a warning; a probe that fails does not stop training, unless asked to. See the README for the keys.

    Args:
        k: number of top eigenpairs, the number of classes being the natural choice; 0 takes one Hessian product a
            probe and gives only the numbers along the gradient.
        every_n_steps: optimizer steps between probes, or the list of steps to probe at (then nothing is probed beside
            them; otherwise the start is, and the end if the budget allows it).
        max_overhead: largest share of the wall time that probes after the first may take; candidate steps are passed
            over to keep it. None gives the exact schedule.
        sample: examples for the Hessian: a number, "all", "current" (the batch just trained on), or a loader or a list
            of batches or of (batch, weight) pairs. An iterable dataset gives the first ones seen in training.
        gradient_sample: examples for the gradient, which contain the former: a number or "all". Used where `sample` is
            a number.
        batch_size: of the micro-batches; by default that of training.
        weight: `weight(batch)` is the share of a batch in averages, by default its number of examples; a loss that is a
            mean over tokens passes the number of tokens.
        reference_step: also log the overlap with the space of the first probe at or after this step.
        which: end of the spectrum: "LA" (largest algebraic, the paper's "top"), "SA", "LM", "BE".
        tol: residual of the eigenpairs relative to the largest |eigenvalue|.
        max_matvecs: Hessian products a probe may take.
        ncv: largest number of basis vectors, by default min(n, 2k + 10).
        params: shell-style patterns of parameter names; by default all trainable ones.
        loss_fn: `loss_fn(pl_module, batch, batch_idx) -> scalar` in place of `training_step`.
        mode: "train" (the objective that is being descended) or "eval".
        dtype: narrowest type computed in, "float32" or "float64"; or "native", the loss as it is trained.
        curvature: "hessian", exact second derivatives; "ggn", the Gauss-Newton matrix; "finite-difference", the Hessian
            without second derivatives: at one gradient a product where the self-check finds the loss smooth, elsewhere
            of float64 gradients; or "empirical-fisher", the second moment of the gradients of single examples, or of
            micro-batches where the loss is no mean over examples. Where a model has no second derivatives,
            "finite-difference" takes the place of "hessian" by itself.
        on_check_fail: where second derivatives turn out wrong at the first probe: "warn", "raise", or go on by
            "finite-difference". With "ggn", which differences cannot give, the last is the first, and nothing is
            measured; nor is it where a model has no second derivatives.
        measurements: more measurements, beside the default ones.
        log: "default" for what a person looks at, "all" for everything.
        layout: add a page of combined charts to TensorBoard's custom scalars.
        on_failure: "warn" or "raise" when a probe fails.
        name: prefix of all keys, to be chosen where there are several monitors.
        seed: of the sample, the dropout masks and the start vectors.

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
        batch_size: int | None = None,
        weight: Weight | None = None,
        reference_step: int | None = None,
        which: Which = "LA",
        tol: float = 1e-3,
        max_matvecs: int = 200,
        ncv: int | None = None,
        params: Sequence[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,  # LightningCLI would refuse one without annotations as LossFunction
        mode: Mode = "train",
        dtype: Precision = "float32",
        curvature: Curvature = "hessian",
        on_check_fail: OnCheckFail = "warn",
        measurements: Sequence[Measurement] | None = None,
        log: Literal["default", "all"] = "default",
        layout: bool = False,
        on_failure: Literal["warn", "raise"] = "warn",
        name: str = "subspace",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.check_arguments(locals())
        self.name = name
        self._plan = Plan(
            solver=Solver(k, which, tol, ncv, max_matvecs, seed),
            measurements=(*default_measurements(k), *(measurements or ())),
            params=params,
            loss_fn=loss_fn,
            mode=mode,
            reference_step=reference_step,
            dtype=dtype,
            curvature=curvature,
            on_check_fail=on_check_fail,
        )
        self._max_overhead = max_overhead
        self._schedule = Schedule(every_n_steps, max_overhead)
        self._source = SampleSource(SampleRequest(sample, gradient_sample, batch_size, weight, seed))
        self._layout = layout
        self._messages = Messages(on_failure)
        self._joint = Joint(Ranks(), self._schedule, self._messages)
        self._tracker: Tracker | None = None
        self._saved: Mapping[str, Any] | None = None  # from a checkpoint, until training goes on from it
        self._recorder = Recorder(name, self._schedule, self._messages, Publisher(name, log), max_overhead)
        self._seen_step = -1
        self._probed_step = -1
        self._awaits_first = False

    def record_at(self, step: int, plan: Plan, request: SampleRequest) -> Record | None:
        """The record, with its eigenvectors, of a probe just taken at this step that these would have taken as well.

        It is there until the next step ends. `SubspaceProjection` takes its subspace from here.
        """
        opened = self._recorder.open
        is_same = self._plan.finds_the_space_of(plan) and self._source.request.is_of_the_examples_of(request)
        return opened.record if is_same and opened is not None and opened.record.step == step else None

    def should_measure(self, step: int) -> bool:
        """Whether to probe after optimizer step `step`; asked once after each. Override it for another schedule.

        Under ranks the first one's answer counts.
        """
        return self._schedule.is_due(step)

    # -- hooks, in the order of a run ---------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything has run."""
        if stage == "fit":
            check.check_names([c.name for c in trainer.callbacks if isinstance(c, SubspaceMonitor)])
            check.check_project(trainer, pl_module, self._plan.loss_fn)
            check.warn_of_missing_keys(trainer, self.name)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Plan, draw the sample, and probe the point where training starts."""
        step = trainer.global_step
        saved, self._saved = self._saved or {}, None
        resumes = "schedule" in saved and saved["schedule"]["last_step"] <= step
        last = self.history[-1].step if self.history else None
        ranks = ranks_of(trainer)
        continues = last is not None and step > 0 and last <= step and ranks.count == self._joint.ranks.count
        self._joint = Joint(ranks, self._schedule, self._messages)
        self._recorder.drop()
        self._seen_step = step
        self._probed_step = step if continues and last == step and not resumes else -1
        self._messages.begin()
        self._schedule.begin(step)
        old = None if resumes or not continues else self._tracker
        self._tracker = self._joint.do(
            "nothing is measured", lambda: Tracker(self._plan, pl_module, ranks) if old is None else old, ValueError
        )
        if self._tracker is not None:
            self._tracker.join(ranks)

        def draw() -> bool:
            self._source.begin(trainer, ranks, continues=continues)
            return True

        # Another ValueError than a SampleError may be of the data's own.
        if not self._joint.do("the sample could not be drawn, so nothing is measured", draw, SampleError):
            self._source.forget()
        if self._layout and trainer.is_global_zero:
            add_layout(trainer.loggers, self.name, self._plan.solver.k)
        self._awaits_first = True
        if resumes and self._tracker is not None:
            self._go_on(self._tracker, saved, step)
        self._take_first_probe(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Keep the batch where it is of the sample: training_step may write into it."""
        if not self._source.is_gathered:
            return
        try:
            with self._schedule.aside():
                self._source.see(batch, trainer.current_epoch)
        except Exception as error:
            self._messages.failure(NOT_COPIED, error, self._joint.ranks)
        self._take_first_probe(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Optimizer) -> None:
        """Keep the gradient of the first step after a probe, before it is clipped."""
        self._recorder.see_gradient(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step: close the open record, and probe if it is time."""
        step = trainer.global_step
        if step == self._seen_step:  # gradients are still being accumulated
            return
        self._seen_step = step
        self._recorder.close(trainer, pl_module)
        if self._agreed_to_measure(step):
            self._take_probe(trainer, pl_module, step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """A last probe, and the last figures."""
        step = trainer.global_step
        self._recorder.close(trainer)
        self._source.end()
        if not trainer.interrupted and step != self._probed_step and self._agreed(self._schedule.probes_last_step):
            self._take_probe(trainer, pl_module, step)
            self._recorder.close(trainer)
        self._recorder.draw(trainer)
        self._source.release()
        self._schedule.end()
        if self._schedule.misses_what_was_asked:
            schedule = self._schedule
            self._messages.passed_over(schedule.num_passed_over, schedule.passed_over, self._max_overhead)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Nothing measured is lost when training is interrupted."""
        self._recorder.close(trainer)
        self._source.release()
        self._schedule.end()

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _take_first_probe(self, trainer: Any, pl_module: nn.Module) -> None:
        step = trainer.global_step
        is_wanted = self._awaits_first and self._schedule.probes_first_step and step != self._probed_step
        if is_wanted and self._agreed(True):
            self._take_probe(trainer, pl_module, step)
        if self._source.has_begun:
            self._awaits_first = False

    def _agreed_to_measure(self, step: int) -> bool:
        """Whether all ranks are to probe after this step. They ask each other only where they may differ."""
        if getattr(self.should_measure, "__func__", None) is _SHOULD_MEASURE:
            wants, may_differ = self.should_measure(step), self._schedule.was_candidate
        else:
            what, may_differ = f"should_measure({step}) failed, and was taken for False", True
            wants = bool(self._joint.do(what, lambda: self.should_measure(step)))
        return may_differ and self._agreed(wants)

    def _agreed(self, wants: bool) -> bool:
        return self._tracker is not None and self._joint.wants(wants, self._source)

    def _take_probe(self, trainer: Any, pl_module: nn.Module, step: int) -> None:
        assert self._tracker is not None, "set in on_train_start"
        assert self._source.sample is not None, "whoever calls has asked"
        self._probed_step, self._awaits_first = step, False
        self._recorder.take(self._tracker, trainer, pl_module, self._source.sample, step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells the monitors of a Trainer apart in its checkpoints."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with its history, its overlaps and its schedule; no eigenvectors.

        With k eigenpairs and n parameters at most 256 k min(n, 4096) bytes of sketches (10.5 MB for k = 10), and about
        2 kB a probe.
        """
        if self._tracker is None:
            return dict(self._saved or {})
        try:
            return {**tracker_state(self._tracker, self._recorder.open), "schedule": self._schedule.state()}
        except Exception as error:  # a checkpoint is worth more than what the monitor has to add
            self._messages.failure("a checkpoint was written without what was measured", error, self._joint.ranks)
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: there is no module yet to compare it with."""
        self._saved = state_dict

    def _go_on(self, tracker: Tracker, saved: Mapping[str, Any], step: int) -> None:
        """Put the new tracker where that of the checkpoint was, or say why not."""
        last_step, has_sample = saved["schedule"]["last_step"], self._source.sample is not None
        can_reopen = has_sample and last_step == step and self._schedule.probes_first_step

        found = self._joint.do(
            "the state in the checkpoint is not used, history and overlaps start anew",
            lambda: resumed(tracker, saved, reopen=can_reopen, name=self.name),
        )
        if found is None:
            return
        self._tracker, is_reopened = found
        self._schedule.resume(saved["schedule"], step)
        is_due = last_step < step and self._agreed_to_measure(step)  # the checkpoint was written before our hook
        self._awaits_first = is_reopened or is_due
        self._probed_step = -1 if self._awaits_first or not self.history else self.history[-1].step

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the methods that Lightning attaches for logging, which hold the module."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}


# To notice one in its place: a user's need not be the same on all ranks.
_SHOULD_MEASURE = SubspaceMonitor.should_measure
