"""Overlap of top eigenspaces between probes, and of the next ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_subspace._arguments import require_integer
from lightning_subspace.measurements.base import Measurement, Probe, positive
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.spaces import Spaces
from lightning_subspace.subspace.subspace import TRUSTED_ERROR, Subspace


class SubspaceOverlap(Measurement):
    """`overlap_previous`, `overlap_reference`: Tr(PP')/k with an earlier probe's space, in [0, 1].

    Gur-Ari, Roberts and Dyer (2018, arXiv 1812.04754), equation 4; exact, from the eigenvectors. Random spaces give
    k/n. `SubspaceMonitor.overlap_matrix` estimates the overlaps between pairs of probes from sketches.

    After a resume the eigenvectors of earlier probes are gone. With more than 4,096 parameters the overlaps with them
    are estimated from sketches too: the next `overlap_previous`, and `overlap_reference` from there on.
    """

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One (k, n) by (n, k) product for each of the two."""
        others = {"overlap_previous": probe.previous, "overlap_reference": probe.reference}
        return {key: probe.top.overlap(basis) for key, basis in others.items() if basis is not None}


class Control(Measurement):
    """`overlap_next_previous`, `overlap_next_reference`: overlaps of the space of eigenvectors k+1 ... 2k.

    The control experiment of Gur-Ari, Roberts and Dyer (2018, arXiv 1812.04754, figure 2): the top space survives, the
    next one does not. Tr(P P') / k in [0, 1], as `overlap_previous`, for the *next* k eigenvectors now and at the last
    probe, or at the first one at or after `reference_step`. `overlap_top_previous`, `overlap_top_reference` are those
    of the first k for the same probes.

    `overlap_next_error`: the eigenvalues around the 2k-th lie close together, so the last of the next eigenvectors are
    known less well. With sin_i <= residual_i / (lambda_i - lambda_{2k+1}) for each of them, an overlap is off by at
    most the mean of the sin_i, of both probes. Left out, here and at the probe after, where the mean of one probe is
    above .1 or its solver did not converge.

    After a resume the eigenvectors of the two earlier probes are gone, and sketches of them are in their place: with
    more than 4,096 parameters overlaps with them are estimates.

    Costs one eigensolve for 2k pairs (50 to 100 products for k = 10 and n = 1,930), and 2k n floats on the CPU for each
    of the two probes; in a checkpoint 8 k min(n, 4096) bytes for each, or twice that with `dtype="float64"` and few
    parameters.

    Args:
        every: taken at each probe whose number is a multiple of this.
        reference_step: compare also with the first measured space at or after this step.

    Raises:
        ValueError: for an `every` that is not a positive integer, or a `reference_step` that is not one of at least 0.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=10, measurements=[Control(reference_step=500)])
    """

    def __init__(self, every: int = 1, reference_step: int | None = None) -> None:
        self.every = positive("every", every)
        self.reference_step: int | None = require_integer("reference_step", reference_step, 0, optional=True)
        self._previous: Spaces | None = None
        self._reference: Spaces | None = None

    def expected_products(self, prospect: Prospect) -> float:
        """An eigensolve for 2k pairs."""
        return prospect.solve(2 * prospect.solver.k)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """An eigensolve for 2k pairs."""
        if probe.number == 0:
            self._previous = self._reference = None
        k = probe.top.k
        if 2 * k > probe.partition.n:
            return {}
        found = probe.solve(probe.operator, k=2 * k)
        error = _mean_sine(found, k) if found.converged else math.inf
        if not error <= TRUSTED_ERROR:
            self._previous = None
            return {}
        spaces = Spaces.of(probe.step, found.basis, k, error, probe.partition)
        metrics: dict[str, float] = {}
        for name, other in (("previous", self._previous), ("reference", self._reference)):
            # One of this step is its own, taken again behind a checkpoint.
            if other is not None and other.fits(probe.partition, k) and other.step != probe.step:
                overlaps = spaces.overlaps(other, probe.partition)
                metrics[f"overlap_top_{name}"], metrics[f"overlap_next_{name}"] = overlaps
                metrics["overlap_next_error"] = max(error + other.error, metrics.get("overlap_next_error", 0.0))
        self._previous = spaces
        is_due = self.reference_step is not None and probe.step >= self.reference_step
        if is_due and (self._reference is None or not self._reference.fits(probe.partition, k)):
            self._reference = spaces
        return metrics

    def state_dict(self) -> Mapping[str, Any]:
        """Sketches of the spaces of the last probe, and of the reference."""
        kept = {"previous": self._previous, "reference": self._reference}
        return {name: spaces.state() for name, spaces in kept.items() if spaces is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these in the place of eigenvectors."""
        loaded = [None if name not in state else Spaces.from_state(state[name]) for name in ("previous", "reference")]
        self._previous, self._reference = loaded


def _mean_sine(found: Subspace, k: int) -> float:
    """Bound of the mean sine error of eigenvectors k+1 ... 2k."""
    if found.error == 0.0:
        return 0.0
    gap = float(found.residuals.max()) / found.error  # behind the last eigenvalue; 0 where nothing is known of it
    gaps = (found.eigenvalues - found.eigenvalues[-1]).abs() + gap
    return float((found.residuals / gaps).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)[k:].mean())
