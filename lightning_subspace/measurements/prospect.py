"""Facts known before a probe, for forecasts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.optim import Optimizer

from lightning_subspace._arguments import require_flag, require_integer
from lightning_subspace.data.sample import Sample
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.solver import Solver


@dataclass(frozen=True)
class Prospect:
    """Facts known before a probe, for `Measurement.expected_products`.

    Attributes:
        number: how many probes the run has had before.
        solver: the settings of the eigensolver.
        sample: the micro-batches.
        optimizer: the optimizer in use; None with several.
        num_ranks: number of processes that measure together.
        space: names and shapes of the parameters; None where they are not known.

    Example:
        >>> from lightning_subspace import Measurement
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
    space: ParameterSpace | None = None

    def solve(self, k: int | None = None, *, verify: bool = False) -> float:
        """Expected number of products of `Probe.solve`, or with its certificate (`verify`)."""
        require_integer("k", k, 1, optional=True)
        require_flag("verify", verify)
        solver = self.solver if k is None else replace(self.solver, k=k)
        return solver.expected_products(trained=self.number > 0, verify=verify)
