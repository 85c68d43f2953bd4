"""Verification that no copy of a multiple eigenvalue was missed.

After convergence the wanted Ritz vectors are kept and the basis grows again from a random direction. A `Certificate`
for each group of eigenvalues tells when a missed copy would have shown. If one shows, the search goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_subspace.linalg.certificate import Certificate
from lightning_subspace.linalg.lanczos import Expansion
from lightning_subspace.linalg.selection import Neighbour, Ritz, closest_of, decisive_values, edge_values, ends, merit
from lightning_subspace.linalg.stopping import Rules


class Verification:
    """The verification in progress, or the result of the last one."""

    def __init__(self, rules: Rules) -> None:
        self.active = False  # in progress: the first k rows of the basis are the pairs found, also after restarts
        self.excluded = False  # whether the last one has excluded missed copies of these pairs
        self.behind: Sequence[Neighbour] = ()  # their neighbours, one an end, when it began; the basis forgets them
        self._rules = rules
        self._found = torch.zeros(0, device="cpu")  # merits of the pairs found
        self._certificates: list[Certificate] = []

    def begin(self, ritz: Ritz, behind: Sequence[Neighbour], scale: float) -> None:
        """Choose what to exclude, just before the fresh start."""
        rules, closest = self._rules, closest_of(behind)
        wanted = ritz.values[: rules.k]
        self.active, self.excluded = True, False
        self.behind = behind
        self._found = merit(wanted, rules.which)
        # Copies of the last wanted value of each end matter where they would stand in a gap that is claimed.
        is_claimed = rules.subspace_tol is not None and closest.gap > rules.copy_margin(scale)
        last = edge_values(wanted, rules.which, margin=0.0) if is_claimed else []
        decisive = self._decisive(ritz, closest, scale)
        self._certificates = [Certificate(values, rules.k, rules.dimension, rules.delta) for values in (decisive, last)]

    def follow(self, expansion: Expansion, closest: Neighbour, scale: float) -> None:
        """Update the certificates by what a matvec has added."""
        if expansion.norm > 0.0:
            for certificate in self._certificates:
                certificate.follow(*expansion)
        decisive, last = self._certificates
        # Once a value has settled in the gap, nothing is claimed there any more.
        is_settled = closest.residual <= max(self._rules.tol * scale, closest.gap / 2)
        has_closed = is_settled and closest.gap <= self._rules.copy_margin(scale)
        self.excluded = decisive.holds and (last.holds or has_closed)

    def contract(self, rotation: Tensor) -> None:
        """Update the certificates after a restart, see `Certificate.contract`."""
        for certificate in self._certificates:
            certificate.contract(rotation)

    def misses(self, ritz: Ritz, margin: float) -> bool:
        """Whether more values lie `margin` beyond the last found than before."""
        # They are counted: in a dense list a missed copy of the first value moves every other one by very little.
        found, now = self._found, merit(ritz.values[: self._rules.k], self._rules.which)
        return any(
            int((now[end] > found[end].min() + margin).sum()) > int((found[end] > found[end].min() + margin).sum())
            for end in ends(self._rules.k, self._rules.which)
        )

    def is_certain(self, ritz: Ritz, closest: Neighbour, scale: float, *, invariant: bool) -> bool:
        """Whether missed copies are excluded, irrelevant, or not asked about."""
        if self.active:
            return self.excluded or invariant
        was_excluded = self.excluded and not self.misses(ritz, self._rules.copy_margin(scale))
        return not self._rules.verify or was_excluded or not self._decisive(ritz, closest, scale)

    def _decisive(self, ritz: Ritz, closest: Neighbour, scale: float) -> list[float]:
        """The values of which missed copies have to be excluded."""
        rules, wanted, margin = self._rules, ritz.values[: self._rules.k], self._rules.copy_margin(scale)
        # Copies of almost equal values change no eigenvalue. But if there seems to be a gap, they make it an illusion.
        at_stake = rules.subspace_tol is not None and closest.gap > closest.residual
        edge = edge_values(wanted, rules.which, margin) if at_stake else []
        return decisive_values(wanted, rules.which, margin) or edge
