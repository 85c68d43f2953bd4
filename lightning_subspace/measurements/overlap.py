"""How much of the top eigenspace survives."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_subspace.measurements.base import Measurement, Probe


class SubspaceOverlap(Measurement):
    """`overlap_previous`, `overlap_reference`: Tr(P P') / k with an earlier probe's space, in [0, 1].

    Equation 4 of the paper; exact, from the eigenvectors. Random spaces give k/n. The overlaps between all pairs of
    probes are estimated from sketches instead (`SubspaceMonitor.overlap_matrix`).

    After a resume the eigenvectors of earlier probes are gone. With more than 4,096 parameters the overlaps with them
    are then estimates from sketches too (`checkpoint.Resumed`): overlap_previous once, overlap_reference from there on.
    """

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One (k, n) by (n, k) product for each of the two."""
        others = {"overlap_previous": probe.previous, "overlap_reference": probe.reference}
        return {key: probe.top.overlap(basis) for key, basis in others.items() if basis is not None}
