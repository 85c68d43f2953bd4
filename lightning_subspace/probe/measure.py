"""One measurement, from batches to numbers, without a Trainer.

    batches -> loss(theta) -> v |-> Hv -> Lanczos -> Subspace -> measurements

A number is reported only when it can be stood behind. Eigenvalues need a converged solver; fractions and overlaps need,
beyond that, a gap behind the k-th eigenvalue that is wide against the residuals (`Subspace.trusted`). What is left out
is missing from the record's metrics; the solver's own numbers say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_subspace.curvature import CurvatureConfig, NoProductsError, Operator
from lightning_subspace.curvature.consequence import require_products
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import Weight
from lightning_subspace.data.sample import Sample
from lightning_subspace.linalg.selection import Which
from lightning_subspace.loss.bare import bare_module, bare_optimizer
from lightning_subspace.loss.loss_function import LossFunction
from lightning_subspace.loss.mode import Mode
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.memory import declares_memory, take_over
from lightning_subspace.measurements.sample_loss import known_losses
from lightning_subspace.measurements.spectrum import solver_metrics
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.probe.another import another_operator, prepare
from lightning_subspace.probe.arguments import (
    check_given,
    checked_k,
    ranks_of_group,
    require_the_same,
    require_word,
    trusted_basis,
)
from lightning_subspace.probe.gradient_pass import begin_tally, gradient_over, gradients_by_batch
from lightning_subspace.probe.joining import Joining
from lightning_subspace.probe.room import require_room
from lightning_subspace.probe.screening import Screening
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.state.notice import LOG, warn
from lightning_subspace.state.signals import waiting_signals
from lightning_subspace.subspace.record import Record, as_numbers
from lightning_subspace.subspace.sketch import sketch
from lightning_subspace.subspace.solver import Solver
from lightning_subspace.subspace.subspace import Subspace


@waiting_signals()  # a handler may talk to the other ranks: not before all have left
def measure_subspace(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    k: int = 10,
    tol: float = 1e-3,
    verify: Literal["always", "never"] = "always",
    which: Which = "LA",
    ncv: int | None = None,
    basis: str = "auto",
    max_matvecs: int = 200,
    loss_fn: LossFunction | None = None,
    weight: Weight | None = None,
    params: Sequence[str] | None = None,
    mode: Mode = "train",
    measurements: Sequence[Measurement] = (),
    optimizer: Optimizer | None = None,
    previous: Record | None = None,
    dtype: str | torch.dtype = "float32",
    curvature: str = "hessian",
    on_check_fail: str = "warn",
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Record:
    """Measure the top eigenspace of the Hessian and the gradient in it.

    Args:
        module: a LightningModule, or any module together with `loss_fn`. Of one from `fabric.setup`, `torch.compile` or
            DDP the module inside is measured, and `loss_fn` gets that one.
        batches: the whole sample: a list of batches, of (batch, weight) pairs, or a loader.
        k: number of eigenpairs; 0 takes one Hessian product instead and gives only the numbers along the gradient.
        tol: residual of every wanted pair over the largest |eigenvalue|.
        verify: "always" excludes missed copies of equal eigenvalues, for a third to a half more products.
        which: "LA" the algebraically largest (the paper's "top"), "SA" smallest, "LM" largest in magnitude, "BE" half
            from each end.
        ncv: largest number of basis vectors; by default min(n, 2k + 10), or what fits, at least k + 5.
        basis: see `SubspaceMonitor`.
        max_matvecs: Hessian products at most.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`, by default the module's `training_step`.
        weight: share of a batch in the mean loss, by default its number of examples.
        params: shell-style patterns of the parameters to differentiate by, by default all trainable ones.
        mode: "train" or "eval" mode of the module.
        measurements: more measurements, beside the default ones.
        optimizer: for `sharpness_over_threshold`.
        previous: an earlier record of the same module, perhaps of another k, for `overlap_previous` and a warm start.
        dtype: narrowest type computed in, "float32" or "float64"; parameters of a wider one keep it. "native" takes the
            loss as it is trained, with its types and autocast.
        curvature: see `SubspaceMonitor`.
        on_check_fail: where the second derivatives turn out wrong: "warn", "raise", "omit" what rests on them, or go on
            by "finite-difference".
        seed: of dropout masks and of the start vector, 0 to 2**63 - 1.
        group: the processes of torch.distributed that measure together, all of which call this with the same module and
            batches: they share the work and the memory. None: this process alone.

    Returns:
        A `Record` at step 0 whose subspace holds the eigenvectors, under `group` dealt to ranks: `subspace.gather()`.

    Raises:
        LossError: when the loss is not a finite scalar that depends on the parameters.
        SampleError: for an empty or an unweighable sample.
        ValueError: for an argument of a wrong type or out of range, which is named, with what was expected; a module
            without trainable parameters; a `previous` over other parameters or without its eigenvectors; FSDP1; or
            Fabric's own module with dtype="native".
        TypeError: for a module without a training step, where there is no `loss_fn`.
        CheckError: with `on_check_fail="raise"`; where no product can be had, as "ggn" without its derivatives.
        NoRoomError: a `MemoryError`, where the basis would not fit, with what is needed and what is free.
        PeerError: when something of this went wrong on another rank.
        SignalError: when a signal with a handler of Python's, other than SIGINT, has arrived; the handler has run.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Linear(4, 3)
        >>> batch = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> loss_fn = lambda module, batch, batch_idx: nn.functional.cross_entropy(module(batch[0]), batch[1])
        >>> record = measure_subspace(net, [batch], k=2, loss_fn=loss_fn)
        >>> record.subspace.outcome.name, tuple(record.subspace.eigenvectors.shape)
        ('CONVERGED', (2, 15))
    """
    ranks = ranks_of_group(group, module)
    with ranks.agree():
        optimizer = bare_optimizer(optimizer)
        check_given(module, batches, measurements, optimizer, previous)
        require_word("verify", verify, ("always", "never"))
        dtype = str(dtype).removeprefix("torch.")
        module = bare_module(module, dtype)
        settings = ProbeSettings.of(locals())
        solver, choice, chosen = settings.solver, settings.choice, settings.taken
        space = ParameterSpace.of(module, settings.params)
        checked_k(solver.k, space, settings.ncv)
        settings.require_measurable(space)
        require_the_same(ranks, module, (solver, replace(choice, loss_fn=None), space, verify, len(chosen)))
        sample = sample_of_batches(batches, weight, ranks)
        partition = Partition.of(space, module, ranks)
        start = trusted_basis(previous, partition)
    take_over(filter(declares_memory, chosen), object())
    screening, joining = Screening(), Joining()

    def checked(left: Sample) -> tuple[CurvatureConfig, str | None]:
        found, notice = choice.follow(choice.check(module, left, partition), module, left, partition)
        require_products(choice.has_products, found.has_products, choice.on_check_fail, notice)
        return joining.begin(found, module, left, partition), notice

    def taken(left: Sample) -> tuple[Record, dict[str, str]]:
        prepare(chosen, 0, partition)
        require_room(solver, choice, module, partition)
        with choice.loss(module, space, ranks) as loss:
            probe, record = take_probe(
                loss,
                left,
                solver,
                chosen,
                operator=joining.operator(choice, screening.footprint),
                partition=partition,
                verify=verify == "always",
                optimizer=optimizer,
                previous=start,
                marks=dict(choice.marks),
            )
        return screening.counted(record), probe.remarks

    choice, notice = screening.run(checked, sample, lambda: choice.loss(module, space, ranks), ranks)
    with ranks.agree():
        if notice is not None:
            warn(notice, stacklevel=3)
    record, remarks = joining.run(ranks, screening.run, taken, sample, lambda: choice.loss(module, space, ranks), ranks)
    with ranks.agree():
        if screening.notice is not None:
            warn(screening.notice, stacklevel=3)
        texts = settings.without_effect, screening.footprint.notice, joining.remark, choice.remark
        for text in filter(None, (*texts, *(remarks.values() if ranks.index == 0 else ()))):
            LOG.info(text)
    return record


def take_probe(
    loss: TrainingLoss,
    sample: Sample,
    solver: Solver,
    measurements: Iterable[Measurement],
    *,
    operator: Callable[[TrainingLoss, Sample, Partition], Operator] | None = None,
    partition: Partition | None = None,
    step: int = 0,
    number: int = 0,
    verify: bool = True,
    previous: Tensor | None = None,
    reference: Tensor | None = None,
    history: Sequence[Record] = (),
    optimizer: Optimizer | None = None,
    on_matvec: Callable[[int, float], None] | None = None,
    marks: Mapping[str, float] | None = None,
) -> tuple[Probe, Record]:
    """Take every measurement at the parameters of an open loss.

    A collective of the ranks that `partition` deals to; None: of this process alone. `operator` makes the operator, by
    default the exact Hessian. `marks` are metrics that say what the self-check has found.

    Returns:
        The probe, which `Measurement.after_step` gets later, and its record, whose subspace holds the eigenvectors.
    """
    partition = Partition.even(loss.space) if partition is None else partition
    due = [measurement for measurement in measurements if measurement.is_due(number)]
    tally = begin_tally(loss, sample) if any(measurement.tallies for measurement in due) else None
    make = CurvatureConfig().operator if operator is None else operator
    hessian = make(loss, sample, partition)
    own = hessian.gradient()
    gradient = gradient_over(hessian, own, sample)
    losses = known_losses(loss, sample, partition.ranks)  # now, before single examples or parts are evaluated
    subspace = None
    if solver.k > 0 and hessian.has_products:
        subspace = solver.solve(hessian, start=previous, verify=verify, on_matvec=on_matvec)

    def solve(matvec: Operator | Callable[[Tensor], Tensor], k: int | None = None) -> Subspace:
        start = subspace.eigenvectors if subspace is not None and subspace.converged else None
        asked = solver if k is None else replace(solver, k=positive("k", k), ncv=None)
        if isinstance(matvec, Operator):
            return asked.solve(matvec, start=start, verify=False)
        if not callable(matvec):
            raise TypeError(
                "matvec: expected a function v -> A v, or a part of the probe's operator, got an object of type "
                f"{type(matvec).__name__}; pass its method."
            )
        return asked.solve(hessian, matvec, start=start, verify=False)

    probe = Probe(
        step=step,
        number=number,
        partition=partition,
        gradient=gradient,
        operator=hessian,
        parameters=loss.originals,
        sample=sample,
        batch_gradients=partial(gradients_by_batch, hessian, sample),
        another=partial(another_operator, loss, hessian, make),
        subspace=subspace,
        previous=previous,
        reference=reference,
        history=history,
        optimizer=optimizer,
        which=solver.which,
        solve=solve,
        losses=losses,
        sample_gradient=own,
        tally=tally,
    )
    found: dict[str, Any] = {**(marks or {}), **({} if subspace is None else solver_metrics(subspace))}
    if sample.filled is not None:
        found["solver/sample_filled"] = sample.filled
    for measurement in due:
        if is_taken(measurement, number, subspace):
            with suppress(NoProductsError):
                found.update(measurement.measure(probe))
    image = sketch(subspace.basis, partition) if subspace is not None and subspace.trusted else None
    return probe, Record(step, {}, subspace, image).with_found(partition.ranks.broadcast_object(as_numbers(found)))


def is_taken(measurement: Measurement, number: int, subspace: Subspace | None) -> bool:
    """Whether the measurement is due and the eigenpairs are good enough."""
    is_good_enough = {
        Needs.NOTHING: True,
        Needs.EIGENVALUES: subspace is not None and subspace.converged,
        Needs.SUBSPACE: subspace is not None and subspace.trusted,
    }
    return measurement.is_due(number) and is_good_enough[measurement.needs]
