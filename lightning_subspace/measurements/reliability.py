"""An error bar for the gradient fraction, from the two halves of the sample."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_subspace.measurements.measurement import Measurement, Probe
from lightning_subspace.subspace import fraction


class Reliability(Measurement):
    """`reliability`, `reliability_upper`: the band in which the gradient fraction of the whole training set is expected.

    The sample is cut into its even and its odd micro-batches. `reliability` is the share of one half's gradient in the
    top space of the *other* half: nothing is fitted and judged on the same examples, so what is left is what both
    halves agree on. With half the examples it is pessimistic. `reliability_upper` extrapolates: noise in the gradient
    and in the space adds to 1/f a term proportional to 1/(number of examples), so 1/f of the whole training set is
    about 2/f(sample) - 1/f(half); it is capped at 1 and never below the fraction itself.

    Costs one eigensolve on half of the sample; taken at the first probe and every fifth. Left out when the sample is a
    single micro-batch.

    Args:
        every: take it at each probe whose number is a multiple of this.
    """

    def __init__(self, every: int = 5) -> None:
        if every < 1:
            raise ValueError(f"every: expected a positive number of probes, got {every}.")
        self.every = every

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One eigensolve and one pass over half of the sample."""
        count = len(probe.operator.batches)
        if probe.number % self.every or count < 2:
            return {}
        fitted, judged = probe.operator.part(range(0, count, 2)), probe.operator.part(range(1, count, 2))
        half = probe.solve(fitted.matvec)
        if not half.converged:
            return {}
        lower = fraction(half.basis, judged.gradient())
        whole = fraction(probe.top.basis, probe.operator.gradient())
        reciprocal = 2.0 / whole - 1.0 / lower if whole > 0.0 and lower > 0.0 else 0.0
        upper = 1.0 / reciprocal if reciprocal > 1.0 else 1.0
        return {"reliability": lower, "reliability_upper": max(upper, whole, lower)}
