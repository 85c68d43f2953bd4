"""Forecast of what a probe costs, told during the first one.

A probe may take as long as hundreds of training steps. So the first one tells, as soon as a few Hessian products have
shown how long one takes, how many seconds it will take, how many a later one, and what memory is held. That is counted:
the copies of the module's state, the basis of the solver, the graphs that are kept, the examples.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch

from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.measurements import Measurement
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import in_words
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.probe.verification import is_scheduled
from lightning_subspace.state.peak_memory import PeakMemory
from lightning_subspace.subspace.room import VECTORS, Place, wanted_size

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
        footprint: what the operator of the probe holds.
        device: of the module.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        prospect: Prospect,
        partition: Partition,
        max_overhead: float | None,
        footprint: Footprint,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._prospect = prospect
        self._partition = partition
        self._max_overhead = max_overhead
        self._footprint = footprint
        self._peak = PeakMemory(device)
        self._times = [time.monotonic()]

    def see(self, count: int) -> str | None:
        """Count a product; the forecast in one sentence once there is one."""
        times = self._times = self._times[:count]  # those of a probe that begins again are forgotten
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
            seconds=later,
            first=first,
            memory=self._held(),
            max_overhead=self._max_overhead,
        )

    def _held(self) -> str:
        footprint, partition, solver = self._footprint, self._partition, self._settings.solver
        wanted = wanted_size(solver.k, solver.ncv, partition.n)
        basis = Place(wanted, wanted, "device") if footprint.basis is None else footprint.basis
        held = Held(
            copies=footprint.copies,
            basis=basis.rows * partition.local_n * footprint.itemsize,
            graphs=footprint.graphs,
            examples=self._prospect.sample.nbytes + footprint.joined,
            more=(solver.k + VECTORS) * partition.local_n * footprint.itemsize + footprint.of_product,
        )
        return held.text(footprint.kept, footprint.rounds, self._peak.text, partition.ranks.count, basis)


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


@dataclass(frozen=True)
class Held:
    """Bytes that a probe holds on one rank.

    Attributes:
        copies: of the module's parameters and buffers.
        basis: of the solver.
        graphs: that are kept.
        examples: of the sample, and of their copies in joined micro-batches.
        more: for a while, at most: the vectors around a solve, and what a product takes.

    Example:
        >>> held = Held(copies=8_000_000, basis=248_000_000, graphs=90_000_000, examples=500_000, more=166_000_000)
        >>> held.text(kept=4, rounds=16, peak=None, num_ranks=1)
        '346.5 MB held (copies 8.0, basis 248.0, 4 of 16 graphs 90.0, examples 0.5), a peak of 512.5 MB (computed)'
    """

    copies: int
    basis: int
    graphs: int
    examples: int
    more: int

    @property
    def total(self) -> int:
        """Bytes that are held all the time."""
        return self.copies + self.basis + self.graphs + self.examples

    def text(self, kept: int, rounds: int, peak: str | None, num_ranks: int, basis: Place | None = None) -> str:
        """In words.

        Args:
            kept: number of graphs that are kept.
            rounds: number of graphs.
            peak: in words, where it was measured.
            num_ranks: processes that share basis, graphs and examples.
            basis: where it lies, and how many vectors it has; None: on the device, as many as are wanted.
        """
        parts = [f"copies {_mb(self.copies)}", f"basis {_mb(self.basis)}{_remark(basis)}"]
        parts += [f"{kept} of {rounds} graphs {_mb(self.graphs)}"] if rounds else []
        parts += [f"examples {_mb(self.examples)}"]
        peak = f"a peak of {_mb(self.total + self.more)} MB (computed)" if peak is None else peak
        each = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
        return f"{_mb(self.total)} MB held{each} ({', '.join(parts)}), {peak}"


def _remark(basis: Place | None) -> str:
    """What is unusual about a basis."""
    if basis is None:
        return ""
    where = " in host memory" if basis.basis == "cpu" else ""
    return where + (f" where {basis.size} of {basis.wanted} vectors fit" if basis.size < basis.wanted else "")


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def forecast(*, n: int, k: int, seconds: float, first: float, memory: str, max_overhead: float | None) -> str:
    """One sentence on what a probe will cost.

    Args:
        n: number of parameters.
        k: number of eigenpairs.
        seconds: expected for one probe.
        first: expected for the first one, with all that it checks.
        memory: what is held, in words.
        max_overhead: the budget.

    Example:
        >>> forecast(n=1_930, k=10, seconds=0.5, first=1.5, memory="0.9 MB held", max_overhead=None)
        'n = 1,930, k = 10: about 0.50 s a probe, 1.50 s the first; 0.9 MB held; as scheduled'
    """
    pace = "as scheduled"
    if max_overhead is not None:
        pace = f"at most one every {seconds / max_overhead:.1f} s (max_overhead={max_overhead})"
    return f"n = {n:,}, k = {k}: about {seconds:.2f} s a probe, {first:.2f} s the first; {memory}; {pace}"
