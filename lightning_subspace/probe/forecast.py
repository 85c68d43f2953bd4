"""Forecast of what a probe costs, told during the first one.

A probe may take as long as hundreds of training steps. So the first one tells, as soon as a few Hessian products have
shown how long one takes, how many seconds it will take, how many a later one, and what memory is held.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from lightning_subspace.measurements import Measurement
from lightning_subspace.measurements.base import Prospect
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import in_words
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.probe.verification import is_scheduled

# What a forecast is made of: at most so many products, or as many as take so long.
ENOUGH_PRODUCTS, ENOUGH_SECONDS = 10, 5.0
LATER = 10  # probes that the mean is taken over, so that it has what is taken at every fifth or tenth


class Forecast:
    """Forecast of this probe's cost and a later one's, from few products.

    Args:
        settings: of the probe.
        prospect: what a measurement may base its expectation on.
        partition: how vectors are dealt to ranks.
        max_overhead: the budget, as `Schedule` has it.
    """

    def __init__(
        self, settings: ProbeSettings, prospect: Prospect, partition: Partition, max_overhead: float | None
    ) -> None:
        self._settings = settings
        self._prospect = prospect
        self._partition = partition
        self._max_overhead = max_overhead
        self._times = [time.monotonic()]

    def see(self, count: int) -> str | None:
        """Count a product; the forecast in one sentence once there is one."""
        times = self._times
        times.append(time.monotonic())
        if not is_enough(count, self._settings.k, times[-1] - times[1]):
            return None
        # Up to the first product, and the mean of those behind it: between ranks they vary.
        begun, product = times[1] - times[0], (times[-1] - times[1]) / (count - 1)
        try:
            first, later = (begun + product * n for n in expected_products(self._settings, self._prospect))
        except Exception as error:  # of a measurement, which may be right in all that it measures
            return f"no forecast, a measurement cannot tell what it takes: {in_words(error)}"
        return forecast(
            n=self._partition.n,
            k=self._settings.k,
            ncv=self._settings.ncv,
            seconds=later,
            first=first,
            held=self._prospect.sample.nbytes,
            max_overhead=self._max_overhead,
            num_ranks=self._partition.ranks.count,
        )


def is_enough(count: int, k: int, seconds: float) -> bool:
    """Whether so many products are enough for a forecast.

    Ten are, or k where that is less, or two if those behind the first took long (`seconds`).
    """
    return count >= 2 and (count >= min(k, ENOUGH_PRODUCTS) or seconds >= ENOUGH_SECONDS)


def expected_products(settings: ProbeSettings, prospect: Prospect) -> tuple[float, float]:
    """The expected products of this probe, and the mean of later ones.

    Raises:
        TypeError: when a measurement returns no number.
    """

    def of(number: int) -> float:
        then = replace(prospect, number=number)
        own = then.solve(verify=is_scheduled(number, settings.verify))
        return own + sum(_products_of(m, then) for m in settings.taken if m.is_due(number))

    later = range(prospect.number + 1, prospect.number + 1 + LATER)
    return of(prospect.number), statistics.fmean(map(of, later))


def _products_of(measurement: Measurement, prospect: Prospect) -> float:
    found = measurement.expected_products(prospect)
    if not isinstance(found, (int, float)):
        raise TypeError(f"{type(measurement).__name__}.expected_products: expected a number, got {found!r}")
    return found


def forecast(
    *,
    n: int,
    k: int,
    ncv: int | None,
    seconds: float,
    first: float,
    held: int,
    max_overhead: float | None,
    num_ranks: int = 1,
) -> str:
    """One sentence on what a probe will cost.

    Args:
        n: number of parameters.
        k: number of eigenpairs.
        ncv: number of basis vectors held; None for the solver's default.
        seconds: expected for one probe.
        first: expected for the first one, with all that it checks.
        held: bytes of the examples in the sample.
        max_overhead: the budget.
        num_ranks: processes that share basis and examples.

    Example:
        >>> forecast(n=1_930, k=10, ncv=None, seconds=0.5, first=1.5, held=460_000, max_overhead=None)
        'n = 1,930, k = 10: about 0.50 s a probe, 1.50 s the first, 0.2 MB of basis, 0.5 MB of examples; as scheduled'
    """
    vectors = min(n, 2 * k + 10 if ncv is None else ncv) + 1
    pace = "as scheduled"
    if max_overhead is not None:
        pace = f"at most one every {seconds / max_overhead:.1f} s (max_overhead={max_overhead})"
    memory = f"{vectors * -(-n // num_ranks) * 4 / 1e6:.1f} MB of basis, {held / 1e6:.1f} MB of examples"
    if num_ranks > 1:
        memory += f" on each of {num_ranks} ranks"
    return f"n = {n:,}, k = {k}: about {seconds:.2f} s a probe, {first:.2f} s the first, {memory}; {pace}"
