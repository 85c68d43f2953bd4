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

from lightning_subspace.curvature import Choice, Hessian, SelfCheck
from lightning_subspace.linalg import eigsh
from lightning_subspace.measurements import Measurement, Probe, default_measurements
from lightning_subspace.measurements.measurement import Needs, checked_measurements
from lightning_subspace.measurements.solver import solver_metrics
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.record import Record
from lightning_subspace.sample import Sample, Weight, sample_of_batches
from lightning_subspace.sketch import sketch
from lightning_subspace.subspace import Subspace
from lightning_subspace.training_loss import LossError, LossFunction, MicroBatch, Mode, TrainingLoss

Which = Literal["LA", "SA", "LM", "BE"]
# Beyond that an eigenvector has hardly begun to show.
MAX_TOL = 0.1


@dataclass(frozen=True)
class Solver:
    """How the eigenpairs are computed; see `lightning_subspace.linalg.eigsh` for the arguments."""

    k: int = 10
    which: Which = "LA"
    tol: float = 1e-3
    ncv: int | None = None
    max_matvecs: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.tol <= MAX_TOL:
            raise ValueError(f"tol: expected a number in (0, {MAX_TOL}], relative to lambda_1, got {self.tol!r}.")

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
    dtype: str | torch.dtype = "float32",
    curvature: str = "hessian",
    on_check_fail: str = "warn",
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
        dtype: narrowest type computed in, "float32" or "float64"; parameters of a wider one keep it. "native" takes the
            loss as it is trained, with its types and autocast.
        curvature: "hessian" (exact, by double backward) or "finite-difference" (of float64 gradients).
        on_check_fail: where the second derivatives turn out wrong: "warn", "raise" or go on by "finite-difference".
        seed: of dropout masks and of the start vector.

    Returns:
        A `Record` at step 0 whose subspace holds the eigenvectors.

    Raises:
        LossError: when the loss is not a finite scalar that depends on the parameters.
        SampleError: for an empty or an unweighable sample.
        ValueError: for a module without trainable parameters, k outside 0..n, a word that is not a choice, or a
            `previous` over other parameters or without its eigenvectors.
        CheckError: with `on_check_fail="raise"`.

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
    if verify not in ("always", "never"):
        raise ValueError(f"verify: expected 'always' or 'never', got {verify!r}.")
    chosen = [*default_measurements(k), *checked_measurements(measurements)]
    space = ParameterSpace.of(module, params)
    solver = Solver(checked_k(k, space), which, tol, ncv, max_matvecs, seed)
    sample = sample_of_batches(batches, weight)
    choice = Choice(loss_fn, mode, seed, dtype, curvature, on_check_fail)
    choice, notice = choice.after(check_once(choice, module, space, sample))
    if notice is not None:
        warnings.warn(notice, stacklevel=2)
    with choice.loss(module, space) as loss:
        _, record = take_probe(
            loss,
            sample,
            solver,
            chosen,
            operator=choice.operator,
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
    operator: Callable[[TrainingLoss, Sample], Hessian] | None = None,
    step: int = 0,
    number: int = 0,
    verify: bool = True,
    previous: Tensor | None = None,
    reference: Tensor | None = None,
    history: Sequence[Record] = (),
    optimizer: Optimizer | None = None,
    on_matvec: Callable[[int, float], None] | None = None,
) -> tuple[Probe, Record]:
    """Take every measurement at the parameters of an open loss; `operator` makes its Hessian, by default the exact one.

    Returns:
        The probe, which `Measurement.after_step` gets later, and its record, whose subspace holds the eigenvectors.
    """
    hessian = Hessian(loss, sample.hessian) if operator is None else operator(loss, sample)
    gradient = _gradient(hessian, sample)
    subspace = None
    if solver.k > 0:
        subspace = solver.solve(hessian, hessian.matvec, start=previous, verify=verify, on_matvec=on_matvec)

    def solve(matvec: Callable[[Tensor], Tensor], k: int | None = None) -> Subspace:
        start = subspace.eigenvectors if subspace is not None and subspace.converged else None
        asked = solver if k is None else replace(solver, k=k, ncv=None)
        return asked.solve(hessian, matvec, start=start, verify=False)

    def batch_gradients() -> Iterator[tuple[MicroBatch, Tensor]]:
        yield from hessian.batch_gradients()
        yield from ((batch, hessian.mean_gradient([batch])) for batch in sample.extra)

    probe = Probe(
        step=step,
        number=number,
        space=loss.space,
        gradient=gradient,
        operator=hessian,
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


def check_once(choice: Choice, module: nn.Module, space: ParameterSpace, sample: Sample) -> SelfCheck:
    """The self-check that goes before the first probe."""
    return choice.check(module, space, sample)


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


def _gradient(hessian: Hessian, sample: Sample) -> Tensor:
    """Gradient over the gradient sample, which continues the Hessian's."""
    gradient = hessian.gradient()
    if sample.extra:
        first, rest = _weight(sample.hessian), _weight(sample.extra)
        gradient.mul_(first / (first + rest)).add_(hessian.mean_gradient(sample.extra), alpha=rest / (first + rest))
    return gradient


def _weight(batches: Iterable[MicroBatch]) -> float:
    return sum(batch.weight for batch in batches)


__all__ = ["LossError", "Solver", "measure_subspace", "take_probe"]
