"""Probes along one training run: what each hands to the next.

Between probes only the eigenvectors of the last and of the reference probe are kept, on the CPU. An open record adds
the parameters, the gradient and the eigenvectors of its probe; the graphs of the Hessian go as soon as it is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_subspace.curvature import CheckError, CurvatureConfig, SelfCheck
from lightning_subspace.curvature.consequence import require_products
from lightning_subspace.data.sample import Sample
from lightning_subspace.measurements import Probe
from lightning_subspace.measurements.base import Found
from lightning_subspace.parallel.bit_sums import require_equal
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.another import prepare
from lightning_subspace.probe.arguments import checked_k
from lightning_subspace.probe.arrival import LossAfterStep
from lightning_subspace.probe.checkpoint import RunState
from lightning_subspace.probe.examples import Examples
from lightning_subspace.probe.measure import is_taken, take_probe
from lightning_subspace.probe.open_record import OpenRecord, ended
from lightning_subspace.probe.resumed import Resumed
from lightning_subspace.probe.room import require_room
from lightning_subspace.probe.schedule import Position
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.probe.verification import is_verified
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import History, Record, as_numbers


class ProbeRun:
    """Takes probes of one run and keeps their records.

    Args:
        settings: what is measured, and how.
        module: gives the parameter space at the start.
        ranks: the processes that measure together; None: this one alone.

    Attributes:
        history: the closed records, oldest first.
        overlaps: between the subspaces whose sketches are held.
        partition: the present parameter space, and how it is dealt to ranks.
        num_probes: how many probes were taken, without those that failed.
        self_check: what the last one showed; None until there was one, and where the parameters have changed.
        notice: what a user should be told about it; None where all is well.
        examples: what is measured of a sample, and what a user should know about that.

    Raises:
        ValueError: for a module without trainable parameters, a pattern without a match, or k > n.
    """

    def __init__(self, settings: ProbeSettings, module: nn.Module, ranks: Ranks | None = None) -> None:
        self.settings = settings
        self.ranks = Ranks() if ranks is None else ranks
        self.history = History()
        self.num_probes = 0
        self.self_check: SelfCheck | None = None
        self.notice: str | None = None
        self.examples = Examples(settings)
        self._refusal: str | None = None  # why the check lets nothing be measured
        self._choice = settings.choice
        self._choice.require_no_obstacle(module)
        self.partition = self._partition_of(module)
        self._previous: Tensor | None = None
        self._reference: Tensor | None = None
        self._resumed, self.overlaps = Resumed(), OverlapHistory()

    @property
    def space(self) -> ParameterSpace:
        """The present parameter space."""
        return self.partition.space

    def check(self, module: nn.Module, sample: Sample) -> SelfCheck:
        """Make the self-check on a few examples, and follow it. A collective.

        Without second derivatives, or where they are wrong and the settings say so, finite differences take over.

        Raises:
            CheckError: when it has not passed, with `on_check_fail="raise"`, or where nothing else would do.
        """

        def checked(left: Sample) -> tuple[SelfCheck, CurvatureConfig, str | None]:
            result = self._choice.check(module, left, self.partition)
            try:
                choice, notice = self._choice.follow(result, module, left, self.partition)
                if not self.settings.measures_without_products:
                    require_products(self._choice.has_products, choice.has_products, choice.on_check_fail, notice)
            except CheckError as error:
                self.self_check, self._refusal = result, str(error)
                raise
            return result, self.examples.prepared(choice, module, left, self.partition), notice

        args = Sample(sample.hessian), self._choice, module, self.partition
        result, choice, notice = self.examples.screened(checked, *args)
        # Not before: after any other failure the check is still to be made.
        self._choice, self.notice, self.self_check, self._refusal = choice, notice, result, None
        return result

    def can_evaluate(self, module: nn.Module, sample: Sample) -> bool:
        """Whether the loss can be evaluated on these micro-batches. A collective."""
        return self.examples.can_be_evaluated(self._choice, module, sample, self.partition)

    def differ(self, module: nn.Module, one: Sample, other: Sample) -> bool:
        """Whether the losses of two samples differ. A collective."""
        return self.examples.differ(self._choice, module, one, other, self.partition)

    def refresh_parameters(self, module: nn.Module) -> bool:
        """Start overlaps anew if the trainable parameters changed; whether they did."""
        with self.ranks.agree():
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
        """Take a probe of the module, which is left unchanged. A collective.

        A failure on one rank fails on all of them, and leaves everything as it was.

        Raises:
            CheckError: when the self-check has let nothing be measured; it is not made again.
            PeerError: when it went wrong on another rank.
        """
        if self._refusal is not None:
            raise CheckError(self._refusal)

        def take(left: Sample) -> tuple[Tensor, Probe, Record, tuple[Tensor, dict[int, float]] | None]:
            require_equal(dict(zip(self.space.names, self.space.tensors(module), strict=True)), self.ranks)
            theta = self.partition.point(module)
            probe, record = self._take(module, left, step, optimizer, on_matvec)
            record = self._resumed.complete(self.examples.counted(record))
            return theta, probe, record, self._prepared(record)

        args = self.examples.drawn(sample), self._choice, module, self.partition
        theta, probe, record, kept = self.examples.screened(take, *args)
        # What changes from here on cannot fail on one rank and not on another.
        self.num_probes, self._resumed = self.num_probes + 1, self._resumed.after(record)
        before, self._choice = self._choice, self._choice.after_solve(record.subspace)
        self.examples.remark_on(before.remark, self._choice.remark, by_cause=probe.remarks)
        if kept is not None:
            self._remember(record, *kept)
        return OpenRecord(ended(probe), record, theta, before)

    def close(self, opened: OpenRecord, module: nn.Module | None = None) -> Record:
        """Add a record to the history.

        Args:
            opened: the record.
            module: after the optimizer step from the record's point; None when no step was taken.
        """
        record = opened.record
        if module is not None:
            with self.ranks.agree():
                record = record.with_found(self._after_step(opened, module))
        self.history.keep(record)
        return self.history[-1]

    def rebind(self, ranks: Ranks) -> None:
        """Continue in a new process group of as many ranks."""
        self.ranks, self.partition = ranks, replace(self.partition, ranks=ranks)

    def state(self, position: Position, opened: OpenRecord | None = None) -> RunState:
        """The state that `resumed` continues from, without eigenvectors."""
        return RunState(
            k=self.settings.k,
            which=self.settings.which,
            space=self.space,
            num_probes=self.num_probes,
            records=(*self.history, *([] if opened is None else [opened.record.without_eigenvectors()])),
            is_open=opened is not None,
            overlaps=copy.copy(self.overlaps),
            position=position,
        )

    def resumed(self, state: RunState, *, reopen: bool = False) -> tuple[ProbeRun, bool]:
        """A copy of this run that continues from a state.

        Args:
            state: of a run with the same k and end of the spectrum.
            reopen: whether an open record is taken again; otherwise it is kept without the numbers of its step.

        Returns:
            The other one, and whether it awaits that a record is taken again.
        """
        other, records, reopened = copy.copy(self), History(state.records), None
        overlaps = copy.copy(state.overlaps)
        if state.is_open and reopen:
            reopened = records.pop()
            if reopened.step in overlaps.sketches:
                overlaps.forget(reopened.step)
        held = overlaps.sketches
        previous = list(held.values())[-1] if held else None
        reference = None if overlaps.reference_step is None else held[overlaps.reference_step]
        # Where the module has other parameters now, the next probe finds out, and starts the overlaps anew.
        if state.space != self.space:
            other.partition = Partition.even(state.space, self.ranks)
        # Sketches of small spaces are the eigenvectors themselves.
        other._previous, other._reference = (
            None if sketch is None or not sketch.exact else other.partition.cut(sketch.basis)
            for sketch in (previous, reference)
        )
        other._resumed = Resumed(previous, reference, reopened)
        other.overlaps, other.history = overlaps, records
        other.num_probes = state.num_probes - (reopened is not None)
        return other, reopened is not None

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
        verify = self.ranks.broadcast_object(is_verified(number, self.settings.verify, self.history))
        prepare(self.settings.taken, number, self.partition)
        require_room(self.settings.solver, self._choice, module, self.partition)
        with self._choice.loss(module, self.space, self.ranks) as loss:
            return take_probe(
                loss,
                sample,
                self.settings.solver,
                self.settings.taken,
                operator=self.examples.joining.operator(self._choice, self.examples.footprint),
                partition=self.partition,
                step=step,
                number=number,
                verify=verify,
                previous=self._previous,
                reference=self._reference,
                history=self.history,
                optimizer=optimizer,
                on_matvec=on_matvec,
                marks=dict(self._choice.marks),
            )

    def _after_step(self, opened: OpenRecord, module: nn.Module) -> Found:
        """What the measurements find in the step from an open record's point."""
        opened.failure.end()
        found: dict[str, Any] = {}
        probe, theta = opened.probe, opened.theta
        update = probe.partition.flatten(probe.space.tensors(module), like=theta).sub_(theta)
        probe = replace(probe, arrival=LossAfterStep(opened.choice, module, probe, theta, update))
        for measurement in self.settings.taken:
            if is_taken(measurement, probe.number, probe.subspace):
                found.update(measurement.after_step(probe, opened.gradient, update))
        return self.ranks.broadcast_object(as_numbers(found))  # wrong ones of any rank are noticed

    def _prepared(self, record: Record) -> tuple[Tensor, dict[int, float]] | None:
        """Basis and overlaps of a trusted subspace, for the probes to come."""
        if record.subspace is None or record.sketch is None:
            return None
        return record.subspace.basis.cpu(), self.overlaps.compare(record.sketch)

    def _remember(self, record: Record, basis: Tensor, overlaps: dict[int, float]) -> None:
        """Keep the basis and the sketch of a trusted subspace."""
        assert record.sketch is not None, "see `_prepared`"
        self._previous = basis
        due = self.settings.reference_step is not None and record.step >= self.settings.reference_step
        if due and self.overlaps.reference_step is None:
            self._reference = self._previous
            self.overlaps.reference_step = record.step
        self.history.drop_sketch(self.overlaps.add(record.step, record.sketch, overlaps))

    def _partition_of(self, module: nn.Module) -> Partition:
        """The coordinates of the probes to come."""
        space = ParameterSpace.of(module, self.settings.params)
        checked_k(self.settings.solver.k, space)
        self.settings.require_measurable(space)
        return Partition.of(space, module, self.ranks)

    def _start_overlaps(self) -> None:
        """Forget the spaces of earlier probes."""
        for step in self.overlaps.steps:
            self.history.drop_sketch(step)
        self.overlaps, self._resumed = OverlapHistory(), Resumed()
        self._previous = self._reference = None
