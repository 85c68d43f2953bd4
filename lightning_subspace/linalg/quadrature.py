"""Sums over the whole spectrum of an operator, by stochastic Lanczos quadrature.

For a random unit vector u in R^N, N u^T f(A) u has the mean tr f(A) = sum_i f(lambda_i). After m steps of Lanczos from
u with the projected matrix T = S diag(theta) S^T it is N sum_j w_j f(theta_j) with weights w_j = S_1j^2: a Gauss
quadrature, exact for polynomials f of degree 2 m - 1. Known eigenpairs enter exactly, and u is drawn orthogonal to
them, so that the nodes go to the rest of the spectrum.

For u uniform on the sphere, N u^T B u has the variance 2 N / (N + 2) (tr B^2 - (tr B)^2 / N). With B = f(A) both traces
are such sums themselves, so each sum comes with its standard error, even from one vector.

Sources: G. Golub and G. Meurant, Matrices, Moments and Quadrature (2010), chapter 6; B. Ghorbani, S. Krishnan and
Y. Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density (2019), arXiv 1901.10159, section
2; on taking out known directions, R. Meyer et al., Hutch++ (2021), arXiv 2010.09649.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_subspace._arguments import require_function, require_number, require_shape
from lightning_subspace.linalg import _arguments as arguments
from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.lanczos import Lanczos, MatVec

_GAUSSIANS_AT_ONCE = 1024


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Quadrature:
    """A spectrum as known eigenvalues, and nodes with weights for all others.

    Attributes:
        known: shape (k,), float64: eigenvalues that count once each.
        nodes: shape (vectors, m), float64; nan, like the weights, if the operator was not finite.
        weights: of the same shape; each row sums to 1. 0 where a row has fewer nodes.
        dimension: N, the number of eigenvalues.
        chains: the tridiagonal matrices T that the nodes are from: the diagonal, and the couplings beside and behind.

    Example:
        >>> eigenvalues = torch.tensor([5.0, 1.0, 0.5, -1.0])
        >>> spectrum = quadrature(lambda v: eigenvalues * v, n=4, steps=4, vectors=1)
        >>> spectrum.dimension, [round(end, 4) for end in spectrum.ends]
        (4, [-1.0, 5.0])
    """

    known: Tensor
    nodes: Tensor
    weights: Tensor
    dimension: int
    chains: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def finite(self) -> bool:
        """Whether there is an answer."""
        return bool(torch.isfinite(self.nodes).all())

    @property
    def rest(self) -> int:
        """Number of eigenvalues that the nodes stand for."""
        return self.dimension - len(self.known)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue, as far as they were seen."""
        seen = torch.cat([self.known, self.nodes[self.weights > 0.0]])
        return float(seen.min()), float(seen.max())

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Sum of an elementwise f over all eigenvalues, with its standard error."""
        require_function("function", function, ("eigenvalues",), optional=False)
        values = torch.where(self.weights > 0.0, function(self.nodes), 0.0)
        mean = float((self.weights * values).sum(dim=1).mean())
        variance = float((self.weights * values.square()).sum(dim=1).mean()) - mean**2
        total = self.rest * mean + float(function(self.known).sum())
        return Estimate(total, self.rest * math.sqrt(2.0 * max(variance, 0.0) / ((self.rest + 2) * len(self.nodes))))

    def below(self, threshold: float) -> tuple[float, float]:
        """Bounds of the share of eigenvalues below a threshold, in [0, 1].

        T can be continued by one row so that the threshold is a node. By the inequalities of Chebyshev, Markov and
        Stieltjes the spectral distribution of u is there between the sum of the weights in front of that node, and that
        sum and its own; m steps give no better bounds. Averaged over the vectors, whose choice adds the error of `sum`.
        """
        require_number("threshold", threshold, "a finite number", math.isfinite)
        found = [_bounds(*chain, threshold) for chain in self.chains]
        exact = float((self.known < threshold).sum())
        low, high = ((self.rest * sum(ends) / len(found) + exact) / self.dimension for ends in zip(*found, strict=True))
        return max(low, 0.0), min(high, 1.0)

    def density(self, grid: Tensor, width: float) -> Tensor:  # (g,) -> (g,) float64
        """Density of the eigenvalues, smoothed by Gaussians; its integral is 1.

        `grid` and `width`, the standard deviation, are in units of the eigenvalues.
        """
        require_shape("grid", grid, ["g"])
        require_number("width", width, "a positive finite number", lambda x: 0.0 < x < math.inf)
        centres = torch.cat([self.known, self.nodes.flatten()])
        heights = torch.cat([torch.ones_like(self.known), (self.weights * (self.rest / len(self.nodes))).flatten()])
        result = torch.zeros(len(grid), dtype=torch.float64)
        for centre, height in zip(centres.split(_GAUSSIANS_AT_ONCE), heights.split(_GAUSSIANS_AT_ONCE), strict=True):
            result += torch.exp(-0.5 * ((grid.double()[:, None] - centre) / width).square()) @ height
        return result / (self.dimension * width * math.sqrt(2.0 * math.pi))


def quadrature(
    matvec: MatVec,
    n: int,
    *,
    steps: int = 40,
    vectors: int = 2,
    known: tuple[Tensor, Tensor, Tensor] | None = None,  # values (k,), residuals (k,), vectors (k, n)
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    all_sum: AllSum | None = None,
    random: arguments.RandomVector | None = None,
    dimension: int | None = None,
) -> Quadrature:
    """Compute a Gauss quadrature of the spectrum by Lanczos from random vectors.

    Costs `steps * vectors` products. Memory: `(k + steps + 1) * n` numbers.

    Args:
        matvec: as for `eigsh`.
        n: as for `eigsh`.
        steps: m, Lanczos steps from each vector: the resolution.
        vectors: number of random vectors: the error of sums.
        known: eigenvalues, their residuals and orthonormal eigenvectors as rows, which are taken out first. Ritz
            pairs of any space will do; what couples them to the rest is then missing.
        seed: of the random vectors.
        dtype: float32 or float64, of the basis.
        device: of the basis.
        all_sum: as for `eigsh`.
        random: as for `eigsh`.
        dimension: as for `eigsh`.

    Returns:
        Nodes and weights; nan where the operator, on whatever rank, was not finite.

    Raises:
        ValueError: for an argument out of range, or an image of a wrong shape.
        TypeError: for a number that is none, or an image of a wrong type.

    Example:
        >>> eigenvalues = torch.tensor([9.0, 5.0, 1.0, 0.5, 0.0, -0.5])
        >>> spectrum = quadrature(lambda v: eigenvalues * v, n=6, steps=6, vectors=1)
        >>> [round(abs(value), 3) for value in spectrum.nodes[0].tolist()]
        [0.5, 0.0, 0.5, 1.0, 5.0, 9.0]
    """
    steps, vectors = arguments.count("steps", steps, 1), arguments.count("vectors", vectors, 1)
    arguments.check_functions(matvec, all_sum, random)
    arguments.check_dtype(dtype)
    device = arguments.usable_device(device)
    draw = arguments.random_vectors(all_sum, random, n, seed, dtype, device)
    agreement = Agreement(all_sum)
    dimension = arguments.global_dimension(dimension, n, agreement, device)
    values, residuals, rows = arguments.known_pairs(known, n, dimension)
    k = len(values)
    steps = min(steps, dimension - k)
    nodes, weights = (torch.zeros(vectors, max(steps, 1), dtype=torch.float64) for _ in range(2))
    if not steps:  # everything is known
        none = (torch.zeros(1, dtype=torch.float64),) * 2
        return Quadrature(values.double().cpu(), nodes, weights, dimension, (none,))
    chains = []
    lanczos = Lanczos(matvec, n, k + steps, dimension=dimension, dtype=dtype, device=device, agreement=agreement)
    lanczos.lock(rows, values, residuals)
    for number in range(vectors):
        lanczos.inject(partial(draw, number))
        for _ in range(steps):
            if not agreement.finite or lanczos.invariant or lanczos.expand() is None:
                break
        if not agreement.finite:
            nodes.fill_(math.nan)
            weights.fill_(math.nan)
            break
        chain = lanczos.projected[k:, k:].clone()
        chains.append((chain.diagonal(), torch.cat([chain.diagonal(1), lanczos.coupling[-1:]])))
        theta, rotation = torch.linalg.eigh(chain)
        nodes[number, : len(theta)] = theta
        weights[number, : len(theta)] = rotation[0].square()
        lanczos.contract(torch.eye(lanczos.size, k, dtype=torch.float64))
    agreement.settle()
    return Quadrature(values.double().cpu(), nodes, weights, dimension, tuple(chains))


def _bounds(diagonal: Tensor, couplings: Tensor, threshold: float) -> tuple[float, float]:
    """Bounds of the spectral distribution of one start vector below a threshold."""
    m, behind = len(diagonal), float(couplings[-1])
    chain = torch.diag(diagonal) + torch.diag(couplings[:-1], 1) + torch.diag(couplings[:-1], -1)
    theta, rotation = torch.linalg.eigh(chain)
    if behind <= 0.0:  # the nodes are eigenvalues
        share = float(rotation[0].square()[theta < threshold].sum())
        return share, share
    if float((theta - threshold).abs().min()) > torch.finfo(torch.float64).eps * float(theta.abs().max()):
        # (T - x) d = b^2 e_m makes x + d_m the next diagonal entry (Golub 1973, Some modified matrix eigenvalue
        # problems). Otherwise x is a node already.
        right = torch.zeros(m, dtype=torch.float64)
        right[-1] = behind**2
        shift = torch.linalg.solve(chain - threshold * torch.eye(m, dtype=torch.float64), right)
        diagonal = torch.cat([diagonal, threshold + shift[-1:]])
        theta, rotation = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(couplings, 1) + torch.diag(couplings, -1))
    weights, own = rotation[0].square(), int((theta - threshold).abs().argmin())
    low = float(weights[:own].sum())
    return low, low + float(weights[own])
