"""Callback that trains inside or outside of a subspace.

The one callback here that changes training. Its place is in the optimizer itself: hooks that torch calls directly
before and after `optimizer.step`. So nothing ever sees an update that has not been projected, neither the module after
its own `optimizer_step` nor any other callback, whatever their order; and where no step is taken (accumulation, a step
that a GradScaler skips) nothing happens.

The subspace is computed at the start of the first batch after an optimizer step: late enough for every callback,
whatever their order, to have ended that step, so that a monitor which has just probed theta_t can share what it found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import nn
from typing_extensions import override

from lightning_subspace._lightning import Trainer, is_a, undeclared
from lightning_subspace.callbacks.given_space import GivenSpaces
from lightning_subspace.callbacks.monitor import SubspaceMonitor
from lightning_subspace.callbacks.notices import Notices, OnFailure
from lightning_subspace.callbacks.project import check_apart, check_project, misconfiguration
from lightning_subspace.callbacks.projected_step import Place, ProjectedSteps
from lightning_subspace.callbacks.projection_log import ProjectionLog
from lightning_subspace.callbacks.projection_state import ProjectionState
from lightning_subspace.callbacks.projector import Keep, Projector
from lightning_subspace.callbacks.resumable import Resumable
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.callbacks.start import StartCondition, StartWhenAligned, require_start
from lightning_subspace.callbacks.strategy import ranks_of
from lightning_subspace.curvature.selection import Curvature, OnCheckFail, Precision
from lightning_subspace.data.micro_batch import Weight
from lightning_subspace.data.reading import READ_TIMEOUT
from lightning_subspace.linalg.selection import Which
from lightning_subspace.loss.mode import Mode
from lightning_subspace.measurements import GradientFraction
from lightning_subspace.probe.arguments import require_integer, require_name, require_word
from lightning_subspace.probe.entries import CheckpointError
from lightning_subspace.probe.given_basis import Rows
from lightning_subspace.probe.schedule import Schedule
from lightning_subspace.probe.settings import ProbeSettings, require_sizes
from lightning_subspace.probe.verification import Verify
from lightning_subspace.subspace.record import Record

SPEAKER = "SubspaceProjection"
INSTEAD = "the last good space stays in use, and where there is none the optimizer's step is left as it is"


class SubspaceProjection(Resumable):
    """Project every optimizer step into a subspace, or out of it.

    After a step of any optimizer, with P the projector on the top k eigenvectors of the Hessian of the training loss,

        keep="top":   theta_{t+1} <- theta_t + P (theta_{t+1} - theta_t)
        keep="bulk":  theta_{t+1} <- theta_t + (I - P) (theta_{t+1} - theta_t)

    With plain SGD this is Dom-SGD and Bulk-SGD of Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?" (arXiv
    2405.16002), who find that the loss falls with "bulk" as without a projection, and not with "top". Clipping,
    momentum, preconditioning and weight decay are all in a step; the optimizer's state is that of the whole gradient.

    With `basis` P projects on a space of your own in place of the eigenspace. With "bulk" and the batches of a retain
    set, or of earlier tasks, no step changes their mean loss to first order. It does to second order, less with many
    batches, whose gradients span its sharp directions, than with one; and a space that is old protects little.

    The space is over `params`, by default all trainable parameters; others take the full step. It is that of theta_t at
    the last refresh. One that is not trusted is not used: the last good one stays in use, and while there is none the
    step is left as it is, with one warning. A `SubspaceMonitor` of the same arguments that has just probed theta_t
    lends its space at no cost. Checkpoints hold no basis: it is computed anew where the run continues.

    Under DDP the basis is dealt to ranks, and all have the same parameters to the bit; FSDP2 is refused. A refresh
    costs a probe; a step one sum of k numbers and an all-gather of n. It holds (k + 2) n floats, divided by the ranks.

    Logged at x = t, every `trainer.log_every_n_steps`: `projection/removed`, the share |u - u'|^2 / |u|^2 in [0, 1]
    taken from the update (or gradient) u; with batches as `basis`, g their mean gradient at the last refresh and u the
    step that was taken, `projection/change`, g.u, and `projection/cosine`, that over |g| |u|. At every refresh
    `projection/loss`, of these batches, and `projection/rank`; until a `StartWhenAligned` begins, `projection/chi`.

    Args:
        keep: "top", what is in the space, or "bulk", what is not.
        k: number of top eigenvectors; the number of classes is the natural choice.
        basis: spans the space in place of eigenvectors: batches (a loader, a list), each by the gradient of its loss;
            or a function from the module to a tensor (m, n) of rows, m < n, the same on all ranks. Rows count as they
            are, to 1e-6 of the largest singular value. Arguments about eigenvectors or a sample are refused with it.
        where: "update" projects what the optimizer did, which alone keeps g.u = 0 with any optimizer; "gradient" what
            it is given: for adaptive ones, whose state is then of the projected gradient. Both are one for plain SGD.
        refresh_every_n_steps: optimizer steps between two computations of the space; 1 is what the paper does.
        start_when: number of optimizer steps that are taken before the first one is projected, or a `StartWhenAligned`.
        sample: examples for the Hessian: a number, which are gathered from the batches that training uses (or drawn
            before, where the data are tensors in memory); "all", which reads the dataset; "current", the batch just
            trained on; or a loader or a list of batches or of (batch, weight) pairs.
        gradient_sample: examples for the gradient of chi, which contain the former: a number or "all". Used with
            `StartWhenAligned`, where `sample` is a number.
        resample: whether the sample is taken anew where the data of training change (at most once an epoch).
        read_timeout: seconds that reading a dataset, a loader or a list may take; beyond them nothing is measured.
        batch_size: of the micro-batches; by default batches are whole, as in training.
        weight: `weight(batch)` is the share of a batch in averages, by default its number of examples.
        which: end of the spectrum: "LA" (largest algebraic, the paper's "top"), "SA", "LM", "BE".
        tol: residual of the eigenpairs relative to the largest |eigenvalue|.
        max_matvecs: Hessian products a refresh may take.
        ncv: largest number of basis vectors, by default min(n, 2k + 10).
        verify: which refreshes exclude missed copies of equal eigenvalues, see `SubspaceMonitor`.
        params: shell-style patterns of parameter names; by default all trainable ones.
        loss_fn: `loss_fn(pl_module, batch, batch_idx) -> scalar` in place of `training_step`.
        mode: "train" (the objective that is being descended) or "eval".
        dtype: narrowest type computed in, "float32" or "float64"; or "native", the loss as it is trained.
        curvature: see `SubspaceMonitor`.
        on_check_fail: where second derivatives turn out wrong: "warn", "raise", "finite-difference", or "omit", with
            which steps stay as they are.
        on_failure: "warn" or "raise" when the space cannot be computed.
        name: prefix of all keys, to be chosen where there are several projections.
        seed: of the sample, the dropout masks and the start vectors, 0 to 2**63 - 1.

    Raises:
        MisconfigurationException: from `__init__`, `setup` or the start of training, naming the argument, what was
            expected, what came, and the way out.

    Example:
        >>> projection = SubspaceProjection("bulk", k=10, refresh_every_n_steps=2, start_when=500)
        >>> projection.is_active
        False
    """

    def __init__(
        self,
        keep: Keep,
        k: int = 10,
        *,
        basis: Rows | Iterable[Any] | None = None,
        where: Place = "update",
        refresh_every_n_steps: int = 1,
        start_when: int | StartWhenAligned = 0,
        sample: int | str | Iterable[Any] = 1024,
        gradient_sample: int | str = 8192,
        resample: bool = True,
        read_timeout: float = READ_TIMEOUT,
        batch_size: int | None = None,
        weight: Weight | None = None,
        which: Which = "LA",
        tol: float = 1e-3,
        max_matvecs: int = 200,
        ncv: int | None = None,
        verify: Verify | int = "always",
        params: Sequence[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,  # LightningCLI would refuse one without annotations as LossFunction
        mode: Mode = "train",
        dtype: Precision = "float32",
        curvature: Curvature = "hessian",
        on_check_fail: OnCheckFail = "warn",
        on_failure: OnFailure = "warn",
        name: str = "projection",
        seed: int = 0,
    ) -> None:
        super().__init__()
        with misconfiguration(SPEAKER):
            require_word("keep", keep, get_args(Keep))
            require_integer("k", k, 1)
            require_word("where", where, get_args(Place))
            refresh_every_n_steps = require_integer("refresh_every_n_steps", refresh_every_n_steps, 1)
            start_when = require_start("start_when", start_when)
            self._given = None if basis is None else GivenSpaces(basis, locals(), SubspaceProjection)
            own = [GradientFraction()] if isinstance(start_when, StartWhenAligned) else []
            more = {} if self._given is None else self._given.settings
            self._settings = ProbeSettings.of({**locals(), **more}, measurements=own, defaults=False, basis="auto")
            require_sizes(self._settings)
            require_word("on_failure", on_failure, get_args(OnFailure))
            require_name("name", name)
        self.name = name
        self._keep: Keep = keep
        self._start_when = start_when
        self._start = StartCondition(start_when)
        self._schedule = Schedule(refresh_every_n_steps, max_overhead=None)
        self._notices = Notices(SPEAKER, on_failure)
        self._runner = ProbeRunner(self._settings, self._schedule, self._notices, INSTEAD)
        self._log = ProjectionLog(name, keep, self._runner)
        # A step is over only when this differs from `global_step`: gradients may be accumulated over several batches.
        self._seen_step = -1
        # The space is out of date, or there is none: it is computed as soon as there is a sample.
        self._wants_space = False
        self._steps = ProjectedSteps(where)

    # -- what a user reads --------------------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether the next optimizer step will be projected."""
        return self._projector is not None

    @property
    def _projector(self) -> Projector | None:
        return self._steps.projector

    @property
    def chi(self) -> float | None:
        """The average that `StartWhenAligned` watches, or None."""
        return self._start.average

    # -- hooks, in the order of a run ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before anything has run."""
        if stage != "fit":
            return
        with misconfiguration(SPEAKER):
            if is_a(trainer.strategy, "ModelParallelStrategy"):
                raise ValueError(
                    f"writes whole parameters, and {type(trainer.strategy).__name__} has shards of them; use "
                    "strategy='ddp', or devices=1."
                )
            check_apart([(c.name, None) for c in undeclared(trainer, "callbacks") if isinstance(c, SubspaceProjection)])
            if self._given is None or self._given.evaluates:
                check_project(trainer, pl_module, self._settings.loss_fn)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Draw the sample, and attach to the optimizers."""
        step = trainer.global_step
        saved, self._saved = self._saved, None
        with misconfiguration(SPEAKER):
            ranks = ranks_of(trainer)
        is_same_run = saved is None and self._runner.run is not None and step > 0 and self._seen_step <= step
        continues = is_same_run and self._runner.goes_on(pl_module, ranks)
        self._notices.begin()
        self._log.begin(goes_on=continues)
        if not continues:
            self._start = StartCondition(self._start_when)
            self._schedule.begin(step)
            self._seen_step, self._steps.projector = -1, None
        elif self._projector is not None:
            self._projector.rebind(ranks)
        self._runner.begin(trainer, pl_module, ranks, continues=continues)
        if saved is not None:
            self._resume(saved, step)
        with misconfiguration(SPEAKER):
            if self._given is not None:
                self._given.require_fewer(self._runner)
            self._steps.start(trainer, pl_module)
        self._wants_space = self._projector is None and (self._start.begun or self._start.average is None)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Compute the space for the step to come, if it is time."""
        step = trainer.global_step
        self._steps.attach(trainer)  # a callback may have put others in their place
        if step != self._seen_step:  # otherwise gradients are being accumulated
            self._seen_step = step
            is_due, begins = self._schedule.is_due(step), self._start.see_step(step)
            is_needed = self._start.begun or self._start.watches
            if is_needed and self._has_changed(pl_module, step):
                self._steps.projector, is_due = None, True
            self._wants_space = is_needed and (self._wants_space or is_due or begins)
        self._runner.see_batch(trainer, batch_idx, lambda: self._refresh_within_step(trainer, pl_module, step))
        self._refresh(trainer, pl_module, step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was removed."""
        for step, found in self._steps.found().items():
            for key, value in found.items():
                self._log.write(trainer, key, value, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Leave the optimizers as they were."""
        self._steps.release()
        self._log.finish(self._start.missed)
        self._runner.remember_end(pl_module)
        self._runner.end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: nn.Module, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self._saved = None  # where training has not begun: of no use to another fit
        self.on_train_end(trainer, pl_module)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _has_changed(self, module: nn.Module, step: int) -> bool:
        """Whether the trainable parameters changed, so that earlier spaces are useless."""
        run = self._runner.run
        if run is None:
            return False
        try:
            changed = run.refresh_parameters(module)
        except Exception as error:  # such as that nothing is left to train
            self._notices.failure(f"there is no space at step {step}; {INSTEAD}", error, self._runner.ranks)
            return True
        if changed:
            self._notices.warn_once("parameters", f"the set of trainable parameters has changed by step {step}.")
        return changed

    def _refresh_within_step(self, trainer: Trainer, module: nn.Module, step: int) -> None:
        """Refresh from the batch in its step, which is then projected, too."""
        self._refresh(trainer, module, step)
        self._steps.begin(trainer, module)  # the optimizer may be waiting for this batch's gradient

    def _refresh(self, trainer: Trainer, module: nn.Module, step: int) -> None:
        if not self._wants_space or not self._runner.should_probe(trainer):
            return
        self._wants_space, self._notices.last_failure = False, None
        if self._given is not None:
            self._refresh_given(self._given, trainer, module, step)
            return
        record = self._record_of(trainer, module, step)
        if record is None or record.subspace is None:
            self._log.refreshed(trainer, step, self._notices.last_failure)
            return
        if not record.subspace.trusted:
            refusal = record.subspace.refusal("the space is not used")
            cause = f"{record.subspace.outcome.name}, {record.subspace.gap_given_up}"
            self._notices.warn_once(cause, f"at step {step}, {refusal}")
            self._log.refreshed(trainer, step, refusal)
            return
        self._log.refreshed(trainer, step)
        if self._start.watches and "gradient_fraction" in record.metrics:
            average = self._start.see_chi(math.sqrt(record.metrics["gradient_fraction"]))
            self._log.write(trainer, "chi", average, step)
        if self._start.begun:
            assert record.subspace.partition is not None, "taken by a probe"
            self._steps.projector = Projector(record.subspace.basis, record.subspace.partition, keep=self._keep)

    def _record_of(self, trainer: Trainer, module: nn.Module, step: int) -> Record | None:
        """The record of theta_t, from a monitor's probe or a new one."""
        for callback in undeclared(trainer, "callbacks"):
            if isinstance(callback, SubspaceMonitor):
                record = callback.record_at(step, self._settings)
                if record is not None:
                    return record
        opened = self._runner.probe(module, step)
        return None if opened is None else opened.record

    def _refresh_given(self, given: GivenSpaces, trainer: Trainer, module: nn.Module, step: int) -> None:
        """Take the space of `basis=`, and tell of it."""
        space, run = given.take(self._runner, module, step, INSTEAD), self._runner.run
        if space is None or run is None:
            self._log.refreshed(trainer, step, self._notices.last_failure)
            return
        self._steps.projector = Projector(space.basis, run.partition, keep=self._keep, gradient=space.gradient)
        run.num_probes += 1
        self._log.refreshed(trainer, step)
        for key, value in space.metrics.items():
            self._log.write(trainer, key, value, step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of the run, without eigenvectors, which are computed anew."""
        run = self._runner.run
        if run is None:
            return dict(self._saved) if isinstance(self._saved, Mapping) else {}
        start, settings = self._start, self._settings
        state = ProjectionState(
            settings.k,
            settings.which,
            self._schedule.position,
            repr(self._start_when),
            start.begun,
            start.average,
            run.num_probes,
        )
        return state.encoded()

    def _resume(self, saved: Any, step: int) -> None:
        """Continue the run of the checkpoint, or warn why not."""
        state = self._runner.on_all_ranks("the state in the checkpoint is not used", lambda: self._read(saved))
        if state is None:
            return
        self._schedule.resume(state.position, step)
        if state.start_when == repr(self._start_when):  # another condition is waited for anew
            self._start.resume(state.begun, state.average)
        if self._runner.run is not None:
            self._runner.run.num_probes = state.num_probes

    def _read(self, saved: Any) -> ProjectionState | None:
        """The checkpoint's run; a warning and None if it cannot continue."""
        try:
            return ProjectionState.decoded(saved, k=self._settings.k, which=self._settings.which)
        except CheckpointError as error:
            self._notices.warn(f"the state {self.name!r} of the checkpoint is not used: {error}. It starts anew.")
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out Lightning's logging methods."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
