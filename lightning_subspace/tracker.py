"""A sequence of probes along one training run: what each hands to the next, and what it leaves behind.

Between probes only the eigenvectors of the last and of the reference probe are kept, on the CPU. An open record adds
the parameters, the gradient and the eigenvectors of its probe; the graphs of the Hessian go as soon as it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_subspace.checkpoint import Resumed
from lightning_subspace.curvature import Choice, SelfCheck
from lightning_subspace.measurements import Measurement, Probe
from lightning_subspace.overlap_history import OverlapHistory
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.probe import Solver, check_once, checked_k, finite, is_measurable, take_probe
from lightning_subspace.record import Record
from lightning_subspace.sample import Sample
from lightning_subspace.training_loss import LossFunction, Mode

# Every tenth probe, beginning with the first, excludes missed copies of equal eigenvalues.
VERIFY_EVERY = 10


@dataclass(frozen=True)
class Plan:
    """What is measured at every probe of a run; see `SubspaceMonitor` for the arguments."""

    solver: Solver
    measurements: tuple[Measurement, ...]
    params: Sequence[str] | None = None
    loss_fn: LossFunction | None = None
    mode: Mode = "train"
    reference_step: int | None = None
    dtype: str = "float32"
    curvature: str = "hessian"
    on_check_fail: str = "warn"


@dataclass
class OpenRecord:
    """A record that waits for the optimizer step taken from its point.

    Attributes:
        probe: for `Measurement.after_step`; its operator is over.
        record: what is known at theta_t; its subspace holds the eigenvectors.
        theta: (n,), the parameters at the probe.
        gradient: (n,), the accumulated mini-batch gradient of the next step, before clipping, once it is known.
    """

    probe: Probe
    record: Record
    theta: Tensor
    gradient: Tensor | None = None

    def see_gradient(self, module: nn.Module) -> None:
        """Keep the accumulated gradient of the first step after the probe."""
        if self.gradient is None:
            space = self.probe.space
            self.gradient = space.flatten([p.grad for p in space.tensors(module)], like=self.theta)


class Tracker:
    """Takes probes of one run and keeps their records.

    Args:
        plan: what is measured.
        module: gives the parameter space at the start.

    Attributes:
        history: the closed records, oldest first.
        overlaps: between the subspaces of all probes.
        space: the present parameter space.
        num_probes: how many probes were taken, those apart that failed.
        self_check: what the last self-check of the second derivatives showed; None until there was one, and again when
            the set of trainable parameters has changed.
        notice: what a user should be told about it; None where all is well.

    Raises:
        ValueError: for a module without trainable parameters, a pattern without a match, k > n, or a word that is not
            a choice.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        self.plan = plan
        self.history: list[Record] = []
        self.num_probes = 0
        self.self_check: SelfCheck | None = None
        self.notice: str | None = None
        self._choice = Choice(plan.loss_fn, plan.mode, plan.solver.seed, plan.dtype, plan.curvature, plan.on_check_fail)
        self._previous: Tensor | None = None
        self._reference: Tensor | None = None
        self._forget_spaces(module)

    @property
    def curvature(self) -> str:
        """What the next probe is measured with: "hessian" or "finite-difference"."""
        return self._choice.curvature

    def check(self, module: nn.Module, sample: Sample) -> SelfCheck:
        """Compare second derivatives with differences of gradients, in float64, on a few examples.

        Where there are none, or where they are wrong and the plan says so, the run goes on with differences.

        Raises:
            CheckError: when they are wrong, with `on_check_fail="raise"`.
        """
        self.self_check = check_once(self._choice, module, self.space, sample)
        self._choice, self.notice = self._choice.after(self.self_check)
        return self.self_check

    def adapt(self, module: nn.Module) -> bool:
        """Start the overlaps anew if the set of trainable parameters has changed; whether it has."""
        if ParameterSpace.of(module, self.plan.params) == self.space:
            return False
        self._forget_spaces(module)
        self.self_check = None
        return True

    def measure(
        self,
        module: nn.Module,
        sample: Sample,
        step: int,
        *,
        optimizer: Optimizer | None = None,
        on_matvec: Callable[[int, float], None] | None = None,
    ) -> OpenRecord:
        """Take a probe of the module as it is; nothing of it is changed, also by an exception."""
        plan, number = self.plan, self.num_probes
        parameters = self.space.tensors(module)
        widest = self.space.widest_dtype(module)
        theta = self.space.flatten(parameters, like=parameters[0].new_empty(0, dtype=widest))
        with self._choice.loss(module, self.space) as loss:
            probe, record = take_probe(
                loss,
                sample,
                plan.solver,
                plan.measurements,
                operator=self._choice.operator,
                step=step,
                number=number,
                verify=number % VERIFY_EVERY == 0,
                previous=self._previous,
                reference=self._reference,
                history=self.history,
                optimizer=optimizer,
                on_matvec=on_matvec,
            )
        self.num_probes += 1
        record = self._resumed.complete(record)
        self._remember(record)
        over: Any = _Over()
        return OpenRecord(replace(probe, operator=over, solve=over, batch_gradients=over), record, theta)

    def close(self, opened: OpenRecord, module: nn.Module | None = None) -> Record:
        """Add a record to the history.

        Args:
            opened: the record.
            module: after the optimizer step from the record's point; None when no step was taken.
        """
        metrics = dict(opened.record.metrics)
        probe = opened.probe
        if module is not None:
            update = probe.space.flatten(probe.space.tensors(module), like=opened.theta).sub_(opened.theta)
            for measurement in self.plan.measurements:
                if is_measurable(measurement, probe.subspace):
                    metrics.update(measurement.after_step(probe, opened.gradient, update))
        subspace = None if probe.subspace is None else probe.subspace.without_eigenvectors()
        record = replace(opened.record, metrics=finite(metrics), subspace=subspace)
        self.history.append(record)
        return record

    def go_on(self, space: ParameterSpace, overlaps: OverlapHistory, reopened: Record | None) -> None:
        """Continue these overlaps from a checkpoint; see `checkpoint.restore`. Small sketches are eigenvectors."""
        held = overlaps.sketches
        previous = list(held.values())[-1] if held else None
        reference = None if overlaps.reference_step is None else held[overlaps.reference_step]
        self.space, self.overlaps = space, overlaps
        self._resumed = Resumed(previous, reference, reopened)
        self._previous = previous.basis if previous is not None and previous.exact else None
        self._reference = reference.basis if reference is not None and reference.exact else None

    def _remember(self, record: Record) -> None:
        """Keep the basis and the sketch of a trusted subspace for the probes to come."""
        if record.subspace is None or record.sketch is None:
            return
        self._previous = record.subspace.basis.cpu()
        due = self.plan.reference_step is not None and record.step >= self.plan.reference_step
        if due and self.overlaps.reference_step is None:
            self._reference = self._previous
            self.overlaps.reference_step = record.step
        given_up = self.overlaps.add(record.step, record.sketch)
        if given_up is not None:
            self.history[:] = [replace(r, sketch=None) if r.step == given_up else r for r in self.history]

    def _forget_spaces(self, module: nn.Module) -> None:
        self.space = ParameterSpace.of(module, self.plan.params)
        checked_k(self.plan.solver.k, self.space)
        self.overlaps = OverlapHistory()
        self._previous = None
        self._reference = None
        self._resumed = Resumed()


class _Over:
    """In the place of what a probe can do only while it lasts, so that its graphs are free before the next step."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` was asked for after the probe; the operator can be used in `measure` only.")

    def __call__(self, *args: object) -> NoReturn:
        raise RuntimeError("the probe is over; the operator can be used in `measure` only.")
