"""One measurement, from batches to numbers: `measure_subspace` needs no Trainer.

    batches -> loss(theta) -> v |-> Hv -> Lanczos -> Subspace -> measurements

A number is reported only when it can be stood behind. Eigenvalues need a converged solver; fractions and overlaps need,
beyond that, a gap behind the k-th eigenvalue that is wide against the residuals (`Subspace.trusted`). What is left out
is missing from the record's metrics; the solver's own numbers say why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_subspace.curvature import CheckOutcome, Hessian, SelfCheck, mean_gradient, self_check
from lightning_subspace.linalg import eigsh
from lightning_subspace.measurements import Measurement, Probe, default_measurements
from lightning_subspace.measurements.measurement import Needs
from lightning_subspace.measurements.solver import solver_metrics
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.record import Record
from lightning_subspace.sample import Sample, Weight, few_examples, sample_of_batches
from lightning_subspace.sketch import sketch
from lightning_subspace.subspace import Subspace
from lightning_subspace.training_loss import LossError, LossFunction, MicroBatch, Mode, TrainingLoss

Which = Literal["LA", "SA", "LM", "BE"]
# Examples in the float64 self-check: the code path is the same for eight as for a thousand.
CHECKED_EXAMPLES = 8


@dataclass(frozen=True)
class Solver:
    """How the eigenpairs are computed; see `lightning_subspace.linalg.eigsh` for the arguments."""

    k: int = 10
    which: Which = "LA"
    tol: float = 1e-3
    ncv: int | None = None
    max_matvecs: int = 200
    seed: int = 0

    def solve(
        self,
        operator: Hessian,
        matvec: Callable[[Tensor], Tensor],
        *,
        start: Tensor | None = None,  # (k, n)
        verify: bool = True,
        on_matvec: Callable[[int, float], None] | None = None,
    ) -> Subspace:
        """The eigenspace of `matvec`.

        Args:
            operator: gives dimension, dtype and device.
            matvec: its product, or that of a part of it.
            start: eigenvectors of a nearby operator; their sum plus a random vector is the start, which saves a few
                products. Never the gradient: an unconverged space would then contain it.
            verify: exclude missed copies of equal eigenvalues.
            on_matvec: called with (number of products, worst relative residual).
        """
        return Subspace.of(
            eigsh(
                matvec,
                operator.n,
                self.k,
                which=self.which,
                tol=self.tol,
                ncv=self.ncv,
                max_matvecs=self.max_matvecs,
                v0=None if start is None else self._warm_start(operator, start),
                verify="always" if verify else "never",
                seed=self.seed,
                dtype=operator.dtype,
                device=operator.device,
                on_matvec=on_matvec,
            )
        )

    def _warm_start(self, operator: Hessian, vectors: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        noise = torch.randn(operator.n, generator=generator, dtype=operator.dtype).to(operator.device)
        total = vectors.sum(dim=0).to(noise)
        start: Tensor = total / total.norm() + noise / noise.norm()
        return start


def measure_subspace(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    k: int = 10,
    tol: float = 1e-3,
    verify: Literal["always", "never"] = "always",
    which: Which = "LA",
    ncv: int | None = None,
    max_matvecs: int = 200,
    loss_fn: LossFunction | None = None,
    weight: Weight | None = None,
    params: Sequence[str] | None = None,
    mode: Mode = "train",
    measurements: Sequence[Measurement] = (),
    optimizer: Optimizer | None = None,
    previous: Record | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Record:
    """Measure the top eigenspace of the Hessian of the training loss, and the gradient's share in it.

    Args:
        module: a LightningModule, or any module together with `loss_fn`.
        batches: the whole sample: a list of batches, of (batch, weight) pairs, or a loader.
        k: number of eigenpairs; 0 takes one Hessian product instead and gives only the numbers along the gradient.
        tol: residual of every wanted pair over the largest |eigenvalue|.
        verify: "always" excludes missed copies of equal eigenvalues, for 4 to 13 more products.
        which: "LA" the algebraically largest (the paper's "top"), "SA" smallest, "LM" largest in magnitude, "BE" half
            from each end.
        ncv: largest number of basis vectors; by default min(n, 2k + 10).
        max_matvecs: Hessian products at most.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`, by default the module's `training_step`.
        weight: share of a batch in the mean loss, by default its number of examples.
        params: shell-style patterns of the parameters to differentiate by, by default all trainable ones.
        mode: "train" or "eval" mode of the module.
        measurements: more measurements, beside the default ones.
        optimizer: for `sharpness_over_threshold`.
        previous: an earlier record of the same module, for `overlap_previous` and a warm start.
        dtype: narrowest type computed in; parameters of a wider one keep it.
        seed: of dropout masks and of the start vector.

    Returns:
        A `Record` at step 0 whose subspace holds the eigenvectors.

    Raises:
        LossError: when the loss is not a finite scalar that depends on the parameters.
        SampleError: for an empty or an unweighable sample.
        ValueError: for a module without trainable parameters, k outside 0..n, or a `previous` over other parameters or
            without its eigenvectors.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Linear(4, 3)
        >>> batch = (torch.randn(32, 4), torch.randint(3, (32,)))
        >>> def loss_fn(module, batch, batch_idx):
        ...     return nn.functional.cross_entropy(module(batch[0]), batch[1])
        >>> record = measure_subspace(net, [batch], k=2, loss_fn=loss_fn)
        >>> record.subspace.outcome.name, tuple(record.subspace.eigenvectors.shape)
        ('CONVERGED', (2, 15))
    """
    space = ParameterSpace.of(module, params)
    solver = Solver(checked_k(k, space), which, tol, ncv, max_matvecs, seed)
    sample = sample_of_batches(batches, weight)
    check = check_once(module, space, sample, loss_fn, mode=mode, seed=seed)
    if check.outcome is CheckOutcome.FAILED:
        warnings.warn(f"{check.outcome.value} Measured: {check.reason}.", stacklevel=2)
    with TrainingLoss(module, space, loss_fn, mode=mode, dtype=dtype, seed=seed) as loss:
        _, record = take_probe(
            loss,
            sample,
            solver,
            [*default_measurements(k), *measurements],
            verify=verify == "always",
            optimizer=optimizer,
            previous=_trusted_basis(previous, space),
        )
    return record


def take_probe(
    loss: TrainingLoss,
    sample: Sample,
    solver: Solver,
    measurements: Iterable[Measurement],
    *,
    step: int = 0,
    number: int = 0,
    verify: bool = True,
    previous: Tensor | None = None,
    reference: Tensor | None = None,
    history: Sequence[Record] = (),
    optimizer: Optimizer | None = None,
    on_matvec: Callable[[int, float], None] | None = None,
) -> tuple[Probe, Record]:
    """Take every measurement at the parameters of an open loss.

    Returns:
        The probe, which `Measurement.after_step` gets later, and its record, whose subspace holds the eigenvectors.
    """
    operator = Hessian(loss, sample.hessian)
    gradient = _gradient(loss, operator, sample)
    subspace = None
    if solver.k > 0:
        subspace = solver.solve(operator, operator.matvec, start=previous, verify=verify, on_matvec=on_matvec)

    def solve(matvec: Callable[[Tensor], Tensor], k: int | None = None) -> Subspace:
        start = subspace.eigenvectors if subspace is not None and subspace.converged else None
        asked = solver if k is None else replace(solver, k=k, ncv=None)
        return asked.solve(operator, matvec, start=start, verify=False)

    def batch_gradients() -> Iterator[tuple[MicroBatch, Tensor]]:
        yield from operator.batch_gradients()
        yield from ((batch, mean_gradient(loss, [batch])) for batch in sample.extra)

    probe = Probe(
        step=step,
        number=number,
        space=loss.space,
        gradient=gradient,
        operator=operator,
        sample=sample,
        batch_gradients=batch_gradients,
        subspace=subspace,
        previous=previous,
        reference=reference,
        history=history,
        optimizer=optimizer,
        which=solver.which,
        solve=solve,
    )
    metrics = {} if subspace is None else solver_metrics(subspace)
    for measurement in measurements:
        if is_measurable(measurement, subspace):
            metrics.update(measurement.measure(probe))
    trusted = subspace is not None and subspace.trusted
    image = sketch(subspace.basis, loss.space) if subspace is not None and trusted else None
    return probe, Record(step, finite(metrics), subspace, image)


def is_measurable(measurement: Measurement, subspace: Subspace | None) -> bool:
    """Whether the eigenpairs are good enough for this measurement."""
    match measurement.needs:
        case Needs.NOTHING:
            return True
        case Needs.EIGENVALUES:
            return subspace is not None and subspace.converged
        case Needs.SUBSPACE:
            return subspace is not None and subspace.trusted


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Drop what is not a finite number: it means "not defined here"."""
    return {key: float(value) for key, value in metrics.items() if math.isfinite(value)}


def check_once(
    module: nn.Module, space: ParameterSpace, sample: Sample, loss_fn: LossFunction | None, *, mode: Mode, seed: int
) -> SelfCheck:
    """The self-check on a few examples of the sample; on the whole batch where it cannot be cut."""
    loss = TrainingLoss(module, space, loss_fn, mode=mode, dtype=torch.float64, seed=seed)
    few = few_examples(sample.hessian[0], CHECKED_EXAMPLES)
    check = self_check(loss, few, seed=seed)
    if check.outcome is CheckOutcome.INCONCLUSIVE and few is not sample.hessian[0]:
        check = self_check(loss, sample.hessian[0], seed=seed)
    return check


def checked_k(k: int, space: ParameterSpace) -> int:
    """k, or an error that names it.

    Raises:
        ValueError: for k outside 0..n.
    """
    if not 0 <= k <= space.n:
        raise ValueError(f"k: expected 0..{space.n}, the number of parameters, got {k}.")
    return k


def _trusted_basis(previous: Record | None, space: ParameterSpace) -> Tensor | None:  # (k, n)
    """The eigenvectors of an earlier record; None where there are none to trust."""
    if previous is None or previous.subspace is None or not previous.subspace.trusted:
        return None
    basis = previous.subspace.basis
    if basis.shape[1] != space.n:
        raise ValueError(
            f"previous: expected a record over the same {space.n} parameters, got one over {basis.shape[1]}."
        )
    return basis


def _gradient(loss: TrainingLoss, operator: Hessian, sample: Sample) -> Tensor:
    """Gradient over the gradient sample, which continues the Hessian's."""
    gradient = operator.gradient()
    if sample.extra:
        first, rest = _weight(sample.hessian), _weight(sample.extra)
        gradient.mul_(first / (first + rest)).add_(mean_gradient(loss, sample.extra), alpha=rest / (first + rest))
    return gradient


def _weight(batches: Iterable[MicroBatch]) -> float:
    return sum(batch.weight for batch in batches)


__all__ = ["LossError", "Solver", "measure_subspace", "take_probe"]
