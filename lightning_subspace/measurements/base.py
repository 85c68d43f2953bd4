"""What a measurement gets to see, and what it has to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_subspace.curvature import Operator
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.solver import Solver
from lightning_subspace.subspace.subspace import Subspace, inner_products


class Needs(Enum):
    """How good the eigenpairs must be for a measurement to be taken."""

    NOTHING = "no eigenpairs"
    EIGENVALUES = "converged eigenvalues"
    SUBSPACE = "a converged subspace whose subspace_error is at most 0.1"


class Solve(Protocol):
    """See `Probe.solve`."""

    def __call__(self, matvec: Operator | Callable[[Tensor], Tensor], k: int | None = None) -> Subspace:
        """The eigenspace of `matvec`, of the probe's k by default."""
        ...


@dataclass(frozen=True)
class Prospect:
    """What is known of a probe to come, from which a measurement tells what it will cost.

    Attributes:
        number: how many probes the run will have had before.
        solver: the settings of the eigensolver.
        sample: the micro-batches.
        optimizer: the optimizer in use; None with several.
        num_ranks: the processes that measure together.

    Example:
        >>> class Steepest(Measurement):
        ...     def expected_products(self, prospect):
        ...         return prospect.solve(k=1)
        ...     def measure(self, probe):
        ...         return {"steepest": float(probe.solve(probe.operator, k=1).eigenvalues[0])}
    """

    number: int
    solver: Solver
    sample: Sample
    optimizer: Optimizer | None = None
    num_ranks: int = 1

    def solve(self, k: int | None = None, *, verify: bool = False) -> float:
        """Products that `Probe.solve` will probably take; with `verify` those of a solve with the certificate."""
        solver = self.solver if k is None else replace(self.solver, k=k)
        return solver.expected_products(trained=self.number > 0, verify=verify)


@dataclass(frozen=True)
class Probe:
    """One look at theta_t.

    Under ranks every rank measures, and flat vectors are this rank's part of them: n below is `partition.local_n`.
    `dot`, `norm`, `Subspace.fraction` and `Subspace.overlap` sum over ranks, `partition.gather` gives a whole vector.
    They and `operator` are collectives: every rank has to come to them. What the first rank returns is recorded, on all
    of them. Write files on the first rank alone, where `partition.ranks.index` is 0.

    Attributes:
        step: t, the number of optimizer steps taken.
        number: how many probes this run has had before.
        partition: how the coordinates are dealt to ranks.
        gradient: (n,), of the mean loss over the gradient sample.
        operator: the Hessian of the mean loss over the Hessian sample: `matvec`, `gradient`, `value`, `part`. It can be
            used only while the probe lasts, not in `after_step`.
        parameters: the module's own tensors at the coordinates of the space, as `optimizer` knows them; not to be
            written to.
        sample: the micro-batches, and how much of the training set they are.
        batch_gradients: goes over the gradient sample once more: each micro-batch with the gradient of its own mean
            loss, (n,). Only while the probe lasts.
        subspace: the top eigenspace; None for k = 0.
        previous: (k, n), the eigenvectors of the last probe that had a trusted subspace; None at the first.
        reference: (k, n), those of `reference_step`; None before it.
        history: the records so far, oldest first.
        optimizer: the optimizer in use; None without a Trainer or with several.
        which: the end of the spectrum that `subspace` belongs to, "LA" for the algebraically largest.
        solve: run the probe's eigensolver on a function v -> A v, or on another operator of the same parameters (a
            `part`), optionally with another `k=`; without the certificate. An operator takes fewer messages between
            ranks, which need not compare notes in it.
    """

    step: int
    number: int
    partition: Partition
    gradient: Tensor
    operator: Operator
    parameters: tuple[Tensor, ...]
    sample: Sample
    batch_gradients: Callable[[], Iterator[tuple[MicroBatch, Tensor]]]
    subspace: Subspace | None
    previous: Tensor | None
    reference: Tensor | None
    history: Sequence[Record]
    optimizer: Optimizer | None
    which: str
    solve: Solve

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes behind the coordinates."""
        return self.partition.space

    @property
    def top(self) -> Subspace:
        """The subspace, for measurements that need one.

        Raises:
            ValueError: for k = 0.
        """
        if self.subspace is None:
            raise ValueError("this probe has no subspace (k = 0); set `needs = Needs.SUBSPACE` on the measurement.")
        return self.subspace

    def dot(
        self,
        a: Tensor,  # (n,)
        b: Tensor,  # (n,)
    ) -> float:
        """Inner product of two flat vectors over all ranks, in float64."""
        return float(inner_products(a[None], b[None], self.partition.ranks))

    def norm(
        self,
        vector: Tensor,  # (n,)
    ) -> float:
        """Length of a flat vector over all ranks, in float64."""
        return math.sqrt(self.dot(vector, vector))


def checked_measurements(measurements: Iterable[Any]) -> list[Measurement]:
    """The measurements, or an error that names the one that is none.

    Raises:
        TypeError: for anything but instances of `Measurement`.
        ValueError: for one whose `every` is not a positive integer.
    """
    found = list(measurements)
    for item in found:
        if not isinstance(item, Measurement):
            raise TypeError(f"measurements: expected instances of lightning_subspace.Measurement, got {item!r}.")
        positive(f"{type(item).__name__}.every", item.every)
    return found


def positive(name: str, value: int) -> int:
    """A positive integer, or an error that names it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}.")
    return value


class Measurement:
    """Base of all measurements; override `measure`, and `after_step` for what the next step decides.

    Where `measure` takes products, `expected_products` tells the forecast how many. Keys are logged behind the name of
    the monitor. A nan means "not defined here" and is left out.

    Attributes:
        needs: the measurement is skipped at probes whose eigenpairs are worse than this.
        every: it is taken at each probe whose number is a multiple of this, and thus at the first of a run.

    Example:
        >>> class GradientNorm(Measurement):
        ...     needs = Needs.NOTHING
        ...     def measure(self, probe):
        ...         return {"gradient_norm": probe.norm(probe.gradient)}
    """

    needs: ClassVar[Needs] = Needs.SUBSPACE
    every: int = 1

    def is_due(self, number: int) -> bool:
        """Whether it is taken at the probe of this number; at others no other method is called."""
        return number % self.every == 0

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Numbers known at theta_t."""
        return {}

    def expected_products(self, prospect: Prospect) -> float:
        """About how many products with the Hessian of the whole sample `measure` will take; for the forecast."""
        return 0.0

    def after_step(
        self,
        probe: Probe,
        gradient: Tensor | None,  # (n,)
        update: Tensor,  # (n,)
    ) -> Mapping[str, float]:
        """Numbers that need the optimizer step taken from theta_t.

        Args:
            probe: the probe; its operator can no longer be used.
            gradient: the mini-batch gradient of the step, accumulated and before clipping (times the loss scale under
                a GradScaler); None where the optimizer hook did not see it.
            update: theta_{t+1} - theta_t.
        """
        return {}
