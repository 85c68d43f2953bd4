"""Verification that no copy of a multiple eigenvalue was missed.

After convergence the wanted Ritz vectors are kept and the basis grows again from a random direction. A `Certificate`
for each group of eigenvalues tells when a missed copy would have shown. If one shows, the search goes on with it.

What a missed copy would change depends on where it lies, and so does what is done about it:

- beyond the last wanted value by more than `Rules.coarse_margin`: an eigenvalue by much. It is always excluded.
- beyond it by more than `Rules.fine_margin`: an eigenvalue by more than 5 % of itself. It is excluded within a bound on
  the products; where that is reached, the eigenvalues are not `verified`.
- at the last wanted value, or so close behind it that the eigenspace could not be trusted (`Rules.least_gap`): no
  eigenvalue, but the space, and the next eigenvalue. It is excluded within the same bound where a gap is claimed; where
  that is reached, the gap is claimed no more.
- farther behind: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_subspace.linalg.certificate import Certificate
from lightning_subspace.linalg.lanczos import Expansion
from lightning_subspace.linalg.selection import Neighbour, Ritz, decisive_values, ends, gap_values, merit
from lightning_subspace.linalg.stopping import Rules


class Verification:
    """The verification in progress, or the result of the last one."""

    def __init__(self, rules: Rules) -> None:
        self.active = False  # in progress: the first k rows of the basis are the pairs found, also after restarts
        self.behind: Sequence[Neighbour] = ()  # the neighbours, one an end, when it began; the basis forgets them
        self._rules = rules
        self._found = torch.zeros(0, device="cpu")  # merits of the pairs found
        self._residual = 0.0  # the largest of theirs
        self._coarse = self._fine = self._gap = Certificate([], rules.k, rules.dimension, rules.delta)
        self._has_values = False  # whether copies beyond the fine margin are excluded, of what was found last
        self._has_gap = False  # whether those at the last wanted value and close behind it are, too
        self._last_matvec = 0  # the products at which the bound is reached

    def begin(self, ritz: Ritz, behind: Sequence[Neighbour], scale: float, num_matvecs: int) -> None:
        """Choose what to exclude, just before the fresh start."""
        rules, wanted = self._rules, ritz.values[: self._rules.k]
        self.active, self.behind = True, behind
        self._found, self._residual = merit(wanted, rules.which), float(ritz.residuals[: rules.k].max())
        self._has_values = self._has_gap = False
        self._last_matvec = num_matvecs + rules.allowance(num_matvecs)
        margins = (partial(margin, scale) for margin in (rules.coarse_margin, rules.fine_margin))
        beyond = (decisive_values(wanted, rules.which, margin) for margin in margins)
        self._coarse, self._fine, self._gap = (
            Certificate(values, rules.k, rules.dimension, rules.delta)
            for values in (*beyond, gap_values(wanted, rules.which, rules.least_gap(self._residual, scale)))
        )

    def follow(self, expansion: Expansion) -> None:
        """Update the certificates by what a matvec has added."""
        # The second chain has come to an end: what there was to be seen in it was seen.
        is_complete = expansion.norm == 0.0
        if not is_complete:
            for certificate in self._certificates:
                certificate.follow(*expansion)
        self._has_values, self._has_gap = (c.holds or is_complete for c in (self._fine, self._gap))

    def contract(self, rotation: Tensor) -> None:
        """Update the certificates after a restart, see `Certificate.contract`."""
        for certificate in self._certificates:
            certificate.contract(rotation)

    def see(self, ritz: Ritz, scale: float) -> bool:
        """Whether a missed copy has turned up; the verification is then over."""
        # Until copies are excluded, only an improvement by their margin counts; after that, any beyond tol.
        margin = self._rules.least_margin if self._has_values else self._rules.fine_margin
        # What was excluded behind the last value says nothing of another one, however little better that is.
        width = self._rules.least_gap(self._residual, scale)
        if not self._misses(ritz, partial(margin, scale)) and not (
            self._has_gap and self._misses(ritz, lambda _: width)
        ):
            return False
        self.active = self._has_gap = False  # the values that it has verified stay so, if they are still there
        return True

    def verifies_values(self, ritz: Ritz, scale: float) -> bool:
        """Whether missed copies that would change an eigenvalue are excluded."""
        margin = partial(self._rules.fine_margin, scale)
        if self._has_values:
            return self.active or not self._misses(ritz, margin)
        return not decisive_values(ritz.values[: self._rules.k], self._rules.which, margin)

    def verifies_gap(self) -> bool:
        """Whether nothing missed lies at the last wanted value."""
        return self._has_gap

    def is_over(self, ritz: Ritz, closest: Neighbour, scale: float, num_matvecs: int) -> bool:
        """Whether all is excluded that matters, or that the bound allows."""
        is_complete = self.verifies_values(ritz, scale) and (self._has_gap or not self._claims(ritz, closest, scale))
        return not self._rules.verify or is_complete or (self._coarse.holds and self._is_spent(num_matvecs))

    @property
    def _certificates(self) -> tuple[Certificate, Certificate, Certificate]:
        return self._coarse, self._fine, self._gap

    def _is_spent(self, num_matvecs: int) -> bool:
        """Whether the bound on products is reached, or will be in vain."""
        slowest = self._gap if self._fine.holds else self._fine
        return self.active and not slowest.may_hold(self._last_matvec - num_matvecs)

    def _claims(self, ritz: Ritz, closest: Neighbour, scale: float) -> bool:
        """Whether the gap seems wide enough to claim an eigenspace."""
        residual = self._residual if self.active else float(ritz.residuals[: self._rules.k].max())
        # Once a value has settled in the gap, nothing is claimed there any more.
        is_settled = closest.residual <= max(self._rules.tol * scale, closest.gap / 2)
        return self._rules.claims_space(residual, closest.gap, scale) or (self.active and not is_settled)

    def _misses(self, ritz: Ritz, margin: Callable[[float], float]) -> bool:
        """Whether more values lie `margin` beyond the last found than before."""
        # They are counted: in a dense list a missed copy of the first value moves every other one by very little.
        found, now = self._found, merit(ritz.values[: self._rules.k], self._rules.which)
        for end in ends(self._rules.k, self._rules.which):
            last = float(found[end].min())
            edge = last + margin(last)
            if int((now[end] > edge).sum()) > int((found[end] > edge).sum()):
                return True
        return False
