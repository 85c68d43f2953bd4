"""A sequence of probes along one training run: what each hands to the next, and what it leaves behind.

Between probes only the eigenvectors of the last and of the reference probe are kept, on the CPU. An open record adds
the parameters, the gradient and the eigenvectors of its probe; the graphs of the Hessian go as soon as it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_subspace.checkpoint import Resumed
from lightning_subspace.collectives import Ranks
from lightning_subspace.curvature import CheckError, Choice, SelfCheck
from lightning_subspace.measurements import Probe
from lightning_subspace.overlap_history import OverlapHistory
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.partition import Partition
from lightning_subspace.plan import Plan
from lightning_subspace.probe import check_once, checked_k, choice_after, finite, is_taken, take_probe
from lightning_subspace.record import Record
from lightning_subspace.sample import Sample

# Neighbours closer than this, in units of the largest |eigenvalue|, are taken for copies: a converged eigenvalue is off
# by about tol^2 / gap, 1e-6 by default, and to take two for copies by chance costs a few products.
COPIES = 1e-5


@dataclass
class OpenRecord:
    """A record that waits for the optimizer step taken from its point.

    Attributes:
        probe: for `Measurement.after_step`; its operator is over.
        record: what is known at theta_t; its subspace holds the eigenvectors.
        theta: (n,), the parameters at the probe.
        gradient: (n,), the accumulated mini-batch gradient of the next step, before clipping, once it is known.
        failure: why it is not known.
    """

    probe: Probe
    record: Record
    theta: Tensor
    gradient: Tensor | None = None
    failure: Exception | None = None

    def see_gradient(self, module: nn.Module) -> None:
        """Keep the accumulated gradient of the first step after the probe. Never raises: the others are not here."""
        if self.gradient is None and self.failure is None:
            partition = self.probe.partition
            try:
                self.gradient = partition.flatten([p.grad for p in partition.space.tensors(module)], like=self.theta)
            except Exception as error:  # no memory, or a parameter that has gone: told when the record is closed
                self.failure = error


class Tracker:
    """Takes probes of one run and keeps their records.

    Args:
        plan: what is measured.
        module: gives the parameter space at the start.
        ranks: the processes that measure together; None: this one alone.

    Attributes:
        history: the closed records, oldest first.
        overlaps: between the subspaces of all probes.
        partition: the present parameter space, and how it is dealt to ranks.
        num_probes: how many probes were taken, those apart that failed.
        self_check: what the last self-check of the second derivatives showed; None until there was one, and again when
            the set of trainable parameters has changed.
        notice: what a user should be told about it; None where all is well.

    Raises:
        ValueError: for a module without trainable parameters, a pattern without a match, k > n, or a word that is not
            a choice.
    """

    def __init__(self, plan: Plan, module: nn.Module, ranks: Ranks | None = None) -> None:
        self.plan = plan
        self.ranks = Ranks() if ranks is None else ranks
        self.history: list[Record] = []
        self.num_probes = 0
        self.self_check: SelfCheck | None = None
        self.notice: str | None = None
        self._refusal: str | None = None  # why the check lets nothing be measured
        self._choice = Choice(plan.loss_fn, plan.mode, plan.solver.seed, plan.dtype, plan.curvature, plan.on_check_fail)
        self._choice.require_no_obstacle(module)
        self.partition = self._partition_of(module)
        self._previous: Tensor | None = None
        self._reference: Tensor | None = None
        self._resumed = Resumed()
        self._start_overlaps()

    @property
    def space(self) -> ParameterSpace:
        """The present parameter space."""
        return self.partition.space

    @property
    def curvature(self) -> str:
        """What the next probe is measured with: a word as for `SubspaceMonitor`."""
        return self._choice.curvature

    def check(self, module: nn.Module, sample: Sample) -> SelfCheck:
        """Compare second derivatives with differences of gradients, in float64, on a few examples.

        Where there are none, or where they are wrong and the plan says so, the run goes on with differences.

        Raises:
            CheckError: when they are wrong, with `on_check_fail="raise"`, or where nothing else would do.
        """
        with self.ranks.together():
            result = check_once(self._choice, module, sample, self.partition)
        self.self_check, self._refusal = result, None
        with self.ranks.together():
            try:
                choice, notice = choice_after(self._choice, result, module, sample, self.partition)
            except CheckError as error:
                self._refusal = str(error)
                raise
        self._choice, self.notice = choice, notice
        return result

    def adapt(self, module: nn.Module) -> bool:
        """Start the overlaps anew if the set of trainable parameters has changed; whether it has. A collective."""
        with self.ranks.together():
            partition = self._partition_of(module)
        has_changed = partition != self.partition  # also where the next fit deals them otherwise
        if has_changed:
            self.partition, self.self_check, self._refusal = partition, None, None
            self._start_overlaps()
        return has_changed

    def measure(
        self,
        module: nn.Module,
        sample: Sample,
        step: int,
        *,
        optimizer: Optimizer | None = None,
        on_matvec: Callable[[int, float], None] | None = None,
    ) -> OpenRecord:
        """Take a probe of the module as it is; nothing of it is changed, also by an exception.

        A collective: what goes wrong on one rank goes wrong on all, and leaves all as they were.

        Raises:
            CheckError: when the self-check has let nothing be measured; it is not made again.
            PeerError: when it went wrong on another rank.
        """
        if self._refusal is not None:
            raise CheckError(self._refusal)
        with self.ranks.together():
            theta = self._theta(module)
            probe, record = self._take(module, sample, step, optimizer, on_matvec)
            record = self._resumed.complete(record)
            kept = self._prepared(record)
        # What changes from here on cannot fail on one rank and not on another.
        self.num_probes += 1
        self._resumed = self._resumed.after(record)
        if kept is not None:
            self._remember(record, *kept)
        over: Any = _Over()
        return OpenRecord(replace(probe, operator=over, solve=over, batch_gradients=over), record, theta)

    def close(self, opened: OpenRecord, module: nn.Module | None = None) -> Record:
        """Add a record to the history.

        Args:
            opened: the record.
            module: after the optimizer step from the record's point; None when no step was taken.
        """
        metrics = dict(opened.record.metrics)
        subspace = opened.probe.subspace
        if module is not None:
            with self.ranks.together():
                metrics.update(self._after_step(opened, module))
        record = replace(
            opened.record, metrics=metrics, subspace=None if subspace is None else subspace.without_eigenvectors()
        )
        self.history.append(record)
        return record

    def join(self, ranks: Ranks) -> None:
        """Go on in another fit, whose process group is a new one of as many ranks."""
        self.ranks, self.partition = ranks, replace(self.partition, ranks=ranks)

    def go_on(self, space: ParameterSpace, overlaps: OverlapHistory, reopened: Record | None) -> None:
        """Continue these overlaps from a checkpoint; see `checkpoint.restore`. Small sketches are eigenvectors."""
        held = overlaps.sketches
        previous = list(held.values())[-1] if held else None
        reference = None if overlaps.reference_step is None else held[overlaps.reference_step]
        self.overlaps = overlaps
        if space != self.space:
            self.partition = Partition.even(space, self.ranks)
        self._resumed = Resumed(previous, reference, reopened)
        self._previous, self._reference = (
            self.partition.cut(sketch.basis) if sketch is not None and sketch.exact else None
            for sketch in (previous, reference)
        )

    def _theta(self, module: nn.Module) -> Tensor:
        """This rank's part of the parameters."""
        parameters = self.space.tensors(module)
        like = torch.empty(0, dtype=self.space.widest_dtype(module), device=parameters[0].device)
        return self.partition.flatten(parameters, like)

    def _take(
        self,
        module: nn.Module,
        sample: Sample,
        step: int,
        optimizer: Optimizer | None,
        on_matvec: Callable[[int, float], None] | None,
    ) -> tuple[Probe, Record]:
        number = self.num_probes
        # Read off eigenvalues, which are equal on all ranks as far as their processors are: the first one decides.
        verify = self.ranks.first(self.plan.verifies(number) or has_copies(self.history))
        with self._choice.loss(module, self.space, self.ranks) as loss:
            return take_probe(
                loss,
                sample,
                self.plan.solver,
                self.plan.measurements,
                operator=self._choice.operator,
                partition=self.partition,
                step=step,
                number=number,
                verify=verify,
                previous=self._previous,
                reference=self._reference,
                history=self.history,
                optimizer=optimizer,
                on_matvec=on_matvec,
            )

    def _after_step(self, opened: OpenRecord, module: nn.Module) -> dict[str, float]:
        """What the step from an open record's point tells."""
        failure, opened.failure = opened.failure, None
        if failure is not None:
            raise failure
        metrics: dict[str, float] = {}
        probe = opened.probe
        update = probe.partition.flatten(probe.space.tensors(module), like=opened.theta).sub_(opened.theta)
        for measurement in self.plan.measurements:
            if is_taken(measurement, probe.number, probe.subspace):
                metrics.update(measurement.after_step(probe, opened.gradient, update))
        return self.ranks.first(finite(metrics))

    def _prepared(self, record: Record) -> tuple[Tensor, dict[int, float]] | None:
        """What the probes to come need of a trusted subspace: its basis, and its overlaps with those before it."""
        if record.subspace is None or record.sketch is None:
            return None
        return record.subspace.basis.cpu(), self.overlaps.compare(record.sketch)

    def _remember(self, record: Record, basis: Tensor, overlaps: dict[int, float]) -> None:
        """Keep the basis and the sketch of a trusted subspace for the probes to come."""
        assert record.sketch is not None, "see `_prepared`"
        self._previous = basis
        due = self.plan.reference_step is not None and record.step >= self.plan.reference_step
        if due and self.overlaps.reference_step is None:
            self._reference = self._previous
            self.overlaps.reference_step = record.step
        given_up = self.overlaps.add(record.step, record.sketch, overlaps)
        if given_up is not None:
            self.history[:] = [replace(r, sketch=None) if r.step == given_up else r for r in self.history]

    def _partition_of(self, module: nn.Module) -> Partition:
        """The coordinates of the probes to come."""
        space = ParameterSpace.of(module, self.plan.params)
        checked_k(self.plan.solver.k, space)
        return Partition.of(space, module, self.ranks)

    def _start_overlaps(self) -> None:
        """Forget the spaces of earlier probes."""
        self.overlaps = OverlapHistory()
        self._previous = self._reference = None
        self._resumed = Resumed()


def has_copies(history: Sequence[Record]) -> bool:
    """Whether the last probe that excluded missed copies found eigenvalues that occur more than once."""
    last = next((r.subspace for r in reversed(history) if r.subspace is not None and r.subspace.verified), None)
    if last is None or last.k < 2:
        return False
    values = last.eigenvalues.sort().values
    return bool((values.diff() <= COPIES * values.abs().max()).any())


class _Over:
    """In the place of what a probe can do only while it lasts, so that its graphs are free before the next step."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` was asked for after the probe; the operator can be used in `measure` only.")

    def __call__(self, *args: object) -> NoReturn:
        raise RuntimeError("the probe is over; the operator can be used in `measure` only.")
