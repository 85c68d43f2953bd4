"""Certificate that no copy of an eigenvalue was missed.

A Krylov space holds one vector of every eigenspace, so Lanczos sees one copy of a multiple eigenvalue, however long it
runs. After convergence a second chain is therefore started from a random unit vector r, orthogonal to the eigenvectors
X that were found, and followed until a missed copy would have shown. Let u be a missed eigenvector, with an eigenvalue
lam that was found. Every vector of the chain is a polynomial in A applied to r, so

    u . v_j = c_j (u . r),

and the c_j obey the chain's own recurrence: they are known from the projected matrix and lam alone. Since the v_j are
orthonormal, (u . r)^2 |c|^2 <= 1. But for a random r and large N, P((u . r)^2 <= 1 / G) <= sqrt(2 N / (pi G)). Once
|c|^2 has reached

    G = (2 / pi) N / delta^2,

there is no such u, but for a risk of delta. The bound takes X as exactly invariant (it is so to the tolerance of the
solver). Its cost grows like log(N): |c|^2 grows geometrically where lam lies outside the spectrum that is left, the
faster the farther out, which is why one lam speaks for all those beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WINDOW = 10  # expansions by which the growth is judged: sooner, spaces are given up that would have been trusted
_HOPE = 2.0  # it may grow so much faster later


class Certificate:
    """The components c for each lam along one Lanczos chain.

    Args:
        eigenvalues: the lam, see `decisive_values`; they share the risk. Without any there is nothing to exclude.
        num_found: rows of the basis that hold X; the chain starts with the row behind them.
        dimension: N, of the whole space.
        delta: risk that any copy was missed, in (0, 1).

    Example:
        The chain of a tridiagonal matrix with zero diagonal and unit off-diagonals, whose spectrum lies in (-2, 2):

        >>> certificate = Certificate([2.5], num_found=0, dimension=1000, delta=0.01)
        >>> num_steps = 0
        >>> while not certificate.holds:
        ...     column = torch.zeros(num_steps + 1, dtype=torch.float64)
        ...     column[num_steps - 1 : num_steps] = 1.0
        ...     certificate.follow(column, 1.0)
        ...     num_steps += 1
        >>> num_steps
        11
    """

    def __init__(self, eigenvalues: Sequence[float], num_found: int, dimension: int, delta: float) -> None:
        self._eigenvalues = torch.tensor(list(eigenvalues), dtype=torch.float64, device="cpu")
        # c, shape (lams, rows of the basis). At the start u is orthogonal to X, and c = 1 for r itself.
        self._components = self._eigenvalues.new_zeros(len(eigenvalues), num_found + 1)
        self._components[:, num_found] = 1.0
        self._growth = torch.ones_like(self._eigenvalues)  # the largest |c|^2 so far
        self._logarithms: list[float] = []  # of the smallest growth, after each expansion
        self._required = 2 / math.pi * dimension * (len(eigenvalues) / delta) ** 2

    @property
    def holds(self) -> bool:
        """Whether missed copies of all eigenvalues are excluded."""
        return bool((self._growth >= self._required).all())

    def may_hold(self, num_more: int) -> bool:
        """Whether it may hold after so many more expansions.

        By its growth in the last few, which is about geometric; while there were fewer, anything may be.
        """
        if self.holds or len(self._logarithms) <= _WINDOW:
            return self.holds or num_more > 0
        now, before = self._logarithms[-1], self._logarithms[-1 - _WINDOW]
        return now + _HOPE * (now - before) / _WINDOW * num_more >= math.log(self._required)

    def follow(self, column: Tensor, norm: float) -> None:
        """Update c after an expansion; see `lanczos.Expansion`."""
        components = self._components
        new = (self._eigenvalues * components[:, -1] - components @ column) / norm
        # An excluded eigenvalue is followed no further: its components would go on growing, finally past float64.
        new = new.where(self._growth < self._required, torch.zeros_like(new))
        self._components = torch.cat([components, new[:, None]], dim=1)
        self._growth = torch.maximum(self._growth, self._components.square().sum(dim=1))
        self._logarithms.append(float(self._growth.log().min()) if len(self._growth) else 0.0)

    def contract(self, rotation: Tensor) -> None:
        """Update c after a restart to rotation^T V; orthonormal columns, (m, kept)."""
        settled, pending = self._components[:, :-1], self._components[:, -1:]
        self._components = torch.cat([settled @ rotation, pending], dim=1)
