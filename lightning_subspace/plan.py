"""What a run measures at each probe, as the user has asked for it, and what that is expected to take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_subspace.loss_function import LossFunction
from lightning_subspace.measurements import Measurement
from lightning_subspace.measurements.measurement import Prospect
from lightning_subspace.solver import Solver
from lightning_subspace.training_loss import Mode

# Every tenth probe, beginning with the first, excludes missed copies of equal eigenvalues; and all those after one that
# found some, since a warm start does not remember them.
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

    def expected_products(self, prospect: Prospect) -> tuple[float, float]:
        """About how many products the probe will take, and on average one later on.

        Raises:
            TypeError: when a measurement tells something else than a number.
        """

        def of(number: int) -> float:
            then = replace(prospect, number=number)
            own = then.solve(verify=self.verifies(number))
            return own + sum(_expected_products(m, then) for m in self.measurements if m.is_due(number))

        later = range(prospect.number + 1, prospect.number + 1 + VERIFY_EVERY)
        return of(prospect.number), statistics.fmean(map(of, later))

    def verifies(self, number: int) -> bool:
        """Whether the probe of this number excludes missed copies, whatever was found before it."""
        return number % VERIFY_EVERY == 0

    def finds_the_space_of(self, other: Plan) -> bool:
        """Whether the two compute the same subspace, whatever they measure in it."""
        return replace(self, measurements=(), reference_step=None) == replace(
            other, measurements=(), reference_step=None
        )


def _expected_products(measurement: Measurement, prospect: Prospect) -> float:
    found = measurement.expected_products(prospect)
    if not isinstance(found, (int, float)):
        raise TypeError(f"{type(measurement).__name__}.expected_products: expected a number, got {found!r}.")
    return found
